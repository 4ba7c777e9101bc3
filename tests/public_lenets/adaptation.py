"""LeNets of domain adaptation, metric and adversarial learning."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

from .entry import first, lenet, second
from .repositories import KuangliuCifar


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
