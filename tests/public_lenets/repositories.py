"""LeNets of courses and of repositories that collect networks."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from .entry import first, lenet, logits
from .libraries import AvalancheLeNet5


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
