"""Tensors whose memory was freed or cut, as FSDP does with `untyped_storage().resize_(0)`: refused, never read."""

import copy
import itertools

import pytest
import torch

import lenet_fast as lf
from lenet_fast import backends, functional, models
from lenet_fast.network import Network
from lenet_fast.tables import Connections

if (reason := backends.why_unavailable("native", "cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)

TABLE = Connections(4, 3, (0, 1, 3, 5, 7, 8, 10, 11))
X, W, V = torch.rand(2, 3, 9, 8), torch.rand(4, 3, 3, 3), torch.rand(8, 3, 3)
B, C, D = torch.rand(4), torch.rand(4), torch.rand(4)
GRAD = torch.rand(2, 4, 3, 3)
OPS = torch.ops.lenet_fast
RECORD = OPS._conv_recording(X, W, B, None, None, None, -1, 0, "tanh", "avg")[1]

OPERATORS = {
    "conv_act_pool": (X, W, B, 0, "tanh", "avg"),
    "sparse_conv_act_pool": (X, V, B, TABLE.indices, 4, 0, "tanh", "avg"),
    "conv_subsample": (X, W, B, C, D, None, 0, "tanh"),
    "conv_act_pool_backward": (GRAD, X, W, B, 0, "tanh", "avg", True, True, True),
    "sparse_conv_act_pool_backward": (GRAD, X, V, B, TABLE.indices, 4, 0, "tanh", "avg", True, True, True),
    "conv_subsample_backward": (GRAD, X, W, B, C, D, None, 0, "tanh", True, True, True, True, True),
    "_conv_recording": (X, W, B, C, D, None, -1, 0, "tanh", "none"),
    "_conv_recorded_backward": (GRAD, RECORD, X, W, B, None, None, None, -1, 0, "tanh", "avg", *[True] * 5),
}


def emptied(tensor, kept, transposed=False):
    """A copy with room for that share of its bytes, perhaps with strides of another order."""
    if transposed and tensor.dim() > 1:
        tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    else:
        tensor = tensor.clone()
    storage = tensor.untyped_storage()
    storage.resize_(int(kept * storage.nbytes()))
    return tensor


def replaced(arguments):
    """Every choice of one tensor among arguments and lists of them: its place, and a function that replaces it."""
    for i, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            yield f"{i}", argument, lambda new, i=i: (*arguments[:i], new, *arguments[i + 1 :])
        elif isinstance(argument, list):
            for place, tensor, replace in replaced(argument):
                yield (
                    f"{i}.{place}",
                    tensor,
                    lambda new, i=i, replace=replace: (*arguments[:i], list(replace(new)), *arguments[i + 1 :]),
                )


def assert_every_tensor_is_looked_at(operator, arguments):
    operator(*arguments)  # is right as it is
    places = list(replaced(arguments))
    assert len(places) >= 2
    for (_, tensor, replace), kept, transposed in itertools.product(places, (0, 0.5), (False, True)):
        with pytest.raises(RuntimeError, match="its memory was freed or cut"):
            operator(*replace(emptied(tensor, kept, transposed)))


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name):
    assert_every_tensor_is_looked_at(getattr(OPS, name), OPERATORS[name])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("images", ["float", "bytes"])
def test_network_train(optimizer, images):
    model = models.lenet5_1998()
    network = Network.of(model)
    tensors = [tensor.detach() for tensor in network.tensors()]
    state = (
        [[torch.zeros_like(tensor) for tensor in tensors[:-1]] for _ in range(2)] if optimizer == "adam" else [[], []]
    )
    counts = [torch.zeros(()) for _ in tensors[:-1]] if optimizer == "adam" else []
    data = torch.rand(8, 1, 32, 32) if images == "float" else torch.randint(256, (8, 28, 28), dtype=torch.uint8)
    settings = [0.0, 0.0, 0.0, 0.9, 0.999, 1e-8]
    arguments = (network.numbers((1, 32, 32)), tensors, *state, counts, [1] * len(counts or tensors[:-1]), data)
    arguments += (torch.zeros(8, dtype=torch.int64), torch.arange(8), 8, 0.01, 0.0, optimizer, settings, [0.0], 0.0)
    arguments += ([], 0, 0, 0.0)
    assert_every_tensor_is_looked_at(lambda *given: OPS.network_train(*given), arguments)


def test_network_infer():
    model = models.lenet5_1998()
    network = Network.of(model)
    tensors = [tensor.detach() for tensor in network.tensors()]
    definition = OPS.network_define(network.numbers((1, 32, 32)))
    try:
        for size in (2, 40):
            assert_every_tensor_is_looked_at(
                OPS.network_infer, (definition, tensors, torch.rand(size, 1, 32, 32), 0.0, 0.0)
            )
            images = torch.randint(256, (size, 28, 28), dtype=torch.uint8)
            assert_every_tensor_is_looked_at(OPS.network_infer, (definition, tensors, images, 0.01, 0.0))
    finally:
        OPS.network_release(definition)


def test_dense_functions():
    for function in (functional.linear_act, functional.rbf):
        for kept, first in itertools.product((0, 0.5), (True, False)):
            input, weight = torch.rand(3, 16), torch.rand(5, 16)
            arguments = (emptied(input, kept), weight) if first else (input, emptied(weight, kept))
            with pytest.raises(RuntimeError, match="its memory was freed or cut"):
                function(*arguments)


def test_a_window_over_the_whole_input_and_a_padding_on_one_side():
    for size, options in (
        (5, {"pool": "none"}),
        (4, {"padding": "same"}),
        (4, {"padding": "same", "backend": "reference"}),
    ):
        for kept, i in itertools.product((0, 0.5), range(3)):
            arguments = [torch.rand(2, 3, 5, 5), torch.rand(4, 3, size, size), torch.rand(4)]
            functional.conv_act_pool(*arguments, **options)
            arguments[i] = emptied(arguments[i], kept)
            with pytest.raises(RuntimeError, match="its memory was freed or cut"):
                functional.conv_act_pool(*arguments, **options)


def parts():
    model = models.lenet5_1998()
    trainer = lf.FusedTrainer(model, "adam", lr=0.01)
    images, labels = torch.rand(3, 1, 32, 32), torch.zeros(3, dtype=torch.int64)
    trainer.step(images, labels)
    with torch.inference_mode():
        model.eval()(images)
    return model, trainer, images, labels


TENSORS = (*models.lenet5_1998().state_dict(), "images", "labels")


@pytest.mark.parametrize("kept", [0, 0.5])
@pytest.mark.parametrize("name", TENSORS)
def test_the_trainer_and_the_models(name, kept):
    model, trainer, images, labels = parts()
    tensor = {**dict(model.named_parameters()), **dict(model.named_buffers()), "images": images, "labels": labels}[name]
    storage = tensor.untyped_storage()
    storage.resize_(int(kept * storage.nbytes()))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="its memory was freed or cut"):
            trainer.step(images, labels)
        if name != "labels":
            with torch.inference_mode(), pytest.raises(RuntimeError, match="its memory was freed or cut"):
                model.eval()(images)


def test_the_state_of_an_optimizer():
    model, trainer, images, labels = parts()
    for tensor in trainer.optimizer.state[model.c3.weight].values():
        storage = tensor.untyped_storage()
        kept = storage.clone()
        storage.resize_(0)
        with pytest.raises(RuntimeError, match="its memory was freed or cut"):
            trainer.step(images, labels)
        storage.resize_(kept.nbytes())
        storage.copy_(kept)
        trainer.step(images, labels)


def test_what_is_whole_again_is_used_again():
    model, trainer, images, labels = parts()
    twin = copy.deepcopy(model)
    storage = model.c3.weight.untyped_storage()
    kept = storage.clone()
    storage.resize_(0)
    with pytest.raises(RuntimeError):
        trainer.step(images, labels)
    with torch.inference_mode():
        with pytest.raises(RuntimeError):
            model(images)
        storage.resize_(kept.nbytes())
        storage.copy_(kept)
        torch.testing.assert_close(model(images), twin(images))
    trainer.step(images, labels)
