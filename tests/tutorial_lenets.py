"""LeNets in the ways in which tutorials write them, for the tests of `accelerate`: written anew, none is a copy."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

try:
    from lightning import LightningModule
except ImportError:  # the stand-in has what the example calls
    LightningModule = nn.Module


class Blitz(nn.Module):
    """Layers with parameters in __init__, everything else as functions, pooling windows both as pair and as int."""

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
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class CountedFeatures(Blitz):
    """The older flattening: a loop over the input's sizes."""

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, self.num_flat_features(x))
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))

    def num_flat_features(self, x):
        count = 1
        for size in x.size()[1:]:
            count *= size
        return count


class TanhAverage(nn.Module):
    """torch.tanh and average pooling as functions, stated step by step with the sizes as default arguments."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.c1 = nn.Conv2d(in_channels=1, out_channels=6, kernel_size=5, stride=1, padding=2)
        self.c3 = nn.Conv2d(in_channels=6, out_channels=16, kernel_size=5, stride=1)
        self.c5 = nn.Conv2d(in_channels=16, out_channels=120, kernel_size=5, stride=1)
        self.f6 = nn.Linear(120, 84)
        self.out = nn.Linear(84, num_classes)

    def forward(self, img, return_features=False):
        c1 = torch.tanh(self.c1(img))
        s2 = F.avg_pool2d(c1, kernel_size=2, stride=2)
        c3 = torch.tanh(self.c3(s2))
        s4 = F.avg_pool2d(c3, kernel_size=2)
        features = torch.tanh(self.c5(s4)).reshape(img.shape[0], -1)
        logits = self.out(torch.tanh(self.f6(features)))
        return (logits, features) if return_features else logits


class SharedLayers(nn.Module):
    """One pooling layer for both convolutions, one activation for everything, dropout by the training flag."""

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2, 2)
        self.act = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(1, 10, kernel_size=5)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=5)
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, 10)

    def forward(self, x):
        x = self.pool(self.act(self.conv1(x)))
        x = self.pool(self.act(self.conv2(x)))
        x = self.act(self.fc1(x.view(-1, 320)))
        x = F.dropout(x, training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


class Block(nn.Module):
    """Convolution and activation; the pooling is the parent's."""

    def __init__(self, in_channels, out_channels, **options):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(in_channels, out_channels, 5, **options), nn.Sigmoid())
        self.pool = nn.AvgPool2d(kernel_size=2, stride=2)

    def forward(self, x):
        return self.pool(self.body(x))


def nested_blocks():
    """Blocks of user-defined and of plain containers, a run that crosses a container's border."""
    return nn.Sequential(
        OrderedDict(
            first=Block(1, 6, padding=2),
            second=nn.Sequential(nn.Sequential(nn.Conv2d(6, 16, 5), nn.Tanh()), nn.MaxPool2d(2)),
            head=nn.Sequential(nn.Flatten(), nn.Linear(400, 84), nn.Tanh(), nn.Linear(84, 10)),
        )
    )


class Lightning(LightningModule):
    """A LightningModule: the network in forward, the training step beside it."""

    def __init__(self, lr=1e-3):
        super().__init__()
        self.lr = lr
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(4, 12, 5), nn.Tanh(), nn.AvgPool2d(2)
        )
        self.classifier = nn.Linear(192, 10)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def lazy():
    """Input sizes left to the first batch."""
    return nn.Sequential(
        nn.LazyConv2d(6, kernel_size=5, padding=2), nn.Sigmoid(), nn.AvgPool2d(kernel_size=2, stride=2),
        nn.LazyConv2d(16, kernel_size=5), nn.Sigmoid(), nn.AvgPool2d(kernel_size=2, stride=2),
        nn.Flatten(), nn.LazyLinear(120), nn.Sigmoid(), nn.LazyLinear(10),
    )  # fmt: skip


class FeaturesClassifier(nn.Module):
    """features/classifier with batch normalisation, dropout and max pooling."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, (3, 3), padding=(1, 1), bias=False), nn.ReLU(inplace=True), nn.MaxPool2d((2, 2)),
            nn.Dropout2d(0.1),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(16 * 7 * 7, 10))

    def forward(self, x):
        x = self.features(x)
        x = torch.flatten(x, start_dim=1)
        return self.classifier(x)


class Listed(nn.Module):
    """Layers in a ModuleList, the forward a loop over them."""

    def __init__(self, channels=(1, 6, 16)):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(i, o, 5) for i, o in pairwise(channels)])
        self.dense = nn.ModuleDict({"hidden": nn.Linear(256, 32), "out": nn.Linear(32, 10)})

    def forward(self, x):
        for conv in self.convs:
            x = F.avg_pool2d(conv(x).sigmoid(), (2, 2), stride=(2, 2))
        return self.dense["out"](self.dense["hidden"](x.flatten(1)).relu())


class PoolFirst(nn.Module):
    """The activation behind the pooling: with max pooling the same function."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc = nn.Linear(256, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.avg_pool2d(self.conv2(x), 2))  # with average pooling it is not
        return self.fc(x.flatten(start_dim=1))


class Squashing(nn.Module):
    """1.7159 tanh(2x/3) written out, on LeNet-5's first layers."""

    def __init__(self):
        super().__init__()
        self.c1 = nn.Conv2d(1, 6, 5)
        self.s2 = nn.AvgPool2d(2)
        self.c3 = nn.Conv2d(6, 16, 5)
        self.s4 = nn.AvgPool2d(2)
        self.output = nn.Linear(256, 10)

    def squash(self, x):
        return 1.7159 * torch.tanh(2 / 3 * x)

    def forward(self, x):
        x = self.s2(self.squash(self.c1(x)))
        x = self.s4(self.squash(self.c3(x)))
        return self.output(x.flatten(1))


class Unfusable(nn.Module):
    """Nothing that the kernels compute: a strided and a grouped convolution, a 3x3 pooling."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(6, 12, 3, groups=2)
        self.conv3 = nn.Conv2d(12, 12, 3, padding=1)
        self.pool = nn.MaxPool2d(3, stride=1)
        self.fc = nn.Linear(12, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = self.pool(F.pad(x, (1, 1, 1, 1)).relu() + F.relu(self.conv3(F.pad(x, (1, 1, 1, 1)))))
        return self.fc(x.mean(dim=(2, 3)))


def d2l():
    """One nn.Sequential from the image to the scores."""
    return nn.Sequential(
        nn.Conv2d(1, 6, kernel_size=5, padding=2), nn.Sigmoid(), nn.AvgPool2d(kernel_size=2, stride=2),
        nn.Conv2d(6, 16, kernel_size=5), nn.Sigmoid(), nn.AvgPool2d(kernel_size=2, stride=2),
        nn.Flatten(), nn.Linear(400, 120), nn.Sigmoid(), nn.Linear(120, 84), nn.Sigmoid(), nn.Linear(84, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Tutorial:
    """A LeNet, the side of its input, and what `accelerate` is to report: fused runs and reasons by convolution."""

    build: Callable[[], nn.Module]
    size: int
    fused: tuple[str, ...]
    left_alone: tuple[str, ...] = ()

    def model(self) -> nn.Module:
        """The same values at every call; Lazy layers have seen a batch. Inputs are drawn next, so they repeat too."""
        torch.manual_seed(0)
        model = self.build()
        model(self.images(2))
        torch.manual_seed(1)
        return model

    def images(self, batch=5, dtype=None):
        return torch.randn(batch, 1, self.size, self.size, dtype=dtype)


TUTORIALS = {
    "d2l": Tutorial(d2l, 28, ("0 + 1 + 2", "3 + 4 + 5")),
    "blitz": Tutorial(Blitz, 32, ("conv1 + relu() + max_pool2d()", "conv2 + relu() + max_pool2d()")),
    "tanh-average": Tutorial(
        TanhAverage,
        28,
        ("c1 + tanh() + avg_pool2d()", "c3 + tanh() + avg_pool2d()"),
        ("c5: reshape(5, -1) comes before any pooling",),
    ),
    "shared-layers": Tutorial(SharedLayers, 28, ("conv1 + act + pool", "conv2 + act + pool")),
    "nested-blocks": Tutorial(
        nested_blocks, 28, ("first.body.0 + first.body.1 + first.pool", "second.0.0 + second.0.1 + second.1")
    ),
    "lightning": Tutorial(
        Lightning, 28, ("features.0 + features.1 + features.2", "features.3 + features.4 + features.5")
    ),
    "lazy": Tutorial(lazy, 28, ("0 + 1 + 2", "3 + 4 + 5")),
    "features-classifier": Tutorial(
        FeaturesClassifier,
        28,
        ("features.4 + features.5 + features.6",),
        ("features.0: BatchNorm2d, which the kernels do not have, comes before any pooling",),
    ),
    "module-list": Tutorial(Listed, 28, ("convs.0 + sigmoid() + avg_pool2d()", "convs.1 + sigmoid() + avg_pool2d()")),
    "pool-first": Tutorial(PoolFirst, 28, ("conv1 + max_pool2d() + relu()", "conv2 + avg_pool2d()")),
    "scaled-tanh": Tutorial(Squashing, 28, ("c1 + mul() + tanh() + mul() + s2", "c3 + mul() + tanh() + mul() + s4")),
    "counted-features": Tutorial(
        CountedFeatures, 32, ("conv1 + relu() + max_pool2d()", "conv2 + relu() + max_pool2d()")
    ),
    "unfusable": Tutorial(
        Unfusable,
        28,
        (),
        (
            "conv1: stride (2, 2)",
            "conv2: groups 2",
            "conv3: add() comes before any pooling",
        ),
    ),
}
