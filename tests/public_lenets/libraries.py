"""LeNets of libraries and frameworks."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from .entry import lenet
from .pytorch import ExamplesMnist2017


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


@lenet("mmpretrain", shape=(1, 32, 32))
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
