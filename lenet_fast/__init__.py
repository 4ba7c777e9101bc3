"""Fused convolution + activation + pooling and LeCun's sparse C3 layer as PyTorch operators, layers and models."""

from . import functional, models, nn, tables
from ._version import __version__
from .accelerate import accelerate, restore
from .trainer import FusedTrainer

__all__ = ["FusedTrainer", "__version__", "accelerate", "functional", "models", "nn", "restore", "tables"]
