"""Whether a model is as it was: what a native call asks that reads a model once and then relies on what it found."""

from typing import Any

from torch import nn

try:
    from ._snapshot import Record
except ImportError:  # nothing compiled

    class Record:
        """As csrc/snapshot.cpp."""

        def __init__(self, types: tuple, sizes: tuple, entries: tuple) -> None:
            self._types, self._sizes, self._entries = _groups(types, 2), _groups(sizes, 2), _groups(entries, 3)

        def holds(self) -> bool:
            """Whether all of it still is so."""
            return (
                all(type(value) is kind for value, kind in self._types)
                and all(len(owned) == size for owned, size in self._sizes)
                and all(_same(owned.get(key, _ABSENT), value) for owned, key, value in self._entries)
            )


_ABSENT = object()


def _groups(flat: tuple, size: int) -> list[tuple]:
    return list(zip(*[iter(flat)] * size, strict=True))


def _same(found: object, expected: object) -> bool:
    if found is expected:
        return True
    return isinstance(expected, int | float | str | tuple) and type(found) is type(expected) and found == expected


__all__ = ["FORWARD_HOOKS", "HOOKS", "Record", "Snapshot"]

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
        sizes: list[Any] = []  # dict, size, ...
        entries: list[Any] = []  # dict, key, value, ...
        self.is_observed = False
        for module in model.modules():
            state = vars(module)
            types += [module, type(module)]
            for owned in [state, *(state[name] for name in _OWNED + hooks)]:
                sizes += [owned, len(owned)]
            self.is_observed |= any(state[name] for name in hooks)
            for name, value in state.items():
                if name[0] != "_" and name != "training":
                    entries += [state, name, value]
            for owned in (state[name] for name in _OWNED):
                for name, value in owned.items():
                    entries += [owned, name, value]
        self._record = Record(tuple(types), tuple(sizes), tuple(entries))

    def holds(self) -> bool:
        """Whether all of it still is so."""
        return self._record.holds()
