"""Who competes in inference of whole networks: ours, PyTorch, JAX, ONNX Runtime and OpenVINO."""

import copy
import io
import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax_networks
import torch
from networks import Task, plain
from torch import Tensor
from unavailable import Unavailable

Infer = Callable[[], Tensor]  # -> outputs of the task's images


@dataclass(frozen=True)
class Contestant:
    """One way to run a network. Called under `torch.inference_mode()`."""

    prepare: Callable[[Task], Infer]
    compiled: bool = False  # or made by another compiler: sums in another order
    dtype: str = "float32"  # of the arithmetic


def fused(task: Task) -> Infer:
    """The model as a user has it, `model.eval()`."""
    model = copy.deepcopy(task.model).eval()
    return lambda: model(task.images)


@dataclass(frozen=True)
class Plain:
    """How plain PyTorch runs a network. Calling it with a task makes the network ready."""

    memory_format: torch.memory_format = torch.contiguous_format
    compile_options: Mapping[str, object] | None = None  # None: eager
    autocasts: bool = False
    dtype: torch.dtype = torch.float32

    def __call__(self, task: Task) -> Infer:
        model = plain(task.model).eval().to(self.dtype, memory_format=self.memory_format)
        images = task.images.to(self.dtype)

        def infer(images: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16) if self.autocasts else nullcontext():
                return model(images)

        if self.compile_options is not None:
            infer = torch.compile(infer, fullgraph=True, dynamic=False, options=dict(self.compile_options))
        return lambda: infer(images)


# ---- Runtimes that take ONNX


def _onnx(task: Task) -> bytes:
    """The network for batches of the task's size, its masks folded into the weights.

    Raises:
        Unavailable: the packages that PyTorch exports with are missing.
    """
    file = io.BytesIO()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it would list what it does not need either
    model = plain(task.model).eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's exporter warns of itself
            with torch.inference_mode(False), torch.no_grad():
                torch.onnx.export(model, (torch.zeros_like(task.images),), dynamo=True, verbose=False).save(file)
    except (ImportError, torch.onnx.OnnxExporterError) as error:
        raise Unavailable(f"no export to ONNX: {str(error).splitlines()[0]}") from error
    return file.getvalue()


def onnxruntime(task: Task) -> Infer:
    """Float32 on as many threads as PyTorch has."""
    try:
        import onnxruntime
    except ImportError:
        raise Unavailable("onnxruntime is not installed") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between calls, while others are timed
    session = onnxruntime.InferenceSession(_onnx(task), options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: task.images.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def openvino(task: Task) -> Infer:
    """Float32 on as many threads as PyTorch has, for the shortest time of one call, without copies of the data."""
    try:
        import openvino
    except ImportError:
        raise Unavailable("openvino is not installed") from None
    core = openvino.Core()
    settings: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(core.read_model(_onnx(task)), "CPU", settings).create_infer_request()
    images = [task.images.numpy()]
    return lambda: torch.from_numpy(request.infer(images, share_inputs=True, share_outputs=True)[0])


JUDGE = Plain(dtype=torch.float64)
EAGER = Plain()
OURS = "fused"
_FREEZING: Mapping[str, object] = {"freezing": True}  # weights as constants: its best
_TUNED = {**_FREEZING, "max_autotune": True, "coordinate_descent_tuning": True}
CONTESTANTS: Mapping[str, Contestant] = {
    OURS: Contestant(fused),
    "eager": Contestant(EAGER),
    "eager-channels-last": Contestant(Plain(torch.channels_last)),
    "compile": Contestant(Plain(compile_options=_FREEZING), compiled=True),
    "compile-channels-last": Contestant(Plain(torch.channels_last, _FREEZING), compiled=True),
    "compile-max-autotune": Contestant(Plain(torch.channels_last, _TUNED), compiled=True),
    "compile-bfloat16": Contestant(
        Plain(torch.channels_last, _FREEZING, autocasts=True), compiled=True, dtype="bfloat16 autocast"
    ),
    "jax": Contestant(jax_networks.infer, compiled=True),
    "onnxruntime": Contestant(onnxruntime, compiled=True),
    "openvino": Contestant(openvino, compiled=True),
}
