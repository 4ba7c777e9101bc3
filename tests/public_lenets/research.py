"""LeNets of research on uncertainty, quantisation, regularisation and structure."""

import math
import random

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function, Variable

from .entry import first_of_some, lenet


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
    """XNOR-Net's LeNet: the second convolution binarised by a straight-through Function, its input too.

    Behind that convolution the maximum is an average here: sums of signs have ties, and rounding decides those.
    """

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, kernel_size=5, stride=1)
        self.bn_conv1 = nn.BatchNorm2d(20, eps=1e-4, momentum=0.1, affine=False)
        self.pool = nn.MaxPool2d(kernel_size=2, stride=2)
        self.bin_conv2 = BinConv2d(20, 50, kernel_size=5)
        self.pool2 = nn.AvgPool2d(kernel_size=2, stride=2)
        self.fc1 = nn.Linear(800, 84)
        self.fc2 = nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = BinActive.apply(self.bn_conv1(x))
        x = self.pool2(F.relu(self.bin_conv2(x)))
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


@lenet("functional-weights")
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
