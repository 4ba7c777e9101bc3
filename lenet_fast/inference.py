"""What a trained network says: outputs, probabilities, accuracy."""

import torch
from torch import Tensor, nn

from . import data
from .models import InputSpec, classify, criterion
from .nn import MAPLoss


def outputs(model: nn.Module, input_spec: InputSpec, images: Tensor, batch_size: int = 1000) -> Tensor:
    """What `model` says to uint8 images (N, H, W): its outputs (N, 10), float64 on the CPU."""
    like = next(model.parameters())
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        parts = [model(input_spec.prepare(part.to(like.device), like.dtype)) for part in images.split(batch_size)]
    model.train(was_training)
    return torch.cat(parts).to("cpu", torch.float64)


def probabilities(model: nn.Module, outputs: Tensor) -> Tensor:
    """Of each class, (N, C), from outputs (N, C): what the model's loss is the negative logarithm of.

    A softmax, and for distances y the posterior exp(-y_c) / (exp(-j) + sum_i exp(-y_i)), LeCun et al. (1998),
    section II.C: what is missing to 1 is "none of them".
    """
    loss = criterion(model)
    if isinstance(loss, MAPLoss):
        none = torch.full_like(outputs[:, :1], loss.j)
        return torch.cat((outputs, none), 1).neg().softmax(1)[:, :-1]
    return outputs.softmax(1)


def evaluate(model: nn.Module, input_spec: InputSpec, split: data.Split, batch_size: int = 1000) -> float:
    """Share of the images of `split` that `model` classifies rightly, on its own device and dtype."""
    classes = classify(model, outputs(model, input_spec, split.images, batch_size))
    return (classes == split.labels.cpu()).sum().item() / len(split.labels)
