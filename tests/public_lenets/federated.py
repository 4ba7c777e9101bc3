"""LeNets of federated, continual and distributed learning."""

import torch
import torch.nn.functional as F
from torch import nn

from .entry import lenet
from .pytorch import ExamplesMnist2017


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
