"""Puts the CUDA operators that the shim runs where the CPU operators were. Only for a process of its own.

Then backend="native" on CPU tensors means csrc/bind_cuda.cpp and csrc/cuda/*, and the ordinary tests test those.
"""

import os
import warnings

import torch

import lenet_fast.ops

NAMESPACE = "lenet_fast_cuda_host"
LIBRARY = "LENET_FAST_CUDA_HOST"  # environment variable: the compiled library

_host = torch.library.Library(NAMESPACE, "DEF")
_cpu = torch.library.Library("lenet_fast", "IMPL")


def _redirect() -> None:
    names = [name + suffix for name in lenet_fast.ops.dispatched for suffix in ("", "_backward")]
    for name in [*names, "network_train"]:
        schema = str(getattr(torch.ops.lenet_fast, name).default._schema)
        _host.define(schema.removeprefix("lenet_fast::"))
    torch.ops.load_library(os.environ[LIBRARY])
    # The record that forward keeps for backward is the CPU kernels' own.
    lenet_fast.ops.DifferentiableOperator._records = lambda operator, args: False
    for name in names:
        operator = getattr(getattr(torch.ops, NAMESPACE), name).default
        _cpu.impl(name, operator, "CPU", allow_override=True)


with warnings.catch_warnings():
    warnings.filterwarnings("ignore", category=UserWarning)  # that this overrides the CPU kernels
    _redirect()
