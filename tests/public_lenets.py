"""LeNets as people publish them, written anew from descriptions: what `accelerate` fuses, and how they are trained.

Every class is spelled as its model's authors spell theirs, habits included: `x.view(-1, 320)`, `Variable`, layers that
forward makes anew, dropout that is never switched off. None is a copy. `LENETS` has them by name.
"""

import math
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function, Variable
from torch.nn.utils import prune


@dataclass(frozen=True)
class PublicLeNet:
    """A published architecture and what is expected of it; `build`'s docstring names what it is modelled on."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (1, 28, 28)  # of an image
    classes: int = 10
    fused: tuple[int, int] = (2, 2)  # fused operators of one forward, in training and in evaluation mode
    unfused: str = ""  # why there are none of them
    autograd: str = ""  # why a training step needs autograd; empty: the whole step is native
    scores: Callable[[Any], torch.Tensor] | None = None  # from what the forward returns; None: it returns the scores
    images: int = 1  # arguments of the forward that are images
    others: tuple[Any, ...] = ()  # arguments behind these

    @property
    def origin(self) -> str:
        return self.build.__doc__

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The same parameters at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build().to(dtype)

    def inputs(self, batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        """The arguments of a forward: the same images at every call, and the others."""
        generator = torch.Generator().manual_seed(1)
        images = [torch.rand(batch, *self.shape, generator=generator).to(dtype) for _ in range(self.images)]
        return (*images, *self.others)

    def labels(self, batch: int = 3) -> torch.Tensor:
        return torch.randint(self.classes, (batch,), generator=torch.Generator().manual_seed(2))

    def trainable(self, model: nn.Module) -> nn.Module:
        """`model`, or around it a module that returns its scores alone, so that cross-entropy can take them."""
        return model if self.scores is None else Scores(model, self.scores)


class Scores(nn.Module):
    """A model that returns more than scores, reduced to these: what its users write to train it with cross-entropy."""

    def __init__(self, model, scores):
        super().__init__()
        self.model = model
        self.scores = scores

    def forward(self, x):
        return self.scores(self.model(x))


LENETS: dict[str, PublicLeNet] = {}


def lenet(name: str, **expected: Any) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Put the class or function below under this name into `LENETS`."""

    def register(build):
        assert name not in LENETS
        LENETS[name] = PublicLeNet(build, **expected)
        return build

    return register


def first(output):
    return output[0]


def first_of_some(output):
    return output[0] if isinstance(output, tuple) else output


def second(output):
    return output[1]


def logits(output):
    return output["logits"]


# --- PyTorch's own examples and tutorials ----------------------------------------------------------------------------


@lenet("examples-mnist-2017", fused=(1, 2))
class ExamplesMnist2017(nn.Module):
    """PyTorch examples, MNIST and its Hogwild variant until 2018: whole maps dropped before the second pooling."""

    def __init__(self):
        super(ExamplesMnist2017, self).__init__()  # noqa: UP008 (as written then)
        self.conv1 = nn.Conv2d(1, 10, kernel_size=5)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=5)
        self.conv2_drop = nn.Dropout2d()
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2_drop(self.conv2(x)), 2))
        x = x.view(-1, 320)
        x = F.relu(self.fc1(x))
        x = F.dropout(x, training=self.training)
        x = self.fc2(x)
        return F.log_softmax(x, dim=1)


@lenet("examples-mnist-2019")
class ExamplesMnist2019(nn.Module):
    """PyTorch examples, MNIST in 2019, and PySyft's tutorials: Caffe's 20-50-500 with a ReLU everywhere."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5, 1)
        self.conv2 = nn.Conv2d(20, 50, 5, 1)
        self.fc1 = nn.Linear(4 * 4 * 50, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(x, 2, 2)
        x = F.relu(self.conv2(x))
        x = F.max_pool2d(x, 2, 2)
        x = x.view(-1, 4 * 4 * 50)
        x = F.relu(self.fc1(x))
        x = self.fc2(x)
        return F.log_softmax(x, dim=1)


@lenet("examples-mnist-2020", fused=(1, 1))
class ExamplesMnist2020(nn.Module):
    """PyTorch examples, MNIST today: two 3x3 convolutions, one pooling, two dropout layers."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = self.conv1(x)
        x = F.relu(x)
        x = self.conv2(x)
        x = F.relu(x)
        x = F.max_pool2d(x, 2)
        x = self.dropout1(x)
        x = torch.flatten(x, 1)
        x = self.fc1(x)
        x = F.relu(x)
        x = self.dropout2(x)
        x = self.fc2(x)
        output = F.log_softmax(x, dim=1)
        return output


@lenet("tutorial-cifar", shape=(3, 32, 32))
class TutorialCifar(nn.Module):
    """PyTorch's CIFAR-10 tutorial: LeNet-5 on colours."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


@lenet("tutorial-networks-3x3", shape=(1, 32, 32))
class TutorialNetworks(nn.Module):
    """PyTorch's first tutorial on networks for some years: 3x3 kernels, features counted in a loop."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3)
        self.conv2 = nn.Conv2d(6, 16, 3)
        self.fc1 = nn.Linear(16 * 6 * 6, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, self.num_flat_features(x))
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        x = self.fc3(x)
        return x

    def num_flat_features(self, x):
        size = x.size()[1:]
        num_features = 1
        for s in size:
            num_features *= s
        return num_features


@lenet("tutorial-pruning", shape=(1, 32, 32))
class TutorialPruning(nn.Module):
    """PyTorch's pruning tutorial, before anything is pruned: features counted as elements by images."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, int(x.nelement() / x.shape[0]))
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        x = self.fc3(x)
        return x


@lenet("tutorial-pruned", shape=(1, 32, 32), autograd="weights that masks make anew in every step")
def tutorial_pruned():
    """The same tutorial's network afterwards: a third of each convolution's weights masked."""
    model = TutorialPruning()
    for layer in (model.conv1, model.conv2):
        prune.l1_unstructured(layer, "weight", 0.3)
    return model


@lenet("tutorial-spatial-transformer", fused=(3, 4), autograd="grid_sample")
class SpatialTransformer(nn.Module):
    """PyTorch's tutorial on spatial transformers: a small LeNet moves the digit before another reads it."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, kernel_size=5)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=5)
        self.conv2_drop = nn.Dropout2d()
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, 10)
        self.localization = nn.Sequential(
            nn.Conv2d(1, 8, kernel_size=7), nn.MaxPool2d(2, stride=2), nn.ReLU(True),
            nn.Conv2d(8, 10, kernel_size=5), nn.MaxPool2d(2, stride=2), nn.ReLU(True),
        )  # fmt: skip
        self.fc_loc = nn.Sequential(nn.Linear(10 * 3 * 3, 32), nn.ReLU(True), nn.Linear(32, 3 * 2))
        self.fc_loc[2].weight.data.mul_(0.1)
        self.fc_loc[2].bias.data.copy_(torch.tensor([1, 0, 0, 0, 1, 0], dtype=torch.float))

    def stn(self, x):
        xs = self.localization(x)
        xs = xs.view(-1, 10 * 3 * 3)
        theta = self.fc_loc(xs)
        theta = theta.view(-1, 2, 3)
        grid = F.affine_grid(theta, x.size(), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    def forward(self, x):
        x = self.stn(x)
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2_drop(self.conv2(x)), 2))
        x = x.view(-1, 320)
        x = F.relu(self.fc1(x))
        x = F.dropout(x, training=self.training)
        x = self.fc2(x)
        return F.log_softmax(x, dim=1)


@lenet("quantization-stubs")
class QuantizationStubs(nn.Module):
    """LeNets prepared for eager-mode quantization: stubs around the network, every ReLU a layer of its own."""

    def __init__(self):
        super().__init__()
        self.quant = torch.ao.quantization.QuantStub()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(256, 84)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(84, 10)
        self.dequant = torch.ao.quantization.DeQuantStub()

    def forward(self, x):
        x = self.quant(x)
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        x = x.reshape(x.size(0), -1)
        x = self.fc2(self.relu3(self.fc1(x)))
        return self.dequant(x)


# --- libraries and frameworks ----------------------------------------------------------------------------------------


@lenet("ignite-mnist", fused=(1, 2))
class IgniteMnist(ExamplesMnist2017):
    """PyTorch Ignite's MNIST example: the last dimension counted from the end."""

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2_drop(self.conv2(x)), 2))
        x = x.view(-1, 320)
        x = F.relu(self.fc1(x))
        x = F.dropout(x, training=self.training)
        x = self.fc2(x)
        return F.log_softmax(x, dim=-1)


@lenet("skorch-mnist", fused=(1, 2), autograd="cross-entropy of probabilities: softmax at the end")
class SkorchMnist(nn.Module):
    """skorch's MNIST notebook: 3x3 kernels, features counted by sizes, dropout before a ReLU, probabilities."""

    def __init__(self, dropout=0.5):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3)
        self.conv2_drop = nn.Dropout2d(p=dropout)
        self.fc1 = nn.Linear(1600, 100)
        self.fc2 = nn.Linear(100, 10)
        self.fc1_drop = nn.Dropout(p=dropout)

    def forward(self, x):
        x = torch.relu(F.max_pool2d(self.conv1(x), 2))
        x = torch.relu(F.max_pool2d(self.conv2_drop(self.conv2(x)), 2))
        x = x.view(-1, x.size(1) * x.size(2) * x.size(3))
        x = torch.relu(self.fc1_drop(self.fc1(x)))
        x = torch.softmax(self.fc2(x), dim=-1)
        return x


@lenet("ray-tune-mnist", fused=(0, 0), unfused="its pooling is 3x3", autograd="3x3 pooling")
class RayTuneMnist(nn.Module):
    """Ray Tune's MNIST example: one convolution of three maps, 3x3 pooling."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, kernel_size=3)
        self.fc = nn.Linear(192, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 3))
        x = x.view(-1, 192)
        x = self.fc(x)
        return F.log_softmax(x, dim=1)


@lenet("opacus-mnist", fused=(0, 0), unfused="strides, overlapping pooling", autograd="strided convolution")
class OpacusMnist(nn.Module):
    """Opacus' MNIST example: strided 8x8 and 4x4 convolutions, overlapping pooling."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 8, 2, padding=3)
        self.conv2 = nn.Conv2d(16, 32, 4, 2)
        self.fc1 = nn.Linear(32 * 4 * 4, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(x, 2, 1)
        x = F.relu(self.conv2(x))
        x = F.max_pool2d(x, 2, 1)
        x = x.view(-1, 32 * 4 * 4)
        x = F.relu(self.fc1(x))
        x = self.fc2(x)
        return x


@lenet("avalanche-lenet5", shape=(1, 32, 32))
class AvalancheLeNet5(nn.Module):
    """Avalanche's LeNet-5: C5 a convolution, probabilities computed and thrown away."""

    def __init__(self, n_classes=10, input_channels=1):
        super().__init__()
        self.feature_extractor = nn.Sequential(
            nn.Conv2d(in_channels=input_channels, out_channels=6, kernel_size=5, stride=1), nn.Tanh(),
            nn.AvgPool2d(kernel_size=2),
            nn.Conv2d(in_channels=6, out_channels=16, kernel_size=5, stride=1), nn.Tanh(),
            nn.AvgPool2d(kernel_size=2),
            nn.Conv2d(in_channels=16, out_channels=120, kernel_size=5, stride=1), nn.Tanh(),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Linear(in_features=120, out_features=84), nn.Tanh(), nn.Linear(in_features=84, out_features=n_classes)
        )

    def forward(self, x):
        x = self.feature_extractor(x)
        x = torch.flatten(x, 1)
        logits = self.classifier(x)
        probs = F.softmax(logits, dim=1)  # noqa: F841 (nobody asks for them)
        return logits


@lenet("avalanche-simple-cnn", shape=(3, 32, 32), fused=(1, 1), autograd="adaptive pooling")
class AvalancheSimpleCNN(nn.Module):
    """Avalanche's SimpleCNN: five convolutions, the last 1x1, a maximum over each whole map."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, kernel_size=3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(32, 32, kernel_size=3, padding=0), nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=2, stride=2), nn.Dropout(p=0.25),
            nn.Conv2d(32, 64, kernel_size=3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(64, 64, kernel_size=3, padding=0), nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=2, stride=2), nn.Dropout(p=0.25),
            nn.Conv2d(64, 64, kernel_size=1, padding=0), nn.ReLU(inplace=True),
            nn.AdaptiveMaxPool2d(1), nn.Dropout(p=0.25),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Linear(64, num_classes))

    def forward(self, x):
        x = self.features(x)
        x = x.view(x.size(0), -1)
        x = self.classifier(x)
        return x


@lenet("caffe")
def caffe():
    """Caffe's LeNet 20-50-500: no activation behind the convolutions, layers by their names of then."""
    return nn.Sequential(
        OrderedDict(
            [
                ("conv1", nn.Conv2d(1, 20, 5)), ("pool1", nn.MaxPool2d(2, 2)),
                ("conv2", nn.Conv2d(20, 50, 5)), ("pool2", nn.MaxPool2d(2, 2)),
                ("flatten", nn.Flatten()), ("ip1", nn.Linear(800, 500)), ("relu1", nn.ReLU()),
                ("ip2", nn.Linear(500, 10)),
            ]
        )
    )  # fmt: skip


@lenet("keras")
def keras():
    """Keras' simple MNIST network: 32 and 64 maps of 3x3, dropout before the only dense layer."""
    model = nn.Sequential()
    model.append(nn.Conv2d(1, 32, kernel_size=(3, 3)))
    model.append(nn.ReLU())
    model.append(nn.MaxPool2d(kernel_size=(2, 2)))
    model.append(nn.Conv2d(32, 64, kernel_size=(3, 3)))
    model.append(nn.ReLU())
    model.append(nn.MaxPool2d(kernel_size=(2, 2)))
    model.append(nn.Flatten())
    model.append(nn.Dropout(0.5))
    model.append(nn.Linear(1600, 10))
    return model


@lenet("lasagne")
class Lasagne(nn.Module):
    """Lasagne's MNIST example: two convolutions of 32 maps, dropout before both dense layers."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, (5, 5)), nn.Conv2d(32, 32, (5, 5))
        self.dense, self.output = nn.Linear(512, 256), nn.Linear(256, 10)

    def forward(self, input):
        net = F.max_pool2d(torch.relu(self.conv1(input)), kernel_size=(2, 2))
        net = F.max_pool2d(torch.relu(self.conv2(net)), kernel_size=(2, 2))
        net = torch.relu(self.dense(F.dropout(net.flatten(1), p=0.5, training=self.training)))
        return self.output(F.dropout(net, p=0.5, training=self.training)).log_softmax(1)


@lenet("mmpretrain", shape=(1, 32, 32), autograd="squeeze() of all dimensions, the batch's too")
class MMPretrain(nn.Module):
    """OpenMMLab's LeNet-5 backbone with its classifier: maps of one pixel squeezed into features."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.num_classes = num_classes
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, kernel_size=5, stride=1), nn.Tanh(), nn.AvgPool2d(kernel_size=2),
            nn.Conv2d(6, 16, kernel_size=5, stride=1), nn.Tanh(), nn.AvgPool2d(kernel_size=2),
            nn.Conv2d(16, 120, kernel_size=5, stride=1), nn.Tanh(),
        )  # fmt: skip
        if self.num_classes > 0:
            self.classifier = nn.Sequential(nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, num_classes))

    def forward(self, x):
        x = self.features(x)
        if self.num_classes > 0:
            x = self.classifier(x.squeeze())
        return x


# --- courses and repositories ----------------------------------------------------------------------------------------


class Reshape(nn.Module):
    def forward(self, x):
        return x.view(-1, 1, 28, 28)


@lenet("d2l-reshape")
def d2l_reshape():
    """Dive into Deep Learning's first PyTorch edition: a layer of its own gives the images their shape."""
    return nn.Sequential(
        Reshape(),
        nn.Conv2d(1, 6, kernel_size=5, padding=2), nn.Sigmoid(), nn.AvgPool2d(kernel_size=2, stride=2),
        nn.Conv2d(6, 16, kernel_size=5), nn.Sigmoid(), nn.AvgPool2d(kernel_size=2, stride=2),
        nn.Flatten(), nn.Linear(16 * 5 * 5, 120), nn.Sigmoid(), nn.Linear(120, 84), nn.Sigmoid(), nn.Linear(84, 10),
    )  # fmt: skip


@lenet("d2l-two-parts")
class D2LTwoParts(nn.Module):
    """The community's PyTorch port of Dive into Deep Learning: sigmoid and max pooling, two Sequentials."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 6, 5), nn.Sigmoid(), nn.MaxPool2d(2, 2), nn.Conv2d(6, 16, 5), nn.Sigmoid(), nn.MaxPool2d(2, 2)
        )
        self.fc = nn.Sequential(
            nn.Linear(16 * 4 * 4, 120), nn.Sigmoid(), nn.Linear(120, 84), nn.Sigmoid(), nn.Linear(84, 10)
        )

    def forward(self, img):
        feature = self.conv(img)
        output = self.fc(feature.view(img.shape[0], -1))
        return output


@lenet("kuangliu-cifar", shape=(3, 32, 32))
class KuangliuCifar(nn.Module):
    """The LeNet of the best-known collection of CIFAR-10 networks."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        out = F.relu(self.conv1(x))
        out = F.max_pool2d(out, 2)
        out = F.relu(self.conv2(out))
        out = F.max_pool2d(out, 2)
        out = out.view(out.size(0), -1)
        out = F.relu(self.fc1(out))
        out = F.relu(self.fc2(out))
        out = self.fc3(out)
        return out


@lenet("yunjey-convnet", fused=(0, 0), unfused="BatchNorm2d between convolution and activation", autograd="BatchNorm2d")
class YunjeyConvNet(nn.Module):
    """The convolutional network of a popular PyTorch tutorial: blocks with batch normalisation."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.layer1 = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=5, stride=1, padding=2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.MaxPool2d(kernel_size=2, stride=2),
        )  # fmt: skip
        self.layer2 = nn.Sequential(
            nn.Conv2d(16, 32, kernel_size=5, stride=1, padding=2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.MaxPool2d(kernel_size=2, stride=2),
        )  # fmt: skip
        self.fc = nn.Linear(7 * 7 * 32, num_classes)

    def forward(self, x):
        out = self.layer1(x)
        out = self.layer2(out)
        out = out.reshape(out.size(0), -1)
        out = self.fc(out)
        return out


@lenet("morvan-cnn", scores=first)
class MorvanCNN(nn.Module):
    """A widespread tutorial's CNN: one dense layer, whose input is returned beside its output, for pictures."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels=1, out_channels=16, kernel_size=5, stride=1, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=2),
        )
        self.conv2 = nn.Sequential(nn.Conv2d(16, 32, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(2))
        self.out = nn.Linear(32 * 7 * 7, 10)

    def forward(self, x):
        x = self.conv1(x)
        x = self.conv2(x)
        x = x.view(x.size(0), -1)
        output = self.out(x)
        return output, x


@lenet("udacity-cifar", shape=(3, 32, 32), fused=(3, 3))
class UdacityCifar(nn.Module):
    """A course's CIFAR-10 network: three convolutions with padding, one dropout layer used twice."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(64 * 4 * 4, 500)
        self.fc2 = nn.Linear(500, 10)
        self.dropout = nn.Dropout(0.25)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = self.pool(F.relu(self.conv3(x)))
        x = x.view(-1, 64 * 4 * 4)
        x = self.dropout(x)
        x = F.relu(self.fc1(x))
        x = self.dropout(x)
        x = self.fc2(x)
        return x


@lenet("traffic-signs", shape=(3, 32, 32), classes=43)
class TrafficSigns(nn.Module):
    """LeNet-5 for the German traffic signs: 43 classes, ReLU in place, a flattening layer that forward makes."""

    def __init__(self, n_classes=43):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.linear1 = nn.Linear(400, 120)
        self.linear2 = nn.Linear(120, 84)
        self.linear3 = nn.Linear(84, n_classes)
        self.keep = nn.Dropout(0.5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x), inplace=True), 2)
        x = F.max_pool2d(F.relu_(self.conv2(x)), 2)
        x = nn.Flatten()(x)
        x = self.keep(self.linear1(x).relu_())
        x = self.keep(self.linear2(x).relu_())
        return self.linear3(x)


@lenet("vgg-style-list", shape=(3, 32, 32))
class VggStyleList(nn.Module):
    """Collections that build every network from a list of numbers and "M"s, LeNet among them."""

    cfg = (16, "M", 32, "M")

    def __init__(self):
        super().__init__()
        self.features = self._make_layers(self.cfg)
        self.classifier = nn.Sequential(nn.Linear(32 * 5 * 5, 120), nn.ReLU(True), nn.Linear(120, 10))

    def forward(self, x):
        out = self.features(x)
        out = out.view(-1, 32 * 5 * 5)
        return self.classifier(out)

    def _make_layers(self, cfg):
        layers, in_channels = [], 3
        for x in cfg:
            if x == "M":
                layers += [nn.MaxPool2d(kernel_size=2, stride=2)]
            else:
                layers += [nn.Conv2d(in_channels, x, kernel_size=5), nn.ReLU(inplace=True)]
                in_channels = x
        return nn.Sequential(*layers)


@lenet("lenet-1")
class LeNet1(nn.Module):
    """Repositories of LeCun's whole family: LeNet-1, layer by layer under LeCun's names."""

    def __init__(self):
        super().__init__()
        self.c1 = nn.Conv2d(in_channels=1, out_channels=4, kernel_size=5)
        self.s2 = nn.AvgPool2d(kernel_size=2, stride=2)
        self.c3 = nn.Conv2d(in_channels=4, out_channels=12, kernel_size=5)
        self.s4 = nn.AvgPool2d(kernel_size=2, stride=2)
        self.out = nn.Linear(in_features=12 * 4 * 4, out_features=10)
        self.tanh = nn.Tanh()

    def forward(self, x):
        x = self.c1(x)
        x = self.tanh(x)
        x = self.s2(x)
        x = self.c3(x)
        x = self.tanh(x)
        x = self.s4(x)
        x = torch.reshape(x, (-1, 12 * 4 * 4))
        return self.out(x)


@lenet("lenet-4", shape=(1, 32, 32))
class LeNet4(nn.Module):
    """LeNet-4 of the same family: 4 and 16 maps, one hidden layer; the squashing function a layer with constants."""

    class Squash(nn.Module):
        def __init__(self):
            super().__init__()
            self.A, self.S = 1.7159, 2 / 3

        def forward(self, x):
            return self.A * torch.tanh(self.S * x)

    def __init__(self):
        super().__init__()
        self.act = self.Squash()
        self.C1, self.C3 = nn.Conv2d(1, 4, 5), nn.Conv2d(4, 16, 5)
        self.S2 = self.S4 = nn.AvgPool2d(2)
        self.F5, self.F6 = nn.Linear(400, 120), nn.Linear(120, 10)

    def forward(self, x):
        x = self.S2(self.act(self.C1(x)))
        x = self.S4(self.act(self.C3(x)))
        x = self.act(self.F5(x.flatten(start_dim=1)))
        return self.F6(x)


@lenet("checked-shapes")
class CheckedShapes(nn.Module):
    """Careful authors: the shape unpacked and asserted, blocks as methods."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 84)
        self.fc2 = nn.Linear(84, 10)

    def block(self, x, conv):
        return F.max_pool2d(F.relu(conv(x)), kernel_size=2, stride=2)

    def forward(self, x):
        n, c, h, w = x.shape
        assert c == 1, f"expected grey images, got {c} channels"
        assert x.shape[2:] == (28, 28)
        x = self.block(x, self.conv1)
        x = self.block(x, self.conv2)
        x = x.view(n, -1)
        assert x.shape[1] == self.fc1.in_features
        return self.fc2(F.relu(self.fc1(x)))


@lenet("logits-and-probabilities", shape=(1, 32, 32), scores=first)
class LogitsAndProbabilities(AvalancheLeNet5):
    """A much-read article's LeNet-5: logits and probabilities together."""

    def forward(self, x):
        x = self.feature_extractor(x)
        x = torch.flatten(x, 1)
        logits = self.classifier(x)
        probs = F.softmax(logits, dim=1)
        return logits, probs


@lenet("named-results", scores=logits)
class NamedResults(nn.Module):
    """Code for open-set recognition: a dictionary of logits and features."""

    def __init__(self, num_classes=10):
        super().__init__()
        layers = []
        layers.append(nn.Conv2d(1, 6, kernel_size=5))
        layers.append(nn.ReLU())
        layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        layers.append(nn.Conv2d(6, 16, kernel_size=5))
        layers.append(nn.ReLU())
        layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        self.main = nn.Sequential(*layers)
        self.fc1 = nn.Linear(256, 84)
        self.fc2 = nn.Linear(84, num_classes)

    def forward(self, x):
        x = self.main(x)
        x = x.view(-1, 256)
        feature = F.relu(self.fc1(x))
        logits = self.fc2(feature)
        return {"logits": logits, "feat": feature}


class C1(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1 = nn.Sequential(
            OrderedDict(
                [("c1", nn.Conv2d(1, 6, kernel_size=(5, 5))), ("relu1", nn.ReLU()),
                 ("s1", nn.MaxPool2d(kernel_size=(2, 2), stride=2))]
            )
        )  # fmt: skip

    def forward(self, img):
        return self.c1(img)


class C2(nn.Module):
    def __init__(self):
        super().__init__()
        self.c2 = nn.Sequential(
            OrderedDict(
                [("c2", nn.Conv2d(6, 16, kernel_size=(5, 5))), ("relu2", nn.ReLU()),
                 ("s2", nn.MaxPool2d(kernel_size=(2, 2), stride=2))]
            )
        )  # fmt: skip

    def forward(self, img):
        return self.c2(img)


class C3(nn.Module):
    def __init__(self):
        super().__init__()
        self.c3 = nn.Sequential(OrderedDict([("c3", nn.Conv2d(16, 120, kernel_size=(5, 5))), ("relu3", nn.ReLU())]))

    def forward(self, img):
        return self.c3(img)


@lenet("a-class-for-every-layer", shape=(1, 32, 32), fused=(3, 3), autograd="two branches are added")
class EveryLayerAClass(nn.Module):
    """A starred LeNet-5 repository: each layer a class, two copies of the second summed in place."""

    def __init__(self):
        super().__init__()
        self.c1 = C1()
        self.c2_1 = C2()
        self.c2_2 = C2()
        self.c3 = C3()
        self.f4 = nn.Sequential(OrderedDict([("f4", nn.Linear(120, 84)), ("relu4", nn.ReLU())]))
        self.f5 = nn.Sequential(OrderedDict([("f5", nn.Linear(84, 10)), ("sig5", nn.LogSoftmax(dim=-1))]))

    def forward(self, img):
        output = self.c1(img)
        x = self.c2_1(output)
        output = self.c2_2(output)
        output += x
        output = self.c3(output)
        output = output.view(img.size(0), -1)
        output = self.f4(output)
        output = self.f5(output)
        return output


# --- federated, continual and distributed learning -------------------------------------------------------------------


@lenet("fedavg", fused=(1, 1))
class FedAvg(nn.Module):
    """The CNN of the federated-averaging paper, as FedML has it: 32 and 64 maps of 5x5, 512 units."""

    def __init__(self, only_digits=True):
        super().__init__()
        self.only_digits = only_digits
        self.conv2d_1 = nn.Conv2d(1, 32, kernel_size=5, padding=2)
        self.max_pooling = nn.MaxPool2d(2, stride=2)
        self.conv2d_2 = nn.Conv2d(32, 64, kernel_size=5, padding=2)
        self.flatten = nn.Flatten()
        self.linear_1 = nn.Linear(3136, 512)
        self.linear_2 = nn.Linear(512, 10 if only_digits else 62)
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.conv2d_1(x)
        x = self.relu(x)
        x = self.max_pooling(x)
        x = self.conv2d_2(x)
        x = self.relu(x)
        x = self.max_pooling(x)
        x = self.flatten(x)
        x = self.relu(self.linear_1(x))
        x = self.linear_2(x)
        return x


@lenet("fedml-dropout", shape=(28, 28), fused=(1, 1))
class FedMLDropout(nn.Module):
    """FedML's CNN of the adaptive federated optimization paper: images without channels, which forward adds."""

    def __init__(self):
        super().__init__()
        self.conv2d_1 = nn.Conv2d(1, 32, kernel_size=3)
        self.conv2d_2 = nn.Conv2d(32, 64, kernel_size=3)
        self.max_pooling = nn.MaxPool2d(2, stride=2)
        self.dropout_1 = nn.Dropout(0.25)
        self.flatten = nn.Flatten()
        self.linear_1 = nn.Linear(9216, 128)
        self.dropout_2 = nn.Dropout(0.5)
        self.linear_2 = nn.Linear(128, 10)
        self.relu = nn.ReLU()

    def forward(self, x):
        x = torch.unsqueeze(x, 1)
        x = self.conv2d_1(x)
        x = self.relu(x)
        x = self.conv2d_2(x)
        x = self.relu(x)
        x = self.max_pooling(x)
        x = self.dropout_1(x)
        x = self.flatten(x)
        x = self.linear_1(x)
        x = self.relu(x)
        x = self.dropout_2(x)
        x = self.linear_2(x)
        return x


@lenet("leaf-femnist", classes=62, fused=(1, 1))
class LeafFemnist(nn.Module):
    """LEAF's FEMNIST network, its dense layer 256 wide instead of 2,048: a reshaping first, 62 classes."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 5, padding="same")
        self.conv2 = nn.Conv2d(32, 64, 5, padding="same")
        self.fc1 = nn.Linear(64 * 7 * 7, 256)
        self.fc2 = nn.Linear(256, 62)

    def forward(self, x):
        x = x.reshape((-1, 1, 28, 28))
        x = F.max_pool2d(F.relu(self.conv1(x)), 2, stride=2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2, stride=2)
        x = x.reshape((-1, 64 * 7 * 7))
        return self.fc2(F.relu(self.fc1(x)))


@lenet("flower-quickstart", shape=(3, 32, 32))
class FlowerQuickstart(nn.Module):
    """Flower's PyTorch quickstart: the CIFAR-10 tutorial's network with annotations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


@lenet("federated-learning-cnn", fused=(1, 2))
class FederatedLearningCNN(ExamplesMnist2017):
    """The most-forked federated-learning repository: features counted as a product of sizes."""

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2_drop(self.conv2(x)), 2))
        x = x.view(-1, x.shape[1] * x.shape[2] * x.shape[3])
        x = F.relu(self.fc1(x))
        x = F.dropout(x, training=self.training)
        x = self.fc2(x)
        return F.log_softmax(x, dim=1)


@lenet("multi-head")
class MultiHead(nn.Module):
    """Task-incremental continual learning: a head for each task, chosen by its number."""

    def __init__(self, tasks=5):
        super().__init__()
        self.base = nn.Sequential(
            nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.hidden = nn.Linear(256, 84)
        self.heads = nn.ModuleDict({str(task): nn.Linear(84, 10) for task in range(tasks)})

    def forward(self, x, task=0):
        x = self.base(x)
        x = F.relu(self.hidden(x.view(x.size(0), -1)))
        return self.heads[str(task)](x)


@lenet("split-learning")
class SplitLearning(nn.Module):
    """Split learning: the client's and the server's half in a list, run one after the other."""

    def __init__(self):
        super().__init__()
        client = nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2))
        server = nn.Sequential(
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10), nn.LogSoftmax(dim=1)
        )
        self.models = nn.ModuleList([client, server])

    def forward(self, x):
        a = []
        for i, model in enumerate(self.models):
            a.append(model(x if i == 0 else a[-1]))
        return a[-1]


@lenet("deep-leakage", shape=(3, 32, 32), fused=(0, 0), unfused="no pooling", autograd="strided convolution")
class DeepLeakage(nn.Module):
    """The network that gradients are inverted on: sigmoid, strides instead of pooling."""

    def __init__(self):
        super().__init__()
        act = nn.Sigmoid
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, kernel_size=5, padding=5 // 2, stride=2), act(),
            nn.Conv2d(12, 12, kernel_size=5, padding=5 // 2, stride=2), act(),
            nn.Conv2d(12, 12, kernel_size=5, padding=5 // 2, stride=1), act(),
        )  # fmt: skip
        self.fc = nn.Sequential(nn.Linear(768, 10))

    def forward(self, x):
        out = self.body(x)
        out = out.view(out.size(0), -1)
        return self.fc(out)


# --- domain adaptation, metric and adversarial learning --------------------------------------------------------------


class ReverseGradient(Function):
    """Identity forward, the gradient times -alpha backward."""

    @staticmethod
    def forward(ctx, x, alpha):
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output.neg() * ctx.alpha, None


@lenet("dann", fused=(1, 1), autograd="a reversed gradient, a second head", scores=first)
class DANN(nn.Module):
    """Domain-adversarial training: a gradient-reversal Function before the head that tells the domains apart."""

    def __init__(self):
        super().__init__()
        self.feature = nn.Sequential()
        self.feature.add_module("f_conv1", nn.Conv2d(1, 32, kernel_size=5))
        self.feature.add_module("f_relu1", nn.ReLU(True))
        self.feature.add_module("f_pool1", nn.MaxPool2d(2))
        self.feature.add_module("f_conv2", nn.Conv2d(32, 48, kernel_size=5))
        self.feature.add_module("f_relu2", nn.ReLU(True))
        self.feature.add_module("f_pool2", nn.MaxPool2d(2))
        self.class_classifier = nn.Sequential(nn.Linear(768, 100), nn.ReLU(True), nn.Linear(100, 10), nn.LogSoftmax(1))
        self.domain_classifier = nn.Sequential(nn.Linear(768, 100), nn.ReLU(True), nn.Linear(100, 2), nn.LogSoftmax(1))

    def forward(self, input_data, alpha=1.0):
        feature = self.feature(input_data)
        feature = feature.view(-1, 48 * 4 * 4)
        reverse_feature = ReverseGradient.apply(feature, alpha)
        class_output = self.class_classifier(feature)
        domain_output = self.domain_classifier(reverse_feature)
        return class_output, domain_output


@lenet(
    "mcd", shape=(3, 28, 28), fused=(0, 0), unfused="BatchNorm2d between convolution and activation",
    autograd="BatchNorm2d", scores=first,
)  # fmt: skip
class MCD(nn.Module):
    """Maximum classifier discrepancy: one generator on grey images, two classifiers that shall disagree."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=5, stride=1)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 48, kernel_size=5, stride=1)
        self.bn2 = nn.BatchNorm2d(48)
        self.classifiers = nn.ModuleList(
            [nn.Sequential(nn.Linear(768, 100), nn.BatchNorm1d(100), nn.ReLU(), nn.Linear(100, 10)) for _ in range(2)]
        )

    def forward(self, x):
        x = torch.mean(x, 1).view(x.size()[0], 1, x.size()[2], x.size()[3])
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), stride=2, kernel_size=2, dilation=(1, 1))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), stride=2, kernel_size=2, dilation=(1, 1))
        x = x.view(x.size(0), 48 * 4 * 4)
        return tuple(classifier(x) for classifier in self.classifiers)


@lenet("adda", fused=(1, 2))
class ADDA(nn.Module):
    """Adversarial discriminative domain adaptation: encoder and classifier, dropout of maps in the Sequential."""

    def __init__(self):
        super().__init__()
        self.restored = False
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 20, kernel_size=5), nn.MaxPool2d(kernel_size=2), nn.ReLU(),
            nn.Conv2d(20, 50, kernel_size=5), nn.Dropout2d(), nn.MaxPool2d(kernel_size=2), nn.ReLU(),
        )  # fmt: skip
        self.fc1 = nn.Linear(50 * 4 * 4, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, input):
        conv_out = self.encoder(input)
        feat = self.fc1(conv_out.view(-1, 50 * 4 * 4))
        out = F.dropout(F.relu(feat), training=self.training)
        out = self.fc2(out)
        return out


@lenet("siamese", images=2, fused=(4, 4), autograd="two images")
class Siamese(nn.Module):
    """Caffe's siamese network: pairs of digits through one network, two coordinates for each."""

    def __init__(self):
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(800, 500), nn.ReLU(inplace=True), nn.Linear(500, 10), nn.Linear(10, 2),
        )  # fmt: skip

    def forward_once(self, x):
        return self.cnn(x)

    def forward(self, input1, input2):
        output1 = self.forward_once(input1)
        output2 = self.forward_once(input2)
        return output1, output2


@lenet("center-loss", fused=(0, 0), unfused="PReLU", autograd="PReLU", scores=second)
class CenterLoss(nn.Module):
    """LeNet++ for center loss: two convolutions a stage, PReLU, two features that are plotted."""

    def __init__(self):
        super().__init__()
        self.conv1_1 = nn.Conv2d(1, 8, kernel_size=5, padding=2)
        self.prelu1_1 = nn.PReLU()
        self.conv1_2 = nn.Conv2d(8, 8, kernel_size=5, padding=2)
        self.prelu1_2 = nn.PReLU()
        self.conv2_1 = nn.Conv2d(8, 16, kernel_size=5, padding=2)
        self.prelu2_1 = nn.PReLU()
        self.conv2_2 = nn.Conv2d(16, 16, kernel_size=5, padding=2)
        self.prelu2_2 = nn.PReLU()
        self.preluip1 = nn.PReLU()
        self.ip1 = nn.Linear(16 * 7 * 7, 2)
        self.ip2 = nn.Linear(2, 10, bias=False)

    def forward(self, x):
        x = self.prelu1_1(self.conv1_1(x))
        x = self.prelu1_2(self.conv1_2(x))
        x = F.max_pool2d(x, 2)
        x = self.prelu2_1(self.conv2_1(x))
        x = self.prelu2_2(self.conv2_2(x))
        x = F.max_pool2d(x, 2)
        x = x.view(-1, 16 * 7 * 7)
        ip1 = self.preluip1(self.ip1(x))
        ip2 = self.ip2(ip1)
        return ip1, F.log_softmax(ip2, dim=1)


@lenet("robustness-madry", fused=(2, 2))
class RobustnessMadry(nn.Module):
    """Toolboxes of adversarial robustness: 32 and 64 maps with padding, every step a numbered layer."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3, padding=1, stride=1)
        self.relu1 = nn.ReLU(inplace=True)
        self.maxpool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1, stride=1)
        self.relu2 = nn.ReLU(inplace=True)
        self.maxpool2 = nn.MaxPool2d(2)
        self.linear1 = nn.Linear(7 * 7 * 64, 200)
        self.relu3 = nn.ReLU(inplace=True)
        self.linear2 = nn.Linear(200, 10)

    def forward(self, x):
        out = self.maxpool1(self.relu1(self.conv1(x)))
        out = self.maxpool2(self.relu2(self.conv2(out)))
        out = out.view(out.size(0), -1)
        out = self.relu3(self.linear1(out))
        out = self.linear2(out)
        return out


@lenet("robustness-trades", fused=(1, 1))
class RobustnessTrades(nn.Module):
    """TRADES' network for MNIST: four convolutions, two poolings, three dense layers, named in OrderedDicts."""

    def __init__(self, drop=0.5):
        super().__init__()
        self.feature_extractor = nn.Sequential(
            OrderedDict(
                [
                    ("conv1", nn.Conv2d(1, 32, 3)), ("relu1", nn.ReLU()),
                    ("conv2", nn.Conv2d(32, 32, 3)), ("relu2", nn.ReLU()), ("maxpool1", nn.MaxPool2d(2, 2)),
                    ("conv3", nn.Conv2d(32, 64, 3)), ("relu3", nn.ReLU()),
                    ("conv4", nn.Conv2d(64, 64, 3)), ("relu4", nn.ReLU()), ("maxpool2", nn.MaxPool2d(2, 2)),
                ]
            )
        )  # fmt: skip
        self.classifier = nn.Sequential(
            OrderedDict(
                [
                    ("fc1", nn.Linear(64 * 4 * 4, 200)), ("relu1", nn.ReLU()), ("drop", nn.Dropout(drop)),
                    ("fc2", nn.Linear(200, 200)), ("relu2", nn.ReLU()), ("fc3", nn.Linear(200, 10)),
                ]
            )
        )  # fmt: skip

    def forward(self, input):
        features = self.feature_extractor(input)
        logits = self.classifier(features.view(-1, 64 * 4 * 4))
        return logits


class Normalize(nn.Module):
    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x):
        return (x - self.mean) / self.std


@lenet("normalizing", shape=(3, 32, 32), autograd="arithmetic on the images")
def normalizing():
    """Attack libraries, whose models take raw pixels: normalisation is the first layer."""
    return nn.Sequential(Normalize([0.491, 0.482, 0.447], [0.247, 0.243, 0.262]), KuangliuCifar())


@lenet("discriminator", fused=(0, 0), unfused="LeakyReLU", autograd="LeakyReLU, a second head", scores=second)
class Discriminator(nn.Module):
    """A generative adversarial network's LeNet as discriminator with an auxiliary classifier: LeakyReLU."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.dropout = nn.Dropout2d(0.25)
        self.adv_layer = nn.Sequential(nn.Linear(256, 1), nn.Sigmoid())
        self.aux_layer = nn.Linear(256, 10)

    def forward(self, img):
        out = F.max_pool2d(F.leaky_relu(self.conv1(img), 0.2), 2)
        out = self.dropout(F.max_pool2d(F.leaky_relu(self.conv2(out), 0.2), 2))
        out = out.view(out.shape[0], -1)
        return self.adv_layer(out), self.aux_layer(out)


# --- research: uncertainty, quantisation, regularisation, structure --------------------------------------------------


@lenet("monte-carlo-dropout")
class MonteCarloDropout(nn.Module):
    """Bayesian LeNet by dropout: never switched off, evaluation included."""

    def __init__(self, drop_rate=0.5):
        super().__init__()
        self.drop_rate = drop_rate
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x):
        x = F.dropout(F.max_pool2d(F.relu(self.conv1(x)), 2), p=self.drop_rate, training=True)
        x = F.dropout(F.max_pool2d(F.relu(self.conv2(x)), 2), p=self.drop_rate, training=True)
        x = x.view(-1, 800)
        x = F.dropout(F.relu(self.fc1(x)), p=self.drop_rate, training=True)
        return self.fc2(x)


class BayesConv2d(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size):
        super().__init__()
        shape = out_channels, in_channels, kernel_size, kernel_size
        self.W_mu = nn.Parameter(torch.randn(shape) * 0.1)
        self.W_rho = nn.Parameter(torch.full(shape, -3.0))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x):
        weight = self.W_mu
        if self.training:
            weight = weight + torch.log1p(torch.exp(self.W_rho)) * torch.randn_like(self.W_mu)
        return F.conv2d(x, weight, self.bias)


@lenet("bayes-by-backprop", autograd="weights drawn anew in every step")
class BayesByBackprop(nn.Module):
    """Bayes by backprop: weights drawn in every forward of the training, F.conv2d on them."""

    def __init__(self):
        super().__init__()
        self.conv1 = BayesConv2d(1, 6, 5)
        self.conv2 = BayesConv2d(6, 16, 5)
        self.fc = nn.Linear(256, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc(x.view(-1, 256))


class BinActive(Function):
    """sign() with the gradient of the identity within [-1, 1]."""

    @staticmethod
    def forward(ctx, input):
        ctx.save_for_backward(input)
        return input.sign()

    @staticmethod
    def backward(ctx, grad_output):
        (input,) = ctx.saved_tensors
        return grad_output * (input.abs() <= 1).to(grad_output.dtype)


class BinConv2d(nn.Conv2d):
    def forward(self, x):
        weight = BinActive.apply(self.weight) * self.weight.abs().mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


@lenet("xnor", autograd="binarised weights")
class XNOR(nn.Module):
    """XNOR-Net's LeNet: the second convolution binarised by a straight-through Function, its input too."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, kernel_size=5, stride=1)
        self.bn_conv1 = nn.BatchNorm2d(20, eps=1e-4, momentum=0.1, affine=False)
        self.pool = nn.MaxPool2d(kernel_size=2, stride=2)
        self.bin_conv2 = BinConv2d(20, 50, kernel_size=5)
        self.fc1 = nn.Linear(800, 84)
        self.fc2 = nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = BinActive.apply(self.bn_conv1(x))
        x = self.pool(F.relu(self.bin_conv2(x)))
        x = x.view(x.size(0), -1)
        return self.fc2(F.relu(self.fc1(x)))


@lenet("batch-norm-behind", autograd="BatchNorm2d")
class BatchNormBehind(nn.Module):
    """Batch normalisation behind the pooling, where many put it."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.norm2 = nn.BatchNorm2d(16)
        self.fc1 = nn.Linear(256, 84)
        self.fc2 = nn.Linear(84, 10)
        self.pool = nn.MaxPool2d(2, 2)

    def forward(self, x):
        x = self.norm1(self.pool(F.relu(self.conv1(x))))
        x = self.norm2(self.pool(F.relu(self.conv2(x))))
        x = torch.flatten(x, 1)
        return self.fc2(F.relu(self.fc1(x)))


class SmallLeNet(nn.Module):
    """What the ensembles and additions below are made of."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc = nn.Linear(256, 10)

    def features(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return F.max_pool2d(F.relu(self.conv2(x)), 2)

    def forward(self, x):
        return self.fc(self.features(x).view(x.size(0), -1))


@lenet("deep-ensemble", fused=(6, 6), autograd="three networks side by side")
class DeepEnsemble(nn.Module):
    """A deep ensemble of three, trained and asked together: the mean of their scores."""

    def __init__(self):
        super().__init__()
        self.members = nn.ModuleList([SmallLeNet() for _ in range(3)])

    def forward(self, x):
        return torch.stack([member(x) for member in self.members]).mean(0)


@lenet("two-columns", fused=(4, 4), autograd="two branches are concatenated")
class TwoColumns(nn.Module):
    """Multi-column networks: 3x3 and 5x5 kernels side by side."""

    def __init__(self):
        super().__init__()
        self.columns = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(1, 6, k, padding=k // 2), nn.ReLU(), nn.MaxPool2d(2),
                    nn.Conv2d(6, 8, k, padding=k // 2), nn.ReLU(), nn.MaxPool2d(2),
                )
                for k in (3, 5)
            ]
        )  # fmt: skip
        self.fc = nn.Linear(16 * 7 * 7, 10)

    def forward(self, x):
        x = torch.cat([column(x) for column in self.columns], 1)
        return self.fc(x.flatten(1))


@lenet("stochastic-depth", autograd="a residual block that chance leaves out")
class StochasticDepth(SmallLeNet):
    """Stochastic depth on a residual LeNet: Python's random decides in every step."""

    def __init__(self):
        super().__init__()
        self.conv3 = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        x = self.features(x)
        if not self.training or random.random() < 0.5:
            x = x + F.relu(self.conv3(x))
        return self.fc(x.view(x.size(0), -1))


@lenet("auxiliary-head", autograd="a second head", scores=first_of_some)
class AuxiliaryHead(nn.Module):
    """A head on the first stage, as GoogLeNet has them: two results in training, one in evaluation."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.aux = nn.Linear(864, 10)
        self.fc = nn.Linear(256, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        aux = self.aux(torch.flatten(x, 1)) if self.training else None
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = self.fc(torch.flatten(x, 1))
        return (x, aux) if self.training else x


@lenet("squeeze-and-excitation", autograd="maps are weighted by attention")
class SqueezeAndExcitation(SmallLeNet):
    """Channel attention behind the last pooling."""

    def __init__(self):
        super().__init__()
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16), nn.Sigmoid()
        )

    def forward(self, x):
        x = self.features(x)
        b, c, _, _ = x.size()
        x = x * self.se(x).view(b, c, 1, 1)
        return self.fc(x.view(b, -1))


@lenet("cnn-lstm", shape=(4, 1, 28, 28), autograd="LSTM")
class CnnLstm(SmallLeNet):
    """A LeNet on every frame of a sequence, an LSTM on its features."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(256, 16, batch_first=True)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        b, t, c, h, w = x.shape
        x = self.features(x.view(b * t, c, h, w)).view(b, t, -1)
        x, _ = self.lstm(x)
        return self.fc(x[:, -1])


@lenet("keeps-activations", autograd="forward keeps an activation as an attribute")
class KeepsActivations(SmallLeNet):
    """Class activation maps and distillation: forward leaves its features on the module."""

    def forward(self, x):
        x = self.features(x)
        self.feature_maps = x
        return self.fc(x.view(x.size(0), -1))


@lenet("counts-calls", autograd="forward changes a number that its result depends on")
class CountsCalls(SmallLeNet):
    """Schedules in forward: a weight of the features that grows with every training step."""

    def __init__(self):
        super().__init__()
        self.iter_num = 0

    def forward(self, x):
        if self.training:
            self.iter_num += 1
        coeff = 2.0 / (1.0 + math.exp(-self.iter_num / 10))
        return self.fc(coeff * self.features(x).view(x.size(0), -1))


@lenet("gaussian-noise", autograd="noise is added to the images")
class GaussianNoise(SmallLeNet):
    """Temporal ensembling: noise on the images while training, as a Variable."""

    def forward(self, x):
        if self.training:
            x = x + Variable(torch.randn_like(x) * 0.15)
        return super().forward(x)


@lenet("pads-to-32", autograd="padding before the first convolution")
class PadsTo32(nn.Module):
    """LeNet-5 on 28x28 images: F.pad makes them 32x32, tanh and then sigmoid behind an average."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.pool = nn.AvgPool2d(kernel_size=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 84)
        self.fc2 = nn.Linear(84, 10)

    def forward(self, x):
        x = F.pad(x, (2, 2, 2, 2))
        x = torch.sigmoid(self.pool(torch.tanh(self.conv1(x))))
        x = torch.sigmoid(self.pool(torch.tanh(self.conv2(x))))
        x = x.view(x.size(0), -1)
        return self.fc2(torch.tanh(self.fc1(x)))


@lenet("scales-when-needed", autograd="a branch on the pixels")
class ScalesWhenNeeded(SmallLeNet):
    """Demonstrations that accept bytes and fractions alike: a branch on the largest pixel."""

    def forward(self, x):
        if x.max() > 1.0:
            x = x / 255.0
        return super().forward(x)


@lenet("functional-weights", autograd="parameters in a list, not in layers")
class FunctionalWeights(nn.Module):
    """Meta-learning (MAML) code: a ParameterList and a list of what to do, weights as an argument of forward."""

    def __init__(self):
        super().__init__()
        self.config = [("conv2d", (6, 1, 5)), ("conv2d", (16, 6, 5)), ("flatten", ()), ("linear", (10, 256))]
        self.vars = nn.ParameterList()
        for name, sizes in self.config:
            if name != "flatten":
                w = nn.Parameter(torch.ones(*sizes, sizes[-1]) if name == "conv2d" else torch.ones(*sizes))
                nn.init.kaiming_normal_(w)
                self.vars.append(w)
                self.vars.append(nn.Parameter(torch.zeros(sizes[0])))

    def forward(self, x, vars=None):
        vars = self.vars if vars is None else vars
        idx = 0
        for name, _ in self.config:
            if name == "flatten":
                x = x.view(x.size(0), -1)
                continue
            w, b = vars[idx], vars[idx + 1]
            idx += 2
            if name == "conv2d":
                x = F.max_pool2d(F.relu(F.conv2d(x, w, b, stride=1, padding=0), inplace=True), 2, 2)
            else:
                x = F.linear(x, w, b)
        return x


@lenet("sparse-c3", shape=(1, 32, 32), fused=(1, 1), autograd="C3 in slices, poolings with coefficients")
class SparseC3(nn.Module):
    """LeCun's LeNet-5 to the letter: C3 as a convolution for every map, subsampling with a coefficient."""

    table = ((0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5), (0, 1, 2, 3), (0, 1, 2, 3, 4, 5))

    def __init__(self):
        super().__init__()
        self.c1 = nn.Conv2d(1, 6, 5)
        self.c3 = nn.ModuleList([nn.Conv2d(len(maps), 1, 5) for maps in self.table])
        self.coefficient = nn.Parameter(torch.ones(2))
        self.f6 = nn.Linear(8 * 5 * 5, 84)
        self.output = nn.Linear(84, 10)

    def subsample(self, x, number):
        return torch.tanh(self.coefficient[number] * 4 * F.avg_pool2d(x, 2))

    def forward(self, x):
        x = self.subsample(torch.tanh(self.c1(x)), 0)
        x = torch.cat([conv(x[:, maps]) for conv, maps in zip(self.c3, self.table, strict=True)], dim=1)
        x = self.subsample(torch.tanh(x), 1)
        return self.output(torch.tanh(self.f6(x.flatten(1))))


@lenet("lecun-1989", shape=(1, 16, 16), fused=(0, 0), unfused="strides instead of pooling", autograd="biases of units")
class LeCun1989(nn.Module):
    """A reproduction of the 1989 network: padding with -1, strides, a bias for every unit, F.conv2d by hand."""

    def __init__(self):
        super().__init__()
        winit = lambda fan_in, *shape: (torch.rand(*shape) - 0.5) * 2 * 2.4 / fan_in**0.5  # noqa: E731
        self.H1w = nn.Parameter(winit(5 * 5 * 1, 12, 1, 5, 5))
        self.H1b = nn.Parameter(torch.zeros(12, 8, 8))
        self.H2w = nn.Parameter(winit(5 * 5 * 8, 12, 8, 5, 5))
        self.H2b = nn.Parameter(torch.zeros(12, 4, 4))
        self.H3w = nn.Parameter(winit(4 * 4 * 12, 4 * 4 * 12, 30))
        self.H3b = nn.Parameter(torch.zeros(30))
        self.outw = nn.Parameter(winit(30, 30, 10))
        self.outb = nn.Parameter(-torch.ones(10))

    def forward(self, x):
        x = F.pad(x, (2, 2, 2, 2), "constant", -1.0)
        x = F.conv2d(x, self.H1w, stride=2) + self.H1b
        x = torch.tanh(x)
        x = F.pad(x, (2, 2, 2, 2), "constant", -1.0)
        slice1 = F.conv2d(x[:, 0:8], self.H2w[0:4], stride=2)
        slice2 = F.conv2d(x[:, 4:12], self.H2w[4:8], stride=2)
        slice3 = F.conv2d(torch.cat((x[:, 0:4], x[:, 8:12]), dim=1), self.H2w[8:12], stride=2)
        x = torch.cat((slice1, slice2, slice3), dim=1) + self.H2b
        x = torch.tanh(x)
        x = x.flatten(start_dim=1)
        x = torch.tanh(x @ self.H3w + self.H3b)
        return torch.tanh(x @ self.outw + self.outb)
