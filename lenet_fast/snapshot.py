"""Whether a model is as it was: what a native call asks that reads a model once and then relies on what it found."""

from collections.abc import Iterator
from typing import Any

from torch import nn

try:
    from ._snapshot import holds
except ImportError:  # nothing compiled

    def holds(types: tuple, lengths: tuple, entries: tuple) -> bool:
        """As csrc/snapshot.cpp."""

        def groups(flat: tuple, size: int) -> Iterator[tuple]:
            return zip(*[iter(flat)] * size, strict=True)

        return (
            all(type(value) is kind for value, kind in groups(types, 2))
            and all(len(owned) == length for owned, length in groups(lengths, 2))
            and all(_same(owned.get(key, _ABSENT), value) for owned, key, value in groups(entries, 3))
        )


_ABSENT = object()


def _same(found: object, expected: object) -> bool:
    if found is expected:
        return True
    return isinstance(expected, int | float | str | tuple) and type(found) is type(expected) and found == expected


__all__ = ["FORWARD_HOOKS", "HOOKS", "Snapshot", "holds"]

FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
HOOKS = (*FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks")
_OWNED = ("_parameters", "_buffers", "_modules")


class Snapshot:
    """What of `model` its forward depends on, as it is now; parameters and buffers as objects, not their values.

    Comparing takes 1 us a LeNet: a step on one image takes some ten of them.

    Args:
        hooks: which ones count.
    """

    def __init__(self, model: nn.Module, hooks: tuple[str, ...] = HOOKS) -> None:
        types: list[Any] = []  # object, type, ...: see csrc/snapshot.cpp
        lengths: list[Any] = []  # dict, length, ...
        entries: list[Any] = []  # dict, key, value, ...
        self.is_observed = False
        for module in model.modules():
            state = vars(module)
            types += [module, type(module)]
            for owned in [state, *(state[name] for name in _OWNED + hooks)]:
                lengths += [owned, len(owned)]
            self.is_observed |= any(state[name] for name in hooks)
            for name, value in state.items():
                if name[0] != "_" and name != "training":
                    entries += [state, name, value]
            for owned in (state[name] for name in _OWNED):
                for name, value in owned.items():
                    entries += [owned, name, value]
        self._expected = tuple(types), tuple(lengths), tuple(entries)

    def holds(self) -> bool:
        """Whether all of it still is so."""
        return holds(*self._expected)
