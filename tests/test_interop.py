"""Weights to and from Flax: against real Flax where that is installed, and the rules of matching without it."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lenet_fast import models
from lenet_fast.accelerate import accelerate
from lenet_fast.interop import from_flax, to_flax
from lenet_fast.nn import ConvActPool2d
from lenet_fast.tables import LENET5_C3

# ---- Flax networks, as tutorials write them. Each function gives two: images -> the tree's shapes, and
# tree, images -> output.


def linen_network(network):
    def shapes(images):
        import jax

        return jax.eval_shape(network.init, jax.random.key(0), images)["params"]

    return shapes, lambda tree, images: network.apply({"params": tree}, images)


def nnx_network(make):
    from flax import nnx

    network = nnx.eval_shape(make)  # without its slow initialisation

    def run(tree, images):
        nnx.update(network, tree)
        return network(images)

    return lambda images: nnx.state(network, nnx.Param), run


def linen_tutorial():
    """Flax's MNIST tutorial, before nnx."""
    from flax import linen

    class CNN(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Conv(features=32, kernel_size=(3, 3))(x)
            x = linen.relu(x)
            x = linen.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
            x = linen.Conv(features=64, kernel_size=(3, 3))(x)
            x = linen.relu(x)
            x = linen.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
            x = x.reshape((x.shape[0], -1))
            x = linen.Dense(features=256)(x)
            x = linen.relu(x)
            return linen.Dense(features=10)(x)

    return linen_network(CNN())


def nnx_tutorial():
    """Flax's MNIST tutorial."""
    from flax import nnx

    class CNN(nnx.Module):
        def __init__(self, *, rngs):
            self.conv1 = nnx.Conv(1, 32, kernel_size=(3, 3), rngs=rngs)
            self.dropout1 = nnx.Dropout(rate=0.025, deterministic=True)
            self.conv2 = nnx.Conv(32, 64, kernel_size=(3, 3), rngs=rngs)
            self.avg_pool = partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
            self.linear1 = nnx.Linear(3136, 256, rngs=rngs)
            self.linear2 = nnx.Linear(256, 10, rngs=rngs)

        def __call__(self, x):
            x = self.avg_pool(nnx.relu(self.dropout1(self.conv1(x))))
            x = self.avg_pool(nnx.relu(self.conv2(x)))
            x = x.reshape(x.shape[0], -1)
            x = nnx.relu(self.linear1(x))
            return self.linear2(x)

    return nnx_network(lambda: CNN(rngs=nnx.Rngs(0)))


def linen_d2l():
    """The LeNet of "Dive into Deep Learning", JAX edition, section 7.6; its layers end up as layers_0 to layers_11."""
    from flax import linen

    return linen_network(
        linen.Sequential(
            [
                linen.Conv(features=6, kernel_size=(5, 5), padding="SAME"),
                linen.sigmoid,
                lambda x: linen.avg_pool(x, window_shape=(2, 2), strides=(2, 2)),
                linen.Conv(features=16, kernel_size=(5, 5), padding="VALID"),
                linen.sigmoid,
                lambda x: linen.avg_pool(x, window_shape=(2, 2), strides=(2, 2)),
                lambda x: x.reshape((x.shape[0], -1)),
                linen.Dense(features=120),
                linen.sigmoid,
                linen.Dense(features=84),
                linen.sigmoid,
                linen.Dense(features=10),
            ]
        )
    )


def nnx_d2l():
    """The same with the paper's layer names, and C5 as a 5x5 convolution."""
    from flax import nnx

    class LeNet(nnx.Module):
        def __init__(self, *, rngs):
            self.c1 = nnx.Conv(1, 6, (5, 5), padding="SAME", rngs=rngs)
            self.c3 = nnx.Conv(6, 16, (5, 5), padding="VALID", rngs=rngs)
            self.c5 = nnx.Conv(16, 120, (5, 5), padding="VALID", rngs=rngs)
            self.f6 = nnx.Linear(120, 84, rngs=rngs)
            self.output = nnx.Linear(84, 10, rngs=rngs)

        def __call__(self, x):
            x = nnx.avg_pool(nnx.sigmoid(self.c1(x)), (2, 2), strides=(2, 2))
            x = nnx.avg_pool(nnx.sigmoid(self.c3(x)), (2, 2), strides=(2, 2))
            x = nnx.sigmoid(self.c5(x)).reshape(x.shape[0], -1)
            return self.output(nnx.sigmoid(self.f6(x)))

    return nnx_network(lambda: LeNet(rngs=nnx.Rngs(0)))


def linen_lenet5(*, c5):
    from flax import linen

    class LeNet5(linen.Module):
        @linen.compact
        def __call__(self, x):
            for features in (6, 16):
                x = linen.relu(linen.Conv(features, (5, 5), padding="VALID")(x))
                x = linen.max_pool(x, (2, 2), strides=(2, 2))
            if c5 == "conv":
                x = linen.relu(linen.Conv(120, (5, 5), padding="VALID")(x)).reshape(x.shape[0], -1)
            else:
                x = linen.relu(linen.Dense(120)(x.reshape(x.shape[0], -1)))
            x = linen.relu(linen.Dense(84)(x))
            return linen.Dense(10)(x)

    return linen_network(LeNet5())


def nnx_lenet5():
    """In nnx.Sequential, whose tree has integer keys."""
    from flax import nnx

    pool = partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))

    def make():
        rngs = nnx.Rngs(0)
        return nnx.Sequential(
            *(nnx.Conv(1, 6, (5, 5), padding="VALID", rngs=rngs), nnx.relu, pool),
            *(nnx.Conv(6, 16, (5, 5), padding="VALID", rngs=rngs), nnx.relu, pool),
            *(lambda x: x.reshape(x.shape[0], -1), nnx.Linear(400, 120, rngs=rngs), nnx.relu),
            *(nnx.Linear(120, 84, rngs=rngs), nnx.relu, nnx.Linear(84, 10, rngs=rngs)),
        )

    return nnx_network(make)


def linen_lenet1():
    """With named layers, set up beforehand."""
    from flax import linen

    class LeNet1(linen.Module):
        def setup(self):
            self.features1 = linen.Conv(4, (5, 5), padding="VALID")
            self.features2 = linen.Conv(12, (5, 5), padding="VALID")
            self.classifier = linen.Dense(10)

        def __call__(self, x):
            x = linen.avg_pool(linen.tanh(self.features1(x)), (2, 2), strides=(2, 2))
            x = linen.avg_pool(linen.tanh(self.features2(x)), (2, 2), strides=(2, 2))
            return self.classifier(x.reshape(x.shape[0], -1))

    return linen_network(LeNet1())


def tutorial_cnn():
    """Flax's MNIST tutorial in our layers."""
    return nn.Sequential(
        ConvActPool2d(1, 32, 3, padding="same", activation="relu", pool="avg"),
        ConvActPool2d(32, 64, 3, padding="same", activation="relu", pool="avg"),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def plain_tutorial_cnn():
    """Flax's MNIST tutorial in PyTorch's layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding="same"), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding="same"), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 7 * 7, 256), nn.ReLU(), nn.Linear(256, 10)),
    )


PAIRS = {
    "tutorial-linen": (linen_tutorial, tutorial_cnn, 28),
    "tutorial-linen-plain": (linen_tutorial, plain_tutorial_cnn, 28),
    "tutorial-nnx": (nnx_tutorial, tutorial_cnn, 28),
    "d2l-linen-sequential": (linen_d2l, models.lenet5_d2l, 28),
    "d2l-nnx-c5-convolution": (nnx_d2l, models.lenet5_d2l, 28),
    "lenet5-linen": (partial(linen_lenet5, c5="conv"), models.lenet5, 32),
    "lenet5-linen-c5-dense": (partial(linen_lenet5, c5="dense"), models.lenet5, 32),
    "lenet5-nnx-sequential-c5-dense": (nnx_lenet5, models.lenet5, 32),
    "lenet1-linen": (linen_lenet1, models.lenet1, 28),
    "lenet5-linen-reference": (partial(linen_lenet5, c5="conv"), lambda: models.lenet5().reference(), 32),
    "lenet5-linen-accelerated": (
        partial(linen_lenet5, c5="conv"),
        lambda: accelerate(models.lenet5().reference()),
        32,
    ),
}


@pytest.fixture(scope="module")
def needs_flax():
    pytest.importorskip("flax", reason="Flax is not installed (requirements-interop.txt)")
    import jax

    jax.config.update("jax_platforms", "cpu")


@pytest.fixture(scope="module", params=PAIRS)
def pair(request, needs_flax):
    """A Flax network, our model of it, the network's tree, and images, NHWC."""
    make_network, make_model, size = PAIRS[request.param]
    shapes, run = make_network()
    images = np.random.default_rng(0).normal(size=(3, size, size, 1)).astype(np.float32)
    return shapes(images), run, make_model(), images


def random_tree(shapes, seed=1):
    """A tree of these shapes whose every value matters: Flax itself starts with biases of 0."""
    rng = np.random.default_rng(seed)

    def leaf(name, shape):
        scale = 0.5 if name == "bias" else 2 / np.sqrt(np.prod(shape[:-1]))
        return rng.normal(scale=scale, size=shape).astype(np.float32)

    def branch(tree):
        return {k: branch(v) if hasattr(v, "items") else leaf(k, v.shape) for k, v in tree.items()}

    return branch(shapes)


def flatten(tree, path=()):
    if not hasattr(tree, "items"):
        return {path: tree}
    return {leaf: value for key, branch in tree.items() for leaf, value in flatten(branch, (*path, key)).items()}


def assert_same_tree(tree, expected):
    """Bit for bit."""
    tree, expected = flatten(tree), flatten(expected)
    assert tree.keys() == expected.keys()
    for path, array in tree.items():
        assert type(array) is np.ndarray
        np.testing.assert_array_equal(array, expected[path], strict=True)


def run_model(model, images):
    with torch.no_grad():
        return model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


def assert_agree(ours, flax):
    """To float32 rounding: a few hundred products a unit, five layers."""
    flax = np.asarray(flax)
    assert np.ptp(flax, axis=0).min() > 1e-3  # the output depends on the image
    np.testing.assert_allclose(ours, flax, rtol=0, atol=2e-6 * np.abs(flax).max())


def test_flax_to_ours(pair):
    shapes, run, model, images = pair
    tree = random_tree(shapes)
    from_flax(tree, model)
    assert_agree(run_model(model, images), run(tree, images))
    assert_same_tree(to_flax(model, tree), tree)


def test_ours_to_flax(pair):
    shapes, run, model, images = pair
    from_flax(random_tree(shapes, seed=2), model)  # for biases that matter; where they lie the other test tells
    tree = to_flax(model, shapes)
    assert_agree(run_model(model, images), run(tree, images))


@pytest.mark.usefixtures("needs_flax")
def test_real_flax_arrays_load():
    """What Flax itself hands out, not only mappings of NumPy arrays."""
    import jax
    from flax import linen, nnx
    from flax.core import freeze

    model, network = nn.Linear(3, 2), linen.Dense(2, param_dtype="bfloat16")
    variables = network.init(jax.random.key(0), np.zeros((1, 3), np.float32))
    kernel = np.asarray(variables["params"]["kernel"]).astype(np.float32)
    for tree in (variables, freeze(variables)):
        from_flax({"params": {"Dense_0": tree["params"]}}, model)
        np.testing.assert_array_equal(model.weight.detach().numpy(), kernel.T)

    network = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    from_flax({"linear1": nnx.state(network)}, model)
    np.testing.assert_array_equal(model.weight.detach().numpy(), np.asarray(network.kernel[...]).T)


@pytest.mark.usefixtures("needs_flax")
def test_random_state_of_nnx_is_refused_with_a_hint():
    from flax import nnx

    network = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"got (count, key|key, count) in layers/1/rngs .*nnx.Param"):
        from_flax(nnx.state(network), nn.Linear(3, 2))
    from_flax(nnx.state(network, nnx.Param), nn.Linear(3, 2))


# ---- Without Flax


def dense(inputs, outputs, value=0.0):
    return {
        "kernel": np.full((inputs, outputs), value, np.float32),
        "bias": np.full(outputs, value, np.float32),
    }


def test_first_dense_layer_takes_its_rows_in_flax_order():
    height, width, maps = 3, 4, 2
    model = nn.Sequential(nn.Conv2d(1, maps, 1), nn.Flatten(), nn.Linear(maps * height * width, 1), nn.Linear(1, 1))
    tree = to_flax(model)
    assert list(tree) == ["Conv_0", "Dense_0", "Dense_1"]
    numbers = np.arange(height * width * maps, dtype=np.float32)
    tree["Dense_0"]["kernel"] = numbers[:, None]
    from_flax(tree, model)
    expected = numbers.reshape(height, width, maps).transpose(2, 0, 1)
    np.testing.assert_array_equal(model[2].weight.detach().numpy().reshape(maps, height, width), expected)


def test_kernels_become_hwio():
    conv = nn.Conv2d(2, 3, (4, 5))
    tree = to_flax(conv, "nnx")
    assert list(tree) == ["conv1"]
    assert tree["conv1"]["kernel"].shape == (4, 5, 2, 3)
    assert tree["conv1"]["kernel"][3, 1, 0, 2] == conv.weight[2, 0, 3, 1].item()
    np.testing.assert_array_equal(tree["conv1"]["bias"], conv.bias.detach().numpy())


@pytest.mark.parametrize("like", ["linen", "nnx"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [models.lenet1, models.lenet5, models.lenet5_d2l])
def test_round_trip_is_bit_exact(make, dtype, like):
    model, other = make(dtype=dtype), make(dtype=dtype)
    parameters = [p.data_ptr() for p in other.parameters()]
    tree = to_flax(model, like)
    assert all(
        array.dtype == (np.float32 if dtype is torch.bfloat16 else model.output.weight.detach().numpy().dtype)
        for array in flatten(tree).values()
    )
    from_flax(tree, other)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    assert [p.data_ptr() for p in other.parameters()] == parameters  # in place: an optimizer's references stay good


def test_tree_is_a_copy():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Linear(1, 1))  # sizes at which every transpose is a view
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for array in flatten(to_flax(model)).values():
        array += 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_without_bias():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Flatten(), nn.Linear(8, 2, bias=False))
    tree = to_flax(model)
    assert all(list(layer) == ["kernel"] for layer in tree.values())
    tree["Dense_0"]["bias"] = tree["Dropout_0"] = None  # no leaf, in JAX
    from_flax(tree, model)


def test_convolutions_come_first_whatever_their_names():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(2, 2))
    conv, classifier = to_flax(model).values()
    from_flax({"classifier": classifier, "features": conv}, model)


def test_numbers_in_names_count_as_numbers():
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(11)))
    from_flax({f"Dense_{i}": dense(1, 1, i) for i in (10, *range(10))}, model)
    assert [layer.bias.item() for layer in model] == list(range(11))


def test_order_that_names_leave_open_is_refused():
    tree, model = {"hidden": dense(2, 2, 1), "again": dense(2, 2, 2)}, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"names: needed, as again and hidden of the tree .*\(2, 2\)"):
        from_flax(tree, model)
    from_flax(tree, model, names={"0": "hidden", "1": "again"})
    assert [layer.bias[0].item() for layer in model] == [1, 2]
    assert_same_tree(to_flax(model, tree, names={"0": "hidden", "1": "again"}), tree)


def test_layers_of_the_same_name_belong_together():
    model = nn.Sequential()
    model.add_module("hidden", nn.Linear(2, 2))
    model.add_module("again", nn.Linear(2, 2))
    from_flax({"again": dense(2, 2, 2), "hidden": dense(2, 2, 1)}, model)
    assert [layer.bias[0].item() for layer in model] == [1, 2]


def test_nested_trees_and_names_in_them():
    tree = {"params": {"encoder": {"dense": dense(3, 2, 1)}, "decoder": {"dense": dense(2, 3, 2)}}}
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"for 0, got \(2, 3\) in decoder/dense .*pass names="):
        from_flax(tree, model)
    names = {"0": "encoder/dense", "1": "decoder/dense"}
    from_flax(tree, model, names=names)
    assert_same_tree(to_flax(model, tree, names=names), tree)


def lenet_tree(**changes):
    """The weights of a lenet5, some layers replaced or, where None, left out."""
    tree = to_flax(models.lenet5()) | changes
    return {name: layer for name, layer in tree.items() if layer is not None}


@pytest.mark.parametrize(
    ("tree", "names", "message"),
    [
        (lenet_tree(Conv_2=None), None, r"tree: expected 5 layers, for c1, c3, c5, f6, output; got 4: Conv_0, .*"),
        ({}, None, "tree: expected 5 layers, .*; got 0: none"),
        (lenet_tree(Dense_1=dense(84, 11)), None, r"shape \(84, 10\) for output, got \(84, 11\) in Dense_1"),
        (
            lenet_tree(Conv_0={"kernel": np.zeros((6, 1, 5, 5))}),
            None,
            r"shape \(5, 5, 1, 6\) for c1, got \(6, 1, 5, 5\)",
        ),
        (lenet_tree(Conv_2=dense(401, 120)), None, r"shape \(5, 5, 16, 120\) for c5, got \(401, 120\)"),
        (
            lenet_tree(Dense_0={"kernel": np.zeros((120, 84))}),
            None,
            r"a bias of shape \(84,\) for f6, got none in Dense_0",
        ),
        (
            lenet_tree(Dense_0={"kernel": np.zeros((120, 84)), "bias": np.zeros(())}),
            None,
            r"a bias of shape \(84,\) for f6, got \(\) in Dense_0",
        ),
        (
            lenet_tree(Norm={"scale": np.ones(84), "bias": np.ones(84)}),
            None,
            "kernel and bias only, got scale, bias in Norm",
        ),
        (lenet_tree(epoch=np.zeros(1)), None, "kernel and bias only, got epoch in the tree itself"),
        (
            lenet_tree(),
            {"c1": "Conv_0"},
            r"names: expected each of c1, c3, .* with one of Conv_0, .*; got \{'c1': 'Conv_0'\}",
        ),
        (
            lenet_tree(),
            dict.fromkeys(["c1", "c3", "c5", "f6", "output"], "Conv_0"),
            "names: expected each of c1, c3, c5, f6, output with one of",
        ),
    ],
)
def test_trees_that_do_not_fit(tree, names, message):
    with pytest.raises(ValueError, match=message):
        from_flax(tree, models.lenet5(), names=names)


@pytest.mark.parametrize("bad", [np.zeros((84, 10), np.int32), np.zeros((84, 10), complex), np.full((84, 10), None)])
def test_bad_arrays_are_refused_before_anything_is_written(bad):
    model = models.lenet5()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tree = lenet_tree(Dense_1={"kernel": bad, "bias": np.zeros(10)})  # the last of the layers
    with pytest.raises(
        TypeError, match=f"tree: expected a floating-point array as Dense_1/kernel, got dtype {bad.dtype}"
    ):
        from_flax(tree, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_no_tree_at_all():
    with pytest.raises(TypeError, match="tree: expected a nested mapping of arrays, got list"):
        from_flax([1, 2], models.lenet5())
    with pytest.raises(ValueError, match="like: expected a tree or one of linen, nnx; got 'keras'"):
        to_flax(models.lenet5(), "keras")
    with pytest.raises(ValueError, match="names: expected None with like='nnx'"):
        to_flax(models.lenet5(), "nnx", names={"c1": "conv1"})


def tied():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), r"got weight, bias, .* of 1 \(BatchNorm2d\)"),
        (nn.Sequential(nn.BatchNorm2d(2, affine=False)), "got running_mean, .* of 0 "),
        (models.lenet5_1998(), r"got weight, bias, coefficient, pool_bias.* of c1 \(ConvSubsample2d\)"),
        (models.lenet5(connections=LENET5_C3), r"of c3 \(SparseConvActPool2d\)"),
        (nn.ConvTranspose2d(1, 2, 3), r"got weight, bias of the model itself \(ConvTranspose2d\)"),
        (nn.Sequential(nn.Conv2d(1, 3, 3), nn.Linear(10, 2)), "1 follows the 3 maps of 0: .* a multiple of 3, got 10"),
        (nn.utils.spectral_norm(nn.Linear(2, 2)), r"got bias, weight_orig, .* of the model itself \(Linear\)"),
        (
            nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
            r"got bias of the model itself \(ParametrizedLinear\)",
        ),
        (tied(), "parameters of its own, got some shared between layers"),
    ],
)
def test_models_without_counterpart(model, message):
    with pytest.raises(ValueError, match=message):
        to_flax(model)
