"""What the Triton kernels take of a multiprocessor for the LeNets' layers, against a committed table. Needs no GPU.

`python scripts/triton_resources.py --write` writes tests/triton_resources.csv anew; it refuses kernels that spill.
"""

import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from resource_table import ROOT, Resources, ResourceTable

from lenet_fast.tables import LENET5_C3, Connections

ARCHITECTURES = (80, 90)
BATCHES = (128, 8192)  # their launch configurations differ
DTYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
}


def why_unavailable() -> str | None:
    """Why Triton cannot compile here; None when it can."""
    try:
        metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "the package triton is not installed"
    return None


def calls() -> Iterator[tuple[str, tuple]]:
    """An operator and its arguments, on the meta device, for each layer of the LeNets."""
    sparse = Connections.of(LENET5_C3).indices
    for batch in BATCHES:
        c1, c3 = (1, 28, 28, 6), (6, 14, 14, 16)
        yield "conv_act_pool", (*_tensors(batch, *c1), 2, "sigmoid", "avg")
        yield "conv_act_pool", (*_tensors(batch, *c1), 2, "relu", "max")
        yield "conv_act_pool", (*_tensors(batch, *c3), 0, "sigmoid", "avg")
        for dtype in (
            (torch.float32, torch.bfloat16) if batch == BATCHES[0] else (torch.float32, torch.float64, torch.float16)
        ):
            tensors = _tensors(batch, *c3, connections=len(sparse), dtype=dtype)
            yield "sparse_conv_act_pool", (*tensors, sparse, 16, 0, "tanh", "avg")
        maps = torch.empty(16, device="meta")
        tensors = _tensors(batch, *c3, connections=len(sparse))
        yield "conv_subsample", (*tensors, maps, maps, sparse, 0, "scaled_tanh")
    for dtype in DTYPES:
        if dtype.is_floating_point:
            shapes = (128, 400), (120, 400), (120,)
            yield "linear_act", (*(torch.empty(s, dtype=dtype, device="meta") for s in shapes), "sigmoid")
            yield "rbf", tuple(torch.empty(s, dtype=dtype, device="meta") for s in ((128, 84), (10, 84)))


def _tensors(
    batch: int,
    channels: int,
    height: int,
    width: int,
    maps: int,
    connections: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    weight = (connections, 5, 5) if connections else (maps, channels, 5, 5)
    return [
        torch.empty(shape, dtype=dtype, device="meta") for shape in ((batch, channels, height, width), weight, maps)
    ]


def launches() -> list[tuple]:
    """(kernel's name, signature, constants, divisible arguments, warps) of every launch of the calls, once each."""
    from lenet_fast import ops, triton_conv, triton_dense

    found = {}

    def record(kernel: Any, grid: tuple, *args: Any, **options: Any) -> None:
        warps = options.pop("num_warps", 4)
        values = dict(zip(kernel.arg_names, args, strict=False)) | options
        signature, constants, divisible = {}, {}, []
        for position, name in enumerate(kernel.arg_names):
            value = values[name]
            if isinstance(value, torch.Tensor):  # as Triton specialises at run time
                signature[name] = f"*{DTYPES[value.dtype]}"
                divisible.append(position)
            elif name in options or value == 1:
                signature[name] = "constexpr"
                constants[position] = value
            else:
                signature[name] = "i32"
                if value % 16 == 0:
                    divisible.append(position)
        launch = (kernel.__name__, signature, constants, divisible, warps)
        found[repr(launch)] = launch

    with mock.patch.object(triton_conv, "launch", record), mock.patch.object(triton_dense, "launch", record):
        for name, arguments in calls():
            output = ops.triton[name].run_triton(*arguments)
            tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
            needs = (tensors[0].shape[1] > 1, *(True for _ in tensors[1:]))  # nobody needs the gradient of the images
            ops.triton[name].run_triton_backward(torch.empty_like(output), *arguments, *needs)
    return list(found.values())


def compiled(launch: tuple, architecture: int) -> Any:
    """Triton's compiled kernel of one launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, signature, constants, divisible, warps = launch
    source = ASTSource(
        next(kernel for kernel in kernels() if kernel.__name__ == name),
        signature,
        {(position,): value for position, value in constants.items()},
        {(position,): [["tt.divisibility", 16]] for position in divisible},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})


def compile_launch(launch: tuple, architecture: int) -> Resources:
    """Compile one launch; what its kernel takes."""
    import triton

    name, signature, constants, divisible, warps = launch
    kernel = compiled(launch, architecture)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([str(cuobjdump), "-res-usage", file.name], capture_output=True, text=True, check=True)
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout)
    assert numbers, usage.stdout
    registers, stack, _, local = map(int, numbers.groups())
    names = list(signature)
    described = [f"{names[p]}={v}" for p, v in constants.items() if names[p].isupper()]
    sizes = [f"{names[p]}=1" for p in constants if not names[p].isupper()] + [
        f"{names[p]}%16" for p in divisible if signature[names[p]] == "i32"
    ]
    pointers = [dtype.removeprefix("*") for dtype in signature.values() if dtype.startswith("*")]
    label = f"{name}<{' '.join(pointers)}, {', '.join(described)}>({', '.join(sizes)})"
    return Resources(label, f"sm_{architecture}", 32 * warps, 1, registers, kernel.metadata.shared, stack, local)


def kernels() -> list[Any]:
    """The kernels of the package, functions that kernels call not among them."""
    from lenet_fast import triton_dense_kernels, triton_kernels

    found = vars(triton_kernels) | vars(triton_dense_kernels)
    return [value for name, value in found.items() if name.endswith("_kernel")]


def compile_all() -> list[Resources]:
    jobs = [(launch, architecture) for launch in launches() for architecture in ARCHITECTURES]
    # Not forked: whoever calls this may have threads, of JAX for one.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        kernels = sorted(pool.map(compile_launch, *zip(*jobs, strict=True)))
    assert len({resources.key for resources in kernels}) == len(kernels)
    return kernels


TABLE = ResourceTable(
    path=ROOT / "tests" / "triton_resources.csv",
    compiler="Triton",
    release="3.7.1",
    found_release=lambda: metadata.version("triton"),
    why_unavailable=why_unavailable,
    compile_all=compile_all,
)

if __name__ == "__main__":
    sys.exit(TABLE.main(sys.argv[1:], __doc__))
