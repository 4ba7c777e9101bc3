"""Bad arguments: each is refused with an error that names the argument and the value, and nothing crashes."""

from importlib.util import find_spec

import pytest
import torch

from lenet_fast import functional, nn

X = torch.zeros(2, 3, 8, 8)
W = torch.zeros(4, 3, 3, 3)
B = torch.zeros(4)


BAD = {
    "rank": ({"input": torch.zeros(3, 8)}, ValueError, r"input: .*\(3, 8\)"),
    "channels": ({"input": torch.zeros(2, 5, 8, 8)}, ValueError, r"input: expected 3 channels .* got 5"),
    "weight rank": ({"weight": torch.zeros(4, 27)}, ValueError, r"weight: .*\(4, 27\)"),
    "weight not square": ({"weight": torch.zeros(4, 3, 3, 2)}, ValueError, r"weight: .*\(4, 3, 3, 2\)"),
    "no output channels": ({"weight": torch.zeros(0, 3, 3, 3)}, ValueError, r"weight: .*\(0, 3, 3, 3\)"),
    "bias shape": ({"bias": torch.zeros(5)}, ValueError, r"bias: .*\(4,\).* got \(5,\)"),
    "dtype mix": ({"weight": W.double()}, TypeError, r"weight: .*float32, got torch.float64"),
    "bias dtype": ({"bias": B.half()}, TypeError, r"bias: .*float16"),
    "integers": ({"input": X.int()}, TypeError, r"input: .*int32"),
    "complex": ({"input": X.to(torch.complex64)}, TypeError, r"input: .*complex64"),
    "all integers": ({"input": X.long(), "weight": W.long(), "bias": B.long()}, TypeError, r"input: .*int64"),
    "not a tensor": ({"input": [[1.0]]}, TypeError, r"input: expected a Tensor, got list"),
    "weight none": ({"weight": None}, TypeError, r"weight: expected a Tensor, got NoneType"),
    "sparse": ({"input": X.to_sparse()}, TypeError, r"input: .*sparse"),
    "device mix": ({"weight": W.to("meta")}, ValueError, r"weight: .*cpu, got meta"),
    "kernel too large": ({"weight": torch.zeros(4, 3, 9, 9)}, ValueError, r"weight: kernel size 9 .*height 8"),
    "nothing to pool": ({"weight": torch.zeros(4, 3, 8, 8)}, ValueError, r"pool: 'avg'"),
    "negative padding": ({"padding": -1}, ValueError, r"padding: .*-1"),
    "absurd padding": ({"padding": 10**30}, ValueError, r"padding: .*10{30}"),
    "padding name": ({"padding": "full"}, ValueError, r"padding: .*'full'"),
    "padding type": ({"padding": 1.5}, TypeError, r"padding: .*1.5"),
    "padding pair": ({"padding": (1, 1)}, TypeError, r"padding: .*\(1, 1\)"),
    "activation": ({"activation": "gelu"}, ValueError, r"activation: .*'gelu'"),
    "activation type": ({"activation": torch.nn.ReLU()}, ValueError, r"activation: .*ReLU"),
    "pool": ({"pool": "median"}, ValueError, r"pool: .*'median'"),
    "backend": ({"backend": "cudnn"}, ValueError, r"backend: .*'cudnn'"),
    "missing backend": ({"backend": "triton"}, RuntimeError, r"backend: 'triton' cannot run here: "),
}


@pytest.mark.parametrize(("given", "missing"), [(4, 5), (5, 4)])
def test_half_a_subsampling_is_refused(given, missing):
    arguments = [X, W, B, None, None, None, 4, 0, "tanh", "none"]
    arguments[given - 1] = B
    name = ("coefficient", "pool_bias")[missing - 4]
    with pytest.raises(RuntimeError, match=f"{name}: expected beside"):
        torch.ops.lenet_fast._conv_recording(*arguments)


@pytest.mark.parametrize(("changes", "exception", "message"), BAD.values(), ids=BAD)
def test_functional_refuses(changes, exception, message):
    arguments = {"input": X, "weight": W, "bias": B} | changes
    with pytest.raises(exception, match=message):
        functional.conv_act_pool(**arguments)


RAW_BAD = {
    "rank": (torch.zeros(3, 8), W, B, 0, "relu", "avg"),
    "channels": (torch.zeros(2, 5, 8, 8), W, B, 0, "relu", "avg"),
    "weight": (X, torch.zeros(4, 27), B, 0, "relu", "avg"),
    "empty weight": (X, torch.zeros(4, 3, 0, 0), B, 0, "relu", "avg"),
    "bias": (X, W, torch.zeros(3), 0, "relu", "avg"),
    "integers": (X.int(), W.int(), B.int(), 0, "relu", "avg"),
    "dtype mix": (X, W.double(), B, 0, "relu", "avg"),
    "kernel": (X, torch.zeros(4, 3, 9, 9), B, 0, "relu", "avg"),
    "padding": (X, W, B, -3, "relu", "avg"),
    "huge padding": (X, W, B, 2**40, "relu", "avg"),
    "activation": (X, W, B, 0, "gelu", "avg"),
    "pool": (X, W, B, 0, "relu", "median"),
}


raw_operator = pytest.mark.parametrize(
    "suffix",
    [
        pytest.param("", id="dispatched"),
        pytest.param(
            "_triton",
            marks=pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed"),
        ),
    ],
)


def raw(name):
    return getattr(torch.ops.lenet_fast, name)


@raw_operator
@pytest.mark.parametrize("arguments", RAW_BAD.values(), ids=RAW_BAD)
def test_raw_operators_refuse(arguments, suffix):
    with pytest.raises(RuntimeError):
        raw(f"conv_act_pool{suffix}")(*arguments)
    with pytest.raises(RuntimeError):
        raw(f"conv_act_pool{suffix}_backward")(torch.zeros(2, 4, 3, 3), *arguments, True, True, True)


def test_images_too_large_for_the_workspace_is_refused():
    images = torch.zeros(1).expand(128, 3, 9000, 9000)
    with pytest.raises(RuntimeError, match=r"input: shape \(128, 3, 9000, 9000\) .*backend='reference'"):
        functional.conv_act_pool(images, W, backend="native")


@raw_operator
@pytest.mark.parametrize("out_channels", [-7, -1, 0, 1, 3])
def test_raw_sparse_operator_refuses_a_wrong_number_of_output_channels(out_channels, suffix):
    for weight in (W, W.flatten(0, 1)):
        with pytest.raises(RuntimeError):
            raw(f"sparse_conv_act_pool{suffix}")(X, weight, B, range(12), out_channels, 0, "relu", "avg")


@raw_operator
@pytest.mark.parametrize("indices", [(0, 0), (3, 1), (-1, 2), (2, 12)])
def test_raw_sparse_operator_refuses_wrong_connections(indices, suffix):
    with pytest.raises(RuntimeError, match="connections: "):
        raw(f"sparse_conv_act_pool{suffix}")(X, W.flatten(0, 1)[:2], B, indices, 4, 0, "relu", "avg")


@raw_operator
@pytest.mark.parametrize("meta", range(3))
def test_raw_operator_refuses_a_meta_tensor_among_real_ones(meta, suffix):
    tensors = [t.to("meta") if i == meta else t for i, t in enumerate((X, W, B))]
    with pytest.raises(RuntimeError, match="device"):
        raw(f"conv_act_pool{suffix}")(*tensors, 0, "relu", "avg")


@raw_operator
@pytest.mark.parametrize("shape", [(2, 4, 3, 2), (1, 4, 3, 3), (2, 4, 9)])
def test_raw_backward_refuses_a_wrong_gradient(shape, suffix):
    options = (0, "relu", "avg", True, True, True)
    with pytest.raises(RuntimeError, match="grad_output"):
        raw(f"conv_act_pool{suffix}_backward")(torch.zeros(shape), X, W, B, *options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 0}, "in_channels: .*0"),
        ({"out_channels": -2}, "out_channels: .*-2"),
        ({"kernel_size": 0}, "kernel_size: .*0"),
        ({"kernel_size": (3, 5)}, r"kernel_size: .*\(3, 5\)"),
        ({"padding": -1}, "padding: .*-1"),
        ({"padding": "full"}, "padding: .*'full'"),
        ({"activation": "swish"}, "activation: .*'swish'"),
        ({"pool": "sum"}, "pool: .*'sum'"),
    ],
)
def test_layer_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        nn.ConvActPool2d(**({"in_channels": 1, "out_channels": 2, "kernel_size": 3} | changes))
