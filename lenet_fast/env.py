"""What is installed, what is used, and why something is not: the report behind `lenet-fast env`."""

import os
import platform
import sys
from collections.abc import Callable
from importlib import import_module, metadata, util

import torch

from . import backends
from ._version import __version__

_OPTIONAL_PACKAGES = ("triton", "matplotlib")


def facts() -> dict[str, str]:
    """The report as label -> value."""
    return {
        "lenet_fast": __version__,
        "Python": f"{platform.python_version()} ({sys.implementation.name})",
        "platform": f"{platform.system()} {platform.machine()}",
        "PyTorch": f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}",
        "threads": str(torch.get_num_threads()),
        "waiting threads": _wait_policy(),
        **_of_devices("kernels", backends.serving),
        **_of_devices("training", backends.training),
        **_build_facts(),
        **{name: _package_version(name) for name in _OPTIONAL_PACKAGES},
    }


def _of_devices(what: str, describe: Callable[[str], str]) -> dict[str, str]:
    """Of the CPU and of CUDA; of each GPU where they differ."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cuda"]
    answers = {gpu: describe(gpu) for gpu in gpus}
    if len(set(answers.values())) == 1:
        answers = {"cuda": answers[gpus[0]]}
    return {f"{what} on {device}": answer for device, answer in {"cpu": describe("cpu"), **answers}.items()}


def report() -> str:
    """`facts` as aligned lines."""
    rows = facts()
    width = max(map(len, rows))
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows.items())


def _wait_policy() -> str:
    policy = os.environ.get("OMP_WAIT_POLICY")
    if policy:
        return f"OMP_WAIT_POLICY={policy}"
    return "spin (OMP_WAIT_POLICY is not set); set it to passive before Python starts where other processes are busy"


def _build_facts() -> dict[str, str]:
    if util.find_spec("lenet_fast._build_info") is None:
        return {"build": "nothing compiled: plain PyTorch serves every operator"}
    build = import_module("lenet_fast._build_info")
    try:
        isa = build.selected_isa()
    except RuntimeError as error:
        isa = str(error)
    return {
        "CPU instruction set": f"{isa} (this machine runs {', '.join(build.supported_isas())})",
        "CUDA architectures": build.cuda_architectures or "none: built without CUDA kernels",
        "compiler": build.compiler,
        "compiler flags": build.flags,
        "built against": f"PyTorch {build.torch_version}, runs on 2.11 and later",
    }


def _package_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
