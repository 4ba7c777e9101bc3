"""Whether a model is as it was: what a native call asks that reads a model once and then relies on what it found."""

from typing import Any

from torch import nn

try:
    from ._snapshot import Record
except ImportError:  # nothing compiled

    class Record:
        """As csrc/snapshot.cpp."""

        def __init__(self, objects: tuple, dicts: tuple) -> None:
            self._objects, self._dicts = (
                list(zip(*[iter(flat)] * size, strict=True)) for flat, size in ((objects, 3), (dicts, 2))
            )

        def holds(self) -> bool:
            """Whether all of it still is so."""
            return all(
                type(found) is kind and (own is ... or found.__dict__ is own) for found, kind, own in self._objects
            ) and all(_has_items(owned, items) for owned, items in self._dicts)


def _has_items(owned: dict, items: tuple) -> bool:
    return 2 * len(owned) == len(items) and all(
        _same(key, expected) and _same(value, expected_value)
        for (key, value), expected, expected_value in zip(list(owned.items()), items[::2], items[1::2], strict=True)
    )


def _same(found: object, expected: object) -> bool:
    if found is expected or expected is ...:
        return True
    if not isinstance(expected, int | float | str | tuple | list) or type(found) is not type(expected):
        return False
    try:
        return bool(found == expected)
    except Exception:  # elements that cannot be compared: they are not those that were there
        return False


__all__ = ["FORWARD_HOOKS", "HOOKS", "Record", "Snapshot", "items_of"]

FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
HOOKS = (*FORWARD_HOOKS, "_backward_hooks", "_backward_pre_hooks")
_OWNED = ("_parameters", "_buffers", "_modules")
_MODULE_STATE = frozenset(vars(nn.Module()))  # what every module has, beside what its class gives it


def items_of(owned: dict) -> tuple:
    """The items of a dictionary as `Record` takes them: key, value, key, value, ..."""
    return tuple(part for item in owned.items() for part in item)


class Snapshot:
    """What of `model` its forward depends on, as it is now; parameters and buffers as objects, not their values.

    The order of layers counts: it is the order in which an nn.Sequential calls them. `training` does not count.
    Comparing takes 1 us a LeNet: a step on one image takes some ten of them.

    Args:
        hooks: which ones count.
    """

    def __init__(self, model: nn.Module, hooks: tuple[str, ...] = HOOKS) -> None:
        objects: list[Any] = []  # object, type, its dict, ...: see csrc/snapshot.cpp
        dicts: list[Any] = []  # dict, items, ...
        self.is_observed = False
        for module in model.modules():
            state = vars(module)
            objects += [module, type(module), state]
            counted = {*_OWNED, *hooks}
            own = {
                name: value if name in counted or name not in _MODULE_STATE else ... for name, value in state.items()
            }
            if not state["_modules"]:  # the option of a layer may be a list, which can change and stay the same object
                own |= {name: list(value) for name, value in own.items() if type(value) is list}
            for owned in (state, *(state[name] for name in counted)):
                dicts += [owned, items_of(own if owned is state else owned)]
            for tensor in (*state["_parameters"].values(), *state["_buffers"].values()):
                if tensor is not None:
                    objects += [tensor, type(tensor), ...]  # torch.utils.swap_tensors changes the type of an object
            self.is_observed |= any(state[name] for name in hooks)
        self._record = Record(tuple(objects), tuple(dicts))

    def holds(self) -> bool:
        """Whether all of it still is so."""
        return self._record.holds()
