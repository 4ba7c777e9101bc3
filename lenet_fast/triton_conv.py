"""The fused convolutions on the Triton kernels: shapes and launch configurations. Importing this imports Triton."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from triton import next_power_of_2

from . import reference
from . import triton_kernels as kernels
from .triton_launch import INTERPRETED, PROGRAMS, TYPICAL_BATCH, cdiv, hint, is_plain, launch

_SUM_DTYPES = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


class Convolution:
    """One call of any fused convolution: its tensors made contiguous, its sizes and its launches.

    Args:
        coefficient, pool_bias: of the subsampling, which then takes the place of `pool`.
        connections: positions of the pairs in a table (out_channels, in_channels); None: all of them.
        out_channels: counts where there are connections; a dense weight tells itself.
    """

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        coefficient: Tensor | None,
        pool_bias: Tensor | None,
        connections: Sequence[int] | None,
        out_channels: int,
        padding: int,
        activation: str,
        pool: str,
    ) -> None:
        maps = weight.shape[0] if connections is None else out_channels
        _check_tensors(input, weight=weight, bias=bias, coefficient=coefficient, pool_bias=pool_bias)
        if activation not in reference.ACTIVATIONS or pool not in reference.POOLS:
            raise RuntimeError(f"activation, pool: {activation!r}, {pool!r}")
        leading = (maps, input.shape[1]) if connections is None else (len(connections),)
        if maps < 1 or weight.dim() != len(leading) + 2 or weight.shape[:-2] != leading:
            raise RuntimeError(f"weight: expected {leading} square kernels, got shape {tuple(weight.shape)}")
        if weight.shape[-1] != weight.shape[-2] or weight.shape[-1] < 1:
            raise RuntimeError(f"weight: expected square kernels, got shape {tuple(weight.shape)}")
        if any(t is not None and t.shape != (maps,) for t in (bias, coefficient, pool_bias)):
            raise RuntimeError(f"bias, coefficient, pool_bias: expected shape ({maps},)")
        pool = pool if coefficient is None else "subsample"
        self.input = input.contiguous()
        self.weight = weight.contiguous()
        self.batch, self.channels, self.height, self.width = input.shape
        self.maps = int(maps)
        self.kernel_size = int(weight.shape[-1])  # a constant of the kernels, also where a graph has dynamic shapes
        self.connections = maps * self.channels if connections is None else len(connections)
        window = 1 if pool == "none" else 2
        self.out_height, self.out_width = (
            (size + 2 * padding - self.kernel_size + 1) // window for size in (self.height, self.width)
        )
        if padding < 0 or self.out_height < 1 or self.out_width < 1:
            raise RuntimeError(f"padding: {padding} around {self.height}x{self.width} pixels leaves no output")
        if (self.height + 2 * padding) * (self.width + 2 * padding) >= 2**30:  # offsets in a plane have 32 bits
            raise RuntimeError(f"padding: {padding} around {self.height}x{self.width} pixels makes more than 2**30")
        self.table = self.weight if connections is None else _connection_table(connections, maps, self.channels, input)
        # A kernel ignores the pointers that its constants say are absent; any tensor will do there.
        self.bias, self.coefficient, self.pool_bias = (
            self.weight if t is None else t.contiguous() for t in (bias, coefficient, pool_bias)
        )
        self.padding = padding
        self.window = window
        self.options = {
            "K": self.kernel_size,
            "ACTIVATION": activation,
            "POOL": pool,
            "SPARSE": connections is not None,
            "BIAS": bias is not None,
            "PADDED": padding > 0,
        }

    def forward(self) -> Tensor:
        """Output (N, out_channels, H, W)."""
        output = self.input.new_empty((self.batch, self.maps, self.out_height, self.out_width))
        grid, tiles = _pixel_grid(self.batch, self.out_height * self.out_width, self.maps, self.window**2, output.dtype)
        launch(kernels.conv_act_pool_kernel, grid, *self._operands(), output, *self._sizes(), **self.options, **tiles)
        return output

    def backward(self, grad_output: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
        """Gradients of the first `len(needs)` tensors; an empty one for each that is not needed."""
        need_input, need_weight, need_bias, *need_pool = needs
        expected = (self.batch, self.maps, self.out_height, self.out_width)
        if grad_output.shape != expected:
            raise RuntimeError(f"grad_output: expected shape {expected}, got {tuple(grad_output.shape)}")
        _check_tensors(self.input, grad_output=grad_output)
        grads = [self.input.new_empty(0) for _ in needs]
        pixels = self.out_height * self.out_width
        grid, tiles = _pixel_grid(self.batch, pixels, self.maps, self.window**2, self.input.dtype)
        subsample = self.options["POOL"] == "subsample"
        shape = self.batch, self.maps, self.window * self.out_height, self.window * self.out_width
        grad = self.input.new_empty(shape, dtype=_SUM_DTYPES[self.input.dtype])
        partials = grad.new_empty((grid[0], 2 * self.maps) if subsample else 0)
        launch(
            kernels.pre_activation_gradient_kernel,
            grid,
            grad_output.contiguous(),
            *self._operands(),
            grad,
            partials,
            *self._sizes(),
            **self.options,
            **tiles,
        )
        if any(need_pool):
            pool_grads = torch.empty_like(self.coefficient), torch.empty_like(self.pool_bias)
            _sum_rows(partials, *pool_grads)
            grads[3:] = (g if need else e for g, need, e in zip(pool_grads, need_pool, grads[3:], strict=True))
        if need_weight or need_bias:
            grad_weight, grad_bias = self._parameter_gradients(grad)
            grads[1] = grad_weight if need_weight else grads[1]
            grads[2] = grad_bias if need_bias and self.options["BIAS"] else grads[2]
        if need_input:
            grads[0] = self._input_gradient(grad)
        return tuple(grads)

    def _parameter_gradients(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        kernel_area = self.kernel_size**2
        pixels = grad.shape[2] * grad.shape[3]
        tiles = _weight_tiles(self.maps, self.channels * kernel_area + 1, grad.dtype, pixels)
        programs = cdiv(self.maps, tiles["MAPS"]) * cdiv(self.channels * kernel_area + 1, tiles["TAPS"])
        images = _images_per_program(programs * cdiv(pixels, tiles["PIXELS"]), self.batch, tiles["IMAGES"])
        rows = cdiv(pixels, tiles["PIXELS"]) * cdiv(self.batch, images)
        partials = grad.new_empty((rows, self.connections * kernel_area + self.maps))
        launch(
            kernels.weight_gradient_kernel,
            (rows * programs,),
            grad,
            self.input,
            self.table,
            partials,
            *self._sizes(grad),
            self.connections,
            images,
            K=self.kernel_size,
            SPARSE=self.options["SPARSE"],
            **tiles,
        )
        grad_weight = torch.empty_like(self.weight)
        grad_bias = self.weight.new_empty(self.maps)
        _sum_rows(partials, grad_weight, grad_bias)
        return grad_weight, grad_bias

    def _input_gradient(self, grad: Tensor) -> Tensor:
        grad_input = torch.empty_like(self.input)
        grid, tiles = _pixel_grid(self.batch, self.height * self.width, self.channels, 1, self.input.dtype)
        launch(
            kernels.input_gradient_kernel,
            grid,
            grad,
            self.weight,
            self.table,
            grad_input,
            *self._sizes(grad),
            K=self.kernel_size,
            SPARSE=self.options["SPARSE"],
            CHANNELS=tiles.pop("MAPS"),
            **tiles,
        )
        return grad_input

    def _operands(self) -> tuple[Tensor, ...]:
        return self.input, self.weight, self.bias, self.coefficient, self.pool_bias, self.table

    def _sizes(self, grad: Tensor | None = None) -> tuple[int, ...]:
        """The integer arguments of every kernel; with the sizes of the pre-activation gradient where it is read."""
        sizes = (self.out_height, self.out_width) if grad is None else grad.shape[2:]
        return self.batch, self.channels, self.height, self.width, self.maps, *sizes, self.padding


def _sum_rows(partials: Tensor, first: Tensor, second: Tensor) -> None:
    """Fill `first` and `second` with the sums of the rows, which hold the values of both one after the other."""
    rows, columns = partials.shape
    block = 64
    launch(
        kernels.sum_rows_kernel,
        (cdiv(columns, block),),
        partials,
        first,
        second,
        rows,
        columns,
        first.numel(),
        ROWS=32,
        COLUMNS=block,
    )


# --- launch configurations: functions of the shape alone, so that a call rounds the same on every run ----------------
# Under the interpreter, where an operation costs the same whatever its size: large tiles, few programs.


def _pixel_grid(
    batch: int, pixels: int, maps: int, window: int, dtype: torch.dtype
) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tiles of a kernel with a program for BLOCK pixels and MAPS maps."""
    if INTERPRETED:
        block, tile, warps = min(1024, next_power_of_2(max(1, batch * pixels))), min(16, next_power_of_2(maps)), 4
    else:
        # 64 sums a thread in registers (float64: 16): the more maps and pixels share a load, the better, until there
        # are too few programs for the device. More would spill, as ptxas says (scripts/triton_resources.py).
        sums = 16 if dtype == torch.float64 else 64
        tile = min(next_power_of_2(maps), 16 if window == 1 else 4 if dtype == torch.float64 else 8)
        per_thread, warps = max(1, min(4, sums // (tile * window))), 4
        total = hint(batch, TYPICAL_BATCH) * hint(pixels, 1024)
        while cdiv(total, 32 * warps * per_thread) * cdiv(maps, tile) < PROGRAMS and tile > 1:
            if per_thread > 1:
                per_thread //= 2
            elif warps > 1:
                warps //= 2
            else:
                tile //= 2
        block = 32 * warps * per_thread
    return (cdiv(batch * pixels, block), cdiv(maps, tile)), {"MAPS": tile, "BLOCK": block, "num_warps": warps}


def _weight_tiles(maps: int, taps: int, dtype: torch.dtype, pixels: int) -> dict[str, int]:
    """Tiles of the weight gradient: a thread holds MAPS * TAPS sums, IMAGES * PIXELS are the threads."""
    pixels = next_power_of_2(hint(pixels, 1024))
    if INTERPRETED:
        maps_limit, taps_limit, pixels_limit, lanes = 16, 32, 1024, 2048
    else:
        maps_limit, taps_limit, pixels_limit, lanes = 8, 4 if dtype == torch.float64 else 8, 32, 128
    pixels = min(pixels, pixels_limit)
    return {
        "MAPS": min(maps_limit, next_power_of_2(maps)),
        "TAPS": min(taps_limit, next_power_of_2(taps)),
        "IMAGES": lanes // pixels,
        "PIXELS": pixels,
        "num_warps": 4,
    }


def _images_per_program(programs: int, batch: int, step: int) -> int:
    """Images that a program of the weight gradient loops over, a multiple of `step`; `programs` do one such share."""
    shares = 2 if INTERPRETED else max(1, 4 * PROGRAMS // hint(programs, PROGRAMS))
    return max(1, cdiv(hint(batch, TYPICAL_BATCH), shares * step)) * step


# --- arguments ------------------------------------------------------------------------------------------------------


def _connection_table(connections: Sequence[int], maps: int, channels: int, input: Tensor) -> Tensor:
    """int32 (maps * channels): the connection of each pair, -1 where there is none; on the device of `input`."""
    make = _cached_table if is_plain(input) else _make_table  # a traced graph must not hold another mode's tensor
    return make(tuple(connections), int(maps), int(channels), input.device)


def _make_table(connections: tuple[int, ...], maps: int, channels: int, device: torch.device) -> Tensor:
    table = [-1] * (maps * channels)
    if not all(a < b for a, b in pairwise((-1, *connections, len(table)))):
        raise RuntimeError(f"connections: expected ascending, at least 0 and below {len(table)}, got {connections}")
    for index, position in enumerate(connections):
        table[position] = index
    return torch.tensor(table, dtype=torch.int32, device=device)


_cached_table = lru_cache(maxsize=256)(_make_table)


def _check_tensors(input: Tensor, **others: Tensor | None) -> None:
    if input.dim() != 4 or input.dtype not in _SUM_DTYPES:
        raise RuntimeError(f"input: expected (N, C, H, W), floating, got {tuple(input.shape)} of {input.dtype}")
    for name, tensor in others.items():
        if tensor is not None and (tensor.dtype != input.dtype or tensor.device != input.device):
            raise RuntimeError(
                f"{name}: expected {input.dtype} on device {input.device} as input, "
                f"got {tensor.dtype} on {tensor.device}"
            )
