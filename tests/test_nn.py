"""Layers: parameters and behaviour of the plain layers that they replace."""

import copy
import pickle

import pytest
import torch

from lenet_fast import functional, nn
from lenet_fast.tables import DIGIT_BITMAPS, LENET5_C3, Connections


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


def test_lenet5_c3_is_the_table_of_the_paper():
    assert LENET5_C3.shape == (16, 6)
    assert LENET5_C3.sum(1).tolist() == [3] * 6 + [4] * 9 + [6]
    assert LENET5_C3.sum(0).tolist() == [10] * 6
    assert sum(p.numel() for p in nn.SparseConvActPool2d(LENET5_C3, 5).parameters()) == 1_516


def test_connections_are_hashable_and_give_the_table_back():
    connections = Connections.of(LENET5_C3)
    assert len(connections) == 60
    assert hash(connections) == hash(Connections.of(LENET5_C3.clone()))
    assert torch.equal(connections.table(), LENET5_C3)
    assert Connections.of(connections) is connections


@pytest.mark.parametrize(
    ("table", "error"),
    [
        (LENET5_C3.int(), TypeError),
        ([[True]], TypeError),
        (torch.ones(3, dtype=torch.bool), ValueError),
        (torch.ones(0, 2, dtype=torch.bool), ValueError),
    ],
)
def test_a_wrong_table_is_refused(table, error):
    with pytest.raises(error, match="table: "):
        nn.SparseConvActPool2d(table, 3)


def test_sparse_from_and_to_conv2d():
    conv = torch.nn.Conv2d(6, 16, 5, padding=2)
    sparse = nn.SparseConvActPool2d.from_conv2d(conv, LENET5_C3, activation="relu", pool="max")
    masked = conv.weight * LENET5_C3[:, :, None, None]
    assert torch.equal(sparse.dense_weight(), masked)
    back = sparse.to_conv2d()
    assert torch.equal(back.weight, masked)
    assert torch.equal(back.bias, conv.bias)
    input = torch.randn(2, 6, 14, 14)
    torch.testing.assert_close(sparse(input), torch.max_pool2d(torch.relu(back(input)), 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 2}, "stride"),
        ({"dilation": 2}, "dilation"),
        ({"groups": 2}, "groups"),
        ({"padding_mode": "circular"}, "padding_mode"),
        ({"padding": (1, 2)}, "padding"),
    ],
)
def test_sparse_from_an_unsuitable_conv2d_is_refused(options, message):
    with pytest.raises(ValueError, match=f"conv: expected .*{message}"):
        nn.SparseConvActPool2d.from_conv2d(torch.nn.Conv2d(6, 16, 5, **options), LENET5_C3)
    with pytest.raises(ValueError, match=r"table: expected \(16, 5\)"):
        nn.SparseConvActPool2d.from_conv2d(torch.nn.Conv2d(5, 16, 5), LENET5_C3)


def test_a_sparse_map_without_connections_is_the_activated_bias():
    table = torch.tensor([[True, False], [False, False]])
    layer = nn.SparseConvActPool2d(table, 3, activation="tanh", pool="max")
    output = layer(torch.randn(4, 2, 8, 8))
    torch.testing.assert_close(output[:, 1], layer.bias[1].tanh().expand(4, 3, 3))


@pytest.mark.parametrize("table", [None, LENET5_C3])
def test_conv_subsample_starts_as_average_pooling(table):
    layer = nn.ConvSubsample2d(6, 16, 5, table=table)
    torch.nn.init.zeros_(layer.pool_bias)
    plain = functional.conv_act_pool(
        torch.ones(2, 6, 14, 14), layer.dense_weight(), layer.bias, activation="scaled_tanh"
    )
    torch.testing.assert_close(layer(torch.ones(2, 6, 14, 14)), nn.ScaledTanh()(plain))
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "coefficient", "pool_bias"]


def test_scaled_tanh():
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(nn.ScaledTanh()(x), 1.7159 * torch.tanh(2 * x / 3))
    assert abs(float(nn.ScaledTanh()(torch.tensor(1.0))) - 1) < 1e-4  # f(1) = 1, as the paper chose it


def test_rbf_is_the_squared_distance():
    layer = nn.RBF(84, 10)
    assert set(DIGIT_BITMAPS.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(layer.codes, DIGIT_BITMAPS)
    assert not list(layer.parameters())
    x = torch.randn(5, 84, dtype=torch.float64, requires_grad=True)
    codes = DIGIT_BITMAPS.double().requires_grad_()
    torch.testing.assert_close(functional.rbf(x, codes), torch.cdist(x, codes) ** 2)
    assert torch.autograd.gradcheck(functional.rbf, (x[:, :7], codes[:, :7]))
    assert torch.equal(layer(DIGIT_BITMAPS).argmin(1), torch.arange(10))
    assert layer(DIGIT_BITMAPS[3]).shape == (10,)
    assert nn.RBF(6, 3).codes.abs().eq(1).all()
    assert nn.RBF(84, 10, dtype=torch.float64).codes.dtype == torch.float64
    with torch.device("meta"):
        assert nn.RBF(84, 10).codes.is_meta
    with pytest.raises(ValueError, match=r"codes: expected shape \(3, 6\), got \(2, 6\)"):
        nn.RBF(6, 3, torch.ones(2, 6))


def test_map_loss_follows_the_formula_and_survives_large_distances():
    distances = torch.rand(6, 10, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, 9, 1, 1, 5])
    for j in (0.0, 0.5):
        own = distances[range(6), target]
        formula = (own + torch.log(torch.exp(torch.tensor(-j)) + torch.exp(-distances).sum(1))).mean()
        torch.testing.assert_close(functional.map_loss(distances, target, j=j), formula)
        assert torch.autograd.gradcheck(lambda d, j=j: functional.map_loss(d, target, j=j), distances)
    for dtype in (torch.float32, torch.float64):
        huge = torch.full((2, 10), 1e4, dtype=dtype, requires_grad=True)
        loss = nn.MAPLoss(j=700.0)(huge, torch.tensor([1, 2]))
        loss.backward()
        torch.testing.assert_close(loss, torch.tensor(1e4 - 700, dtype=dtype))
        assert huge.grad.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"distances": torch.ones(4)}, ValueError, "target: "),
        ({"target": torch.ones(3, dtype=torch.long)}, ValueError, r"target: .*\(3,\)"),
        ({"target": torch.ones(4)}, TypeError, "target: .*float32"),
        ({"j": -1.0}, ValueError, "j: .*-1.0"),
        ({"j": float("nan")}, ValueError, "j: .*nan"),
    ],
)
def test_map_loss_refuses(changes, error, message):
    arguments = {"distances": torch.ones(4, 10), "target": torch.zeros(4, dtype=torch.long), "j": 0.0} | changes
    with pytest.raises(error, match=message):
        functional.map_loss(**arguments)
