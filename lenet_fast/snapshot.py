"""Whether a model is as it was: what a native call asks that reads a model once and then relies on what it found."""

from typing import Any

from torch import nn

try:
    from ._snapshot import holds
except ImportError:  # nothing compiled: nothing native that asks
    holds = None

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
