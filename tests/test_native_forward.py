"""The one-call forward of a LeNet in eval mode under inference_mode: the layers' results, and never a stale one."""

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from instruction_sets import ISAS, run_on
from torch import nn

import lenet_fast as lf
from lenet_fast import models, native_forward
from lenet_fast.network import Network


@pytest.fixture
def calls(monkeypatch):
    """Counts the native calls."""
    seen = []

    def infer(*arguments):
        seen.append(arguments)
        return original(*arguments)

    packet = torch.ops.lenet_fast.network_infer
    original = packet.default
    monkeypatch.setattr(packet, "default", infer)
    return seen


def build(name, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return models.MODELS[name](dtype=dtype, **options).eval()


def images_for(model, number=5, dtype=torch.float64):
    size = model.input_spec.size
    return torch.rand(number, 1, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def assert_as_the_layers(model, images, atol=1e-12):
    """Both ways agree; returns what they said."""
    with torch.no_grad():
        expected = nn.Sequential.forward(model, images)
    with torch.inference_mode():
        found = model(images)
    assert found.is_inference()
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    return found


VARIANTS = [
    {"name": "lenet1"},
    {"name": "lenet5"},
    {"name": "lenet5-d2l"},
    {"name": "lenet5-1998"},
    {"name": "lenet5-1998", "output": "linear", "connections": None},
    {"name": "lenet5-d2l", "activation": "relu", "pool": "max", "kernel_size": 3, "connections": lf.tables.LENET5_C3},
    {"name": "lenet5-d2l", "channels": (6, 8, 3), "kernel_size": (5, 3, 2), "pool": ("avg", "max", "none")},
    {"name": "lenet5", "dense": ()},
    {"name": "lenet5-d2l", "channels": (3, 35), "kernel_size": (4, 6), "padding": (3, 2), "pool": ("none", "avg")},
    {"name": "lenet5", "channels": (18, 5), "padding": (9, 1), "activation": "tanh", "dense": (7,)},  # 46 columns
]


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("number", [1, 2, 3, 8, 16, 17, 33, 100])
def test_it_says_what_the_layers_say(options, number, calls):
    model = build(**options)
    assert_as_the_layers(model, images_for(model, number))
    assert len(calls) == 1


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("number", [1, 3, 50])
def test_float32(name, number, calls):
    model = build(name, torch.float32)
    images = images_for(model, number, torch.float32)
    exact = copy.deepcopy(model).double()
    with torch.inference_mode():
        found = model(images).double()
        expected = nn.Sequential.forward(exact, images.double())
        plain = model.reference()(images).double()
    assert (found - expected).abs().max() <= 2 * (plain - expected).abs().max() + 1e-6
    assert len(calls) == 1


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = build("lenet5-d2l")
        assert_as_the_layers(model, images_for(model, 200))
    finally:
        torch.set_num_threads(before)


def test_training_and_gradients_go_layer_by_layer(calls):
    model = build("lenet5")
    images = images_for(model)
    assert model(images).requires_grad
    with torch.no_grad():
        model(images)
    with torch.inference_mode():
        model.train()(images)
    assert not calls


def test_what_is_not_one_of_its_calls_goes_layer_by_layer(calls):
    model = build("lenet5-d2l", torch.float32)
    images = images_for(model, 4, torch.float32)
    with torch.inference_mode():
        single = model(images[0])
        assert single.shape == (10,)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(images).dtype == torch.bfloat16
        assert model(images[:0]).shape == (0, 10)
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            model(images.double())
        with pytest.raises((RuntimeError, ValueError)):
            model(images[:, :, :20])
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            model("images")
        half = copy.deepcopy(model).half()
        assert half(images.half()).dtype == torch.float16
        vmapped = torch.func.vmap(model)(images[None])
        torch.testing.assert_close(vmapped[0], model(images), rtol=0, atol=1e-5)
    assert len(calls) <= 2


def test_strided_images(calls):
    model = build("lenet5")
    images = images_for(model, 12)
    assert_as_the_layers(model, images[::2])
    assert_as_the_layers(model, images.transpose(2, 3))
    assert_as_the_layers(model, images[:1].expand(5, -1, -1, -1))
    assert len(calls) == 3


def changes():
    """Things done to a model after its first native call, each with what it then says being different."""

    def in_place(model):
        with torch.no_grad():
            model.c3.weight.mul_(2)

    def new_parameter(model):
        model.c3.weight = nn.Parameter(2 * model.c3.weight.detach())

    def new_data(model):
        model.c3.weight.data = 2 * model.c3.weight.data

    def optimizer_step(model):
        with torch.enable_grad(), torch.inference_mode(False):
            images = images_for(model).clone()
            model(images).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()

    def fused_step(model):
        lf.FusedTrainer(model, lr=1.0).step(images_for(model), torch.zeros(5, dtype=torch.int64))

    def state_dict(model):
        model.load_state_dict({key: 2 * value for key, value in model.state_dict().items()})

    def assigned_state_dict(model):
        model.load_state_dict({key: 2 * value for key, value in model.state_dict().items()}, assign=True)

    def data_of_another_layout(model):
        model.c3.weight.data = model.c3.weight.data.transpose(2, 3)

    def swapped(model):
        torch.utils.swap_tensors(model.c3.weight, nn.Parameter(2 * model.c3.weight.detach()))

    def behind_the_back(model):
        model.c3._parameters["weight"] = nn.Parameter(2 * model.c3.weight.detach())

    def activation(model):
        model.c3.activation = "tanh"

    def layer(model):
        model.f6_act = nn.Tanh()

    def taken_out(model):
        del model.f6_act

    def bias(model):
        model.f6.bias = None

    def own_forward(model):
        model.f6_act.forward = lambda x: 2 * x

    def pooling(model):
        model.c3.pool = "avg"

    return [value for value in locals().values() if callable(value)]


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_every_change_of_the_model_counts(change, calls):
    model = build("lenet5")
    images = images_for(model)
    before = assert_as_the_layers(model, images).clone()
    assert len(calls) == 1
    change(model)
    after = assert_as_the_layers(model, images)
    assert not torch.allclose(before, after)


def test_hooks_are_called_and_after_them_it_is_native_again(calls):
    model = build("lenet5")
    images = images_for(model)
    assert_as_the_layers(model, images)
    seen = []
    handle = model.c1.register_forward_hook(lambda layer, inputs, output: seen.append(output.shape))
    with torch.inference_mode():
        model(images)
    assert len(seen) == len(calls) == 1
    handle.remove()
    assert_as_the_layers(model, images)
    assert len(calls) == 2


def test_global_hooks_are_called(calls):
    model = build("lenet5")
    images = images_for(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda layer, inputs, output: seen.append(layer))
    try:
        with torch.inference_mode():
            model(images)
    finally:
        handle.remove()
    assert model.c1 in seen
    assert not calls


def test_a_call_with_other_parameters_uses_them():
    model = build("lenet5")
    images = images_for(model, 1)
    before = assert_as_the_layers(model, images)
    others = {name: 2 * value for name, value in model.state_dict().items()}
    with torch.inference_mode():
        found = torch.func.functional_call(model, others, (images,))
        twin = copy.deepcopy(model)
        twin.load_state_dict(others)
        torch.testing.assert_close(found, nn.Sequential.forward(twin, images), rtol=0, atol=1e-12)
    assert torch.equal(assert_as_the_layers(model, images), before)


@pytest.mark.parametrize("convert", ["overwrite_module_params_on_conversion", "swap_module_params_on_conversion"])
def test_however_conversion_replaces_parameters(convert):
    model = build("lenet5-1998")
    assert_as_the_layers(model, images_for(model, 1))
    setter = getattr(torch.__future__, f"set_{convert}")
    setter(True)
    try:
        model.float()
    finally:
        setter(False)
    assert_as_the_layers(model, images_for(model, 1, torch.float32), atol=1e-4)


def test_a_model_with_another_layer_in_it_goes_layer_by_layer(calls):
    model = build("lenet5")
    model.f6_act = nn.GELU()
    images = images_for(model)
    for _ in range(2):
        assert_as_the_layers(model, images, atol=0)
    assert not calls


class Squashed(models.LeNet):
    def forward(self, input):
        return torch.tanh(super().forward(input))


def test_what_a_derived_class_adds_is_added_once(calls):
    model = build("lenet5")
    images = images_for(model)
    with torch.no_grad():
        expected = torch.tanh(model(images))
    model.__class__ = Squashed
    with torch.inference_mode():
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-12)
    assert not calls


def test_it_is_native_again_when_a_refused_model_is_as_it_was(calls):
    model = build("lenet5")
    images = images_for(model)
    before = assert_as_the_layers(model, images).clone()
    assert len(calls) == 1
    for _ in range(3):
        model.half()
        with torch.inference_mode():
            for _ in range(2):
                assert model(images.half()).dtype == torch.float16
        model.double()
        model.load_state_dict(build("lenet5").state_dict())
        calls.clear()
        assert torch.equal(assert_as_the_layers(model, images), before)
        assert len(calls) == 1
    assert len(model._native_forward._reading._releases) == 1  # the others are released


def test_restore_and_the_reference_backend_are_plain(calls):
    model = build("lenet5-1998")
    images = images_for(model)
    for layer in (model.c1, model.c3):
        layer.backend = "reference"
    assert_as_the_layers(model, images, atol=0)
    lf.restore(build("lenet5"))(images)
    assert not calls


def test_dtype_follows_the_model(calls):
    model = build("lenet5")
    assert_as_the_layers(model, images_for(model))
    assert_as_the_layers(model.float(), images_for(model, dtype=torch.float32), atol=1e-5)
    assert_as_the_layers(model.double(), images_for(model))
    assert len(calls) == 3


def test_copies_are_on_their_own(calls):
    model = build("lenet5")
    images = images_for(model)
    assert_as_the_layers(model, images)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), copy.copy(model), torch.load(buffer, weights_only=False)):
        with torch.no_grad():
            twin.output.weight.mul_(3)
        assert_as_the_layers(twin, images)
        assert_as_the_layers(model, images)
    assert len(calls) == 7


def test_images_of_another_size_are_an_error_as_in_pytorch_and_change_nothing(calls):
    model = build("lenet1")
    assert_as_the_layers(model, images_for(model))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        model(torch.rand(2, 1, 40, 40, dtype=torch.float64))
    assert_as_the_layers(model, images_for(model))
    assert len(calls) == 2


def test_definitions_are_released_with_the_model(monkeypatch):
    model = build("lenet1")
    with torch.inference_mode():
        model(images_for(model))
        (definition,) = model._native_forward._reading._definitions.values()
        tensors = model._native_forward._reading.tensors
        del model
        gc.collect()
        with pytest.raises(RuntimeError, match="network: expected what network_define returned"):
            torch.ops.lenet_fast.network_infer(definition, tensors, torch.rand(1, 1, 28, 28), 0.0, 0.0)


def test_replaced_parameters_are_freed_at_the_next_call():
    model = build("lenet5")
    assert_as_the_layers(model, images_for(model))
    old = weakref.ref(model.c3.weight)
    model.c3.weight = nn.Parameter(2 * model.c3.weight.detach())
    assert_as_the_layers(model, images_for(model))
    gc.collect()
    assert old() is None


def test_threads_of_python_at_once():
    model = build("lenet5-d2l", torch.float32)
    images = images_for(model, 64, torch.float32)
    other = build("lenet5", torch.float32)
    with torch.inference_mode():
        expected = model(images)
    wrong = []

    def work(seed):
        size = 1 + seed % 3
        with torch.inference_mode():
            for start in range(0, 60, size):
                found = model(images[start : start + size])
                if not torch.allclose(found, expected[start : start + size], atol=1e-5):
                    wrong.append(start)
                other(torch.rand(size, 1, 32, 32))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_first_calls_of_several_threads_at_once():
    for _ in range(5):
        model = build("lenet1", torch.float32)
        images = images_for(model, 1, torch.float32)
        with torch.no_grad():
            expected = nn.Sequential.forward(model, images)
        barrier, found = threading.Barrier(4), []

        def work(model=model, images=images, barrier=barrier, found=found):
            with torch.inference_mode():
                barrier.wait()
                found.append(model(images))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        for output in found:
            torch.testing.assert_close(output.clone(), expected, rtol=0, atol=1e-5)


def test_bytes_without_rows_leave_nothing_for_floats():
    """Memory that was prepared for one is not for the other."""
    model = build("lenet1", torch.float32)
    images = images_for(model, 32, torch.float32)
    with torch.no_grad():
        expected = nn.Sequential.forward(model, images)
    network = Network.of(model)
    tensors = [tensor.detach() for tensor in network.tensors()]
    definition = torch.ops.lenet_fast.network_define(network.numbers(tuple(images.shape[1:])))
    infer = torch.ops.lenet_fast.network_infer
    infer(definition, tensors, torch.zeros(32, 0, images.shape[-1], dtype=torch.uint8), 1.0, 0.0)
    torch.testing.assert_close(infer(definition, tensors, images, 0.0, 0.0), expected, rtol=0, atol=1e-5)
    torch.ops.lenet_fast.network_release(definition)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_says_the_same(isa):
    run_on(isa, "test_native_forward", "variant_check")


def variant_check():
    for options in VARIANTS:
        for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 1e-3)):
            model = build(**options, dtype=dtype)
            for number in (1, 2):
                assert_as_the_layers(model, images_for(model, number, dtype), atol=atol)


def test_compile_and_export_see_the_layers(calls):
    model = build("lenet5-d2l", torch.float32)
    images = images_for(model, 4, torch.float32)
    with torch.inference_mode():
        expected = model(images)
        compiled = torch.compile(model, backend="eager", fullgraph=True)(images)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-5)
    assert len(calls) == 1


def test_without_the_compiled_library_the_layers_do_it(monkeypatch, calls):
    monkeypatch.setattr(native_forward.backends, "missing_native", lambda: {"cpu": "not built", "cuda": "not built"})
    model = build("lenet5")
    assert_as_the_layers(model, images_for(model), atol=0)
    assert not calls
