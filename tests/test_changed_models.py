"""Whatever of a model changes while it is the same object: inference and training follow, or say what is wrong.

Every change happens behind the back of a model that has been used once, so that what was read of it is known to the
native code; what follows is compared with the plain layers of a copy of the changed model.
"""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import lenet_fast as lf
from lenet_fast import models
from lenet_fast.nn import RBF, FusedConv2d
from lenet_fast.tables import Connections

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}


def build(name):
    torch.manual_seed(0)
    model = models.MODELS[name.removesuffix(" plain")](dtype=torch.float64).eval()
    return model.reference() if name.endswith(" plain") else model


def batch(model, size=5):
    """Images of the dtype that the model has now, and labels of the first five classes."""
    generator = torch.Generator().manual_seed(1)
    side = model.input_spec.size if isinstance(model, models.LeNet) else 28
    images = torch.rand(size, 1, side, side, generator=generator, dtype=torch.float64)
    return images.to(model.c1.weight.dtype), torch.randint(5, (size,), generator=generator)


def plain_twin(model):
    """A copy that computes with PyTorch's own operators, layer by layer."""
    twin = copy.deepcopy(model)
    for layer in twin.modules():
        if isinstance(layer, FusedConv2d | RBF):
            layer.backend = "reference"
    return twin


def outcome(compute):
    """What it returns, or the error."""
    try:
        return compute()
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return error


# --- the changes -----------------------------------------------------------------------------------------------------

CHANGES = {}  # name: model, change, whether training goes on


def change(model="lenet5", trains=True):
    def note(function):
        CHANGES[function.__name__] = model, function, trains
        return function

    return note


def set_data(layer, name, values):
    getattr(layer, name).data = values


@change()
def nothing(model):
    pass


# dtype


@change()
def half(model):
    model.half()


@change()
def bfloat16(model):
    model.to(torch.bfloat16)


@change()
def float32(model):
    model.float()


@change("lenet5-1998")
def float32_with_codes(model):
    model.float()


@change()
def there_and_back(model):
    model.half().double()


@change(trains=False)
def one_layer_half(model):
    model.f6.half()


@change(trains=False)
def one_parameter_half(model):
    set_data(model.f6, "weight", model.f6.weight.data.half())


@change("lenet5-1998", trains=False)
def codes_of_another_dtype(model):
    model.output.codes = model.output.codes.float()


@change("lenet5-1998", trains=False)
def data_of_codes_of_another_dtype(model):
    model.output.codes.data = model.output.codes.data.float()


# device


@change(trains=False)
def meta(model):
    model.to("meta")


@change(trains=False)
def one_parameter_on_meta(model):
    model.c3.weight = nn.Parameter(model.c3.weight.detach().to("meta"))


# values and shapes


@change()
def values_in_place(model):
    with torch.no_grad():
        model.c3.weight.mul_(2)


@change()
def data(model):
    set_data(model.c3, "weight", 2 * model.c3.weight.data)


@change()
def storage_set(model):
    with torch.no_grad():
        model.c3.weight.set_(2 * model.c3.weight.detach())


@change()
def fewer_hidden_features(model):
    set_data(model.f6, "weight", model.f6.weight.data[:80].contiguous())
    set_data(model.f6, "bias", model.f6.bias.data[:80].contiguous())
    set_data(model.output, "weight", model.output.weight.data[:, :80].contiguous())


@change()
def fewer_classes_in_the_same_place(model):
    set_data(model.output, "weight", model.output.weight.data[:5])
    set_data(model.output, "bias", model.output.bias.data[:5])


@change()
def fewer_maps_in_the_same_place(model):
    set_data(model.c1, "weight", model.c1.weight.data[:4])
    set_data(model.c1, "bias", model.c1.bias.data[:4])
    set_data(model.c3, "weight", model.c3.weight.data[:, :4].contiguous())


@change("lenet5-d2l")
def smaller_kernel(model):
    set_data(model.c1, "weight", model.c1.weight.data[:, :, 1:-1, 1:-1].contiguous())
    model.c1.padding = 1


@change("lenet5-d2l", trains=False)
def smaller_kernel_that_does_not_fit(model):
    set_data(model.c3, "weight", model.c3.weight.data[:, :, 1:-1, 1:-1].contiguous())


@change(trains=False)
def same_values_in_another_shape(model):
    set_data(model.f6, "weight", model.f6.weight.data.view(84, 12, 10))


@change(trains=False)
def a_window_as_a_matrix(model):
    set_data(model.c5, "weight", model.c5.weight.data.flatten(1))


@change(trains=False)
def a_matrix_as_a_window(model):
    set_data(model.f6, "weight", model.f6.weight.data.view(84, 120, 1, 1))


@change(trains=False)
def transposed(model):
    set_data(model.output, "weight", model.output.weight.data.t().contiguous())


@change(trains=False)
def bias_too_short(model):
    set_data(model.f6, "bias", model.f6.bias.data[:83])


@change()
def bias_of_all_features(model):
    set_data(model.f6, "bias", model.f6.bias.data[:1])


@change("lenet5-1998")
def fewer_codes(model):
    model.output.codes.data = model.output.codes.data[:7]


@change("lenet5-1998", trains=False)
def codes_of_another_length(model):
    model.output.codes.data = model.output.codes.data[:, :80].contiguous()


@change("lenet5-1998", trains=False)
def coefficients_too_few(model):
    set_data(model.c1, "coefficient", model.c1.coefficient.data[:3])


# strides and memory


@change()
def strides(model):
    set_data(model.f6, "weight", model.f6.weight.data.t().contiguous().t())


@change()
def channels_last(model):
    model.to(memory_format=torch.channels_last)


@change(trains=False)
def expanded(model):
    set_data(model.f6, "bias", model.f6.bias.data[:1].expand(84))


@change("lenet5-1998")
def strided_codes(model):
    model.output.codes.data = model.output.codes.data.t().contiguous().t()


@change()
def shared_memory(model):
    set_data(model.output, "bias", model.f6.bias.data[:10])


@change(trains=False)
def tied(model):
    model.f6.bias = nn.Parameter(model.f6.bias.data[:10].clone().repeat(9)[:84])
    model.output.bias = nn.Parameter(model.f6.bias.data[:10])


@change()
def larger_storage(model):
    model.f6.weight.untyped_storage().resize_(2 * model.f6.weight.untyped_storage().nbytes())


# gradients


@change()
def frozen(model):
    model.c3.weight.requires_grad_(False)


@change()
def frozen_and_thawed(model):
    model.requires_grad_(False)
    model.requires_grad_(True)


@change()
def gradient_hook(model):
    model.f6.weight.register_hook(lambda grad: 2 * grad)


@change()
def accumulation_hook(model):
    model.f6.weight.register_post_accumulate_grad_hook(lambda parameter: None)


# parameters and buffers


@change(trains=False)
def new_parameter(model):
    model.c3.weight = nn.Parameter(2 * model.c3.weight.detach())


@change(trains=False)
def new_parameter_behind_the_back(model):
    model.c3._parameters["weight"] = nn.Parameter(2 * model.c3.weight.detach())


@change()
def swapped(model):
    torch.utils.swap_tensors(model.c3.weight, nn.Parameter(2 * model.c3.weight.detach()))


@change()
def no_bias(model):
    model.f6.bias = None


@change(trains=False)
def assigned_state(model):
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}, assign=True)


@change("lenet5-1998")
def codes_in_place(model):
    model.output.codes.neg_()


@change("lenet5-1998")
def other_codes(model):
    model.output.codes = model.output.codes.flip(0)


@change("lenet5-1998")
def another_table(model):
    table = model.c3.connections
    moved = sorted({(index + 1) % 96 for index in table.indices})
    model.c3.connections = Connections(16, 6, tuple(moved))


@change("lenet5-1998", trains=False)
def a_table_that_does_not_fit(model):
    model.c3.connections = Connections(16, 6, model.c3.connections.indices[:-1])


@change()
def parametrization(model):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(model.f6, "weight", Twice())


@change(trains=False)
def weight_norm(model):
    parametrizations.weight_norm(model.f6)


@change()
@torch.no_grad()
def pruned(model):
    prune.random_unstructured(model.c3, "weight", 0.5)


@change()
def pruned_for_good(model):
    prune.random_unstructured(model.c3, "weight", 0.5)
    prune.remove(model.c3, "weight")


# options of layers


@change("lenet5-d2l")
def activation(model):
    model.c3.activation = "tanh"


@change("lenet5-d2l")
def pool(model):
    model.c3.pool = "max"


@change("lenet5-d2l", trains=False)
def pool_that_does_not_fit(model):
    model.c3.pool = "none"


@change("lenet5-d2l", trains=False)
def padding_that_does_not_fit(model):
    model.c1.padding = 0


@change("lenet5-d2l")
def padding_by_name(model):
    model.c1.padding = "same"


@change("lenet5-d2l", trains=False)
def activation_that_is_none(model):
    model.c3.activation = "gelu"


@change("lenet5-d2l", trains=False)
def pool_that_is_none(model):
    model.c3.pool = "subsample"


@change("lenet5-d2l", trains=False)
def negative_padding(model):
    model.c1.padding = -1


@change("lenet5-d2l", trains=False)
def padding_of_another_type(model):
    model.c1.padding = 2.0


@change()
def sizes_that_are_only_noted(model):
    model.c1.kernel_size = 7
    model.c3.out_channels = model.c3.in_channels = 3
    model.f6.in_features = model.output.out_features = 1


@change("lenet5-1998")
def sizes_of_codes_that_are_only_noted(model):
    model.output.in_features = model.output.num_classes = 3


@change()
def backend(model):
    model.c1.backend = "reference"


@change(trains=False)
def flattening(model):
    model.flatten.start_dim = -2


@change("lenet5-d2l plain")
def padding_of_a_plain_layer(model):
    model.c1.padding = (0, 0)
    set_data(model.c5, "weight", model.c5.weight.data[:, : 16 * 16].contiguous())


@change("lenet5-d2l plain", trains=False)
def stride(model):
    model.c1.stride = (2, 2)


@change("lenet5-d2l plain", trains=False)
def dilation(model):
    model.c3.dilation = (2, 2)


@change("lenet5-d2l plain", trains=False)
def groups(model):
    model.c1.groups = 2


@change("lenet5-d2l plain")
def padding_mode(model):
    model.c1.padding_mode = "reflect"


@change("lenet5-d2l plain", trains=False)
def pool_of_a_plain_layer(model):
    model.s2.kernel_size = 3


@change("lenet5-d2l plain")
def pool_without_padding_counted(model):
    model.s2.padding = 1


# hooks


@change()
def forward_hook(model):
    model.c3.register_forward_hook(lambda layer, inputs, output: 2 * output)


@change()
def forward_pre_hook(model):
    model.c3.register_forward_pre_hook(lambda layer, inputs: (2 * inputs[0],))


@change()
def hooks_in_a_dictionary_of_their_own(model):
    model.c3._forward_hooks = OrderedDict({0: lambda layer, inputs, output: 2 * output})


@change()
def backward_hook(model):
    model.c3.register_full_backward_hook(lambda layer, grad_input, grad_output: None)


@change()
def hook_that_is_gone(model):
    model.c3.register_forward_hook(lambda layer, inputs, output: 2 * output).remove()


@change()
def forward_of_its_own(model):
    model.f6_act.forward = lambda input: 2 * input


# modes and layers


@change()
def training_mode(model):
    model.train()


@change()
def training_mode_of_a_layer(model):
    model.c1.train()


@change()
def layer(model):
    model.f6_act = nn.Tanh()


@change()
def class_of_a_layer(model):
    model.f6_act.__class__ = nn.Sigmoid


@change()
def layer_that_is_none_of_ours(model):
    model.f6_act = nn.GELU()


@change()
def dropout(model):
    model.add_module("drop", nn.Dropout(0.0))


@change()
def layer_taken_out(model):
    del model.f6_act


@change()
def layer_added(model):
    model.add_module("last", nn.Softmax(1))


@change(trains=False)
def layer_twice(model):
    model.f6_act = model.c5


@change("lenet5-d2l")
def another_order(model):
    """Two activations behind a dense layer, none behind the other."""
    for name in ("c5_act", "f6_act", "output"):
        model._modules[name] = model._modules.pop(name)


@change("lenet5-d2l")
def another_order_of_an_ordered_dictionary(model):
    model._modules = OrderedDict(model._modules)
    for name in ("c5_act", "f6_act", "output"):
        model._modules.move_to_end(name)


@change()
def layers_in_another_dictionary(model):
    model._modules = {name: layer for name, layer in model._modules.items() if name != "f6_act"}


@change()
def parameters_in_another_dictionary(model):
    model.f6._parameters = {"weight": model.f6.weight, "bias": None}


@change()
def another_state(model):
    model.c1.__dict__ = {**model.c1.__dict__, "activation": "tanh"}


# --- what follows from them ------------------------------------------------------------------------------------------


def used(name):
    """A model that the native code knows, and its trainer, which has taken a step."""
    model = build(name)
    trainer = lf.FusedTrainer(model, "sgd", lr=0.05)
    images, labels = batch(model)
    trainer.step(images, labels)
    model.eval()
    with torch.inference_mode():
        model(images)
    return model, trainer


@pytest.mark.parametrize("name", CHANGES)
def test_inference_follows(name):
    kind, change, _ = CHANGES[name]
    model, _ = used(kind)
    change(model)
    images, _ = batch(model)
    with torch.inference_mode():
        expected = outcome(lambda: nn.Sequential.forward(plain_twin(model), images))
        for _ in range(2):  # and the second time as the first
            found = outcome(lambda: model(images))
            if isinstance(expected, Exception):
                assert isinstance(found, Exception), f"the layers say: {expected}"
            else:
                assert not isinstance(found, Exception), found
                assert (found.dtype, found.shape, found.device) == (expected.dtype, expected.shape, expected.device)
                atol = TOLERANCE[expected.dtype] * max(1, expected.abs().max().item())
                torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", CHANGES)
def test_training_follows(name):
    """Natively or by autograd."""
    kind, change, goes_on = CHANGES[name]
    model, trainer = used(kind)
    twin = plain_twin(model)  # copied before the change: not all of them are copied
    for changed in (model, twin):
        torch.manual_seed(1)
        change(changed)
    images, labels = batch(model)
    if not goes_on:
        before = copy.deepcopy(model)
        for _ in range(2):
            with pytest.raises((RuntimeError, ValueError, TypeError)) as raised:
                trainer.step(images, labels)
            assert len(str(raised.value)) > 10
        twin = before
    else:
        loss = models.criterion(twin) if isinstance(list(twin.children())[-1], RBF) else nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            expected = loss(nn.Sequential.forward(twin, images), labels)
            expected.backward()
            optimizer.step()
            assert trainer.step(images, labels) == pytest.approx(expected.item(), rel=TOLERANCE[images.dtype])
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert a.shape == b.shape
        if a.device.type != "meta":
            torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[a.dtype] if goes_on else 0)
