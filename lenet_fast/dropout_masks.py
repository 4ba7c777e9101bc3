"""The masks with which the native training steps drop values: a function of numbers, the same on every device.

A value's mask is drawn by Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011), a function
of a key of 64 bits and a counter of four words of 32 bits to four words:

- the key is the seed;
- the counter is (index // 4, image, step, 2 * place + maps). `index` is that of the value among the (C, H, W) values of
  an image, or that of the map where whole maps are dropped; `image` that of the image in its batch; `step` that of the
  step in the training; `place` counts the inputs of the layers from 0 on, and last the output of the last layer; `maps`
  is 1 where whole maps are dropped, else 0;
- the word at `index % 4` decides: less than p * 2^32 and the value is dropped, else it is multiplied by 1 / (1 - p).

csrc/dropout.h and csrc/philox.h are the same in C++.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["mask"]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_INCREMENTS = 0x9E3779B9, 0xBB67AE85


def _wide_product(multiplier: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of a product; int64 would overflow, so that it is made of two."""
    upper, lower = multiplier * (words >> 16), multiplier * (words & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, ((upper << 16) + lower) & _WORD


def philox(counter: Sequence[Tensor | int], key: int) -> Tensor:
    """Philox4x32-10; does not check its arguments, which `mask` does.

    Args:
        counter: four words, int64 tensors or numbers of 0 to 2^32 - 1 whose shapes broadcast.
        key: 64 bits.

    Returns:
        (..., 4) int64, four words for each counter.
    """
    a, b, c, d = torch.broadcast_tensors(*(torch.as_tensor(word, dtype=torch.int64) for word in counter))
    keys = [key & _WORD, key >> 32 & _WORD]
    for _ in range(10):
        upper_a, lower_a = _wide_product(_MULTIPLIERS[0], a)
        upper_c, lower_c = _wide_product(_MULTIPLIERS[1], c)
        a, b, c, d = upper_c ^ b ^ keys[0], lower_c, upper_a ^ d ^ keys[1], lower_a
        keys = [(key + increment) & _WORD for key, increment in zip(keys, _KEY_INCREMENTS, strict=True)]
    return torch.stack((a, b, c, d), -1)


def _check_int(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name}: expected an int from {least} to {most}, got {value!r}")


def mask(
    seed: int,
    step: int,
    place: int,
    shape: Sequence[int],
    p: float,
    *,
    maps: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """What the native steps multiply the input of a layer, or the output of the last, with.

    Args:
        seed: of the training, see `torch.ops.lenet_fast.network_train`: 64 bits, with a sign or without.
        step: index of the step in the training, 32 bits.
        place: index of the layer whose input it is, convolutions before dense layers; their number for the output.
        shape: (N, ...) of a batch, at `place` 0 to the first dense layer's (N, C, H, W): in the order of memory the
            values are the same as those of (N, C * H * W).
        p: the probability of dropping, from 0 to 1.
        maps: drop whole maps: all values that agree in the first two coordinates.
        dtype: float32 or float64, which are those of the native steps.
        device: where the mask is computed, the CPU where it is not given.

    Returns:
        A tensor of that shape and dtype: 0 or 1 / (1 - p).

    Raises:
        ValueError: an argument of another type or out of its range.
    """
    _check_int("seed", seed, -(2**63), 2**64 - 1)
    _check_int("step", step, 0, _WORD)
    _check_int("place", place, 0, _WORD // 2)
    if not isinstance(shape, Sequence) or len(shape) < 2:
        raise ValueError(f"shape: expected (N, C, ...), got {shape!r}")
    for length in shape:
        _check_int("shape", length, 0, _WORD)
    if not isinstance(p, int | float) or not 0 <= p <= 1:
        raise ValueError(f"p: expected a probability from 0 to 1, got {p!r}")
    if not isinstance(maps, bool):
        raise ValueError(f"maps: expected True or False, got {maps!r}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: expected torch.float32 or torch.float64, got {dtype!r}")
    number = shape[1] if maps else math.prod(shape[1:])
    images = torch.arange(shape[0], device=device)[:, None]
    blocks = torch.arange((number + 3) // 4, device=device)
    words = philox((blocks, images, step, 2 * place + maps), seed).flatten(1)[:, :number]
    scale = 1 / (1 - p) if p < 1 else 0.0
    drawn = torch.zeros(words.shape, dtype=dtype, device=device).masked_fill_(words >= math.ceil(p * 2**32), scale)
    if maps:
        return drawn.reshape(*shape[:2], *[1] * (len(shape) - 2)).expand(*shape).clone()
    return drawn.reshape(*shape)
