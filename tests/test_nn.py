"""Layers: parameters and behaviour of the plain layers that they replace."""

import copy
import pickle

import pytest
import torch

from lenet_fast import nn


def test_parameters_and_initialisation_are_those_of_conv2d():
    torch.manual_seed(3)
    plain = torch.nn.Conv2d(3, 5, 4)
    torch.manual_seed(3)
    fused = nn.ConvActPool2d(3, 5, 4)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(fused.state_dict()[name], value)


@pytest.mark.parametrize("bias", [True, False])
def test_loads_the_state_of_conv2d_and_computes_the_same(bias):
    plain = torch.nn.Conv2d(2, 4, 3, padding=1, bias=bias)
    fused = nn.ConvActPool2d(2, 4, (3, 3), padding=1, bias=bias, activation="relu", pool="max")
    fused.load_state_dict(plain.state_dict(), strict=True)
    input = torch.randn(3, 2, 9, 8)
    torch.testing.assert_close(fused(input), torch.max_pool2d(torch.relu(plain(input)), 2))


def test_dtype_device_copy_and_pickle():
    layer = nn.ConvActPool2d(1, 2, 3, dtype=torch.float64, activation="tanh", pool="none")
    assert layer.weight.dtype == torch.float64
    assert nn.ConvActPool2d(1, 2, 3, device="meta").weight.is_meta
    input = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(input), layer(input))
    assert "activation='tanh', pool='none'" in repr(layer)
    assert layer.to(torch.bfloat16)(input.to(torch.bfloat16)).dtype == torch.bfloat16
