"""Finds the network in a model, and knows whether it still is the same one."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .captured import Reading, read_forward
from .eager import is_intercepted
from .fusable import is_observed
from .links import OBSERVED, Link, NetworkError, links_of_layers
from .network import Network
from .snapshot import Snapshot

__all__ = ["Reader"]

_MOST_BATCHES = 8  # kinds of batches of which one unchanged model is read
_MOST_ATTEMPTS = 3  # to read one forward that cannot be read: each takes some tenths of a second


class Reader:
    """Reads a model when it is asked for its network, and again when the model has changed.

    Layers that an nn.Sequential calls are read at once. A forward that someone wrote is read when the shape of a batch
    is known, by `captured.read_forward`, that is by Dynamo, which is imported then.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._snapshot: Snapshot | None = None
        self._failures = 0  # to read a forward, one after the other, whatever changed in between
        self._pause = 0  # questions that are answered with the last failure

    def __reduce__(self) -> tuple:
        return Reader, (self.model,)

    @property
    def is_handwritten(self) -> bool:
        """Whether the shape of a batch is needed."""
        self._look()
        return self._refusal is None and self._network is None

    def network(self, shapes: Iterable[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> Network:
        """The network that the model is for batches of these shapes; the same object while nothing has changed.

        Raises:
            NetworkError: it is none, or not the same one for all of them.
        """
        self._look()
        if self._refusal is not None:
            raise NetworkError(self._refusal)
        if self._network is not None:
            return self._network
        readings = [self._read(shape, dtype, device) for shape in shapes]
        for reading in readings[1:]:
            if not reading.same_as(readings[0]):
                raise NetworkError(f"{type(self.model).__name__}: another network for a batch of another size")
        if self._captured is None or not self._captured[0].same_as(readings[0]):
            self._captured = readings[0], Network.of_links(self._bound(readings[0]))
        return self._captured[1]

    def _look(self) -> None:
        """See to it that what is known is of the model as it is now."""
        if (
            self._snapshot is not None
            and self._snapshot.holds()
            and all(layer.training is mode for layer, mode in self._dropouts)
        ):
            return
        self._refusal: str | None = None
        self._network: Network | None = None
        if any(isinstance(layer, torch.jit.ScriptModule) for layer in self.model.modules()):
            self._refusal = f"{type(self.model).__name__}: native steps do not read TorchScript"
            return
        self._snapshot = Snapshot(self.model)
        dropouts = (layer for layer in self.model.modules() if isinstance(layer, nn.Dropout | nn.Dropout2d))
        self._dropouts = [(layer, layer.training) for layer in dropouts]  # of whose modes a snapshot knows nothing
        self._captured: tuple[Reading, Network] | None = None
        self._unread: dict[tuple, str] = {}  # why batches of a shape, in a mode of the model, have no network
        try:
            links = links_of_layers(self.model)
            if any(isinstance(layer, DistributedDataParallel) for layer in self.model.modules()):
                raise NetworkError("DistributedDataParallel: native steps do not average gradients over processes")
            if self._snapshot.is_observed:
                raise NetworkError(f"{_observed(self.model)}: {OBSERVED}")
            if links is not None:
                self._network = Network.of_links(links)
        except NetworkError as error:
            self._refusal = str(error)

    def _read(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Reading:
        if is_intercepted():
            raise NetworkError("someone listens to PyTorch's operators, which native steps do not call")
        if self._unread:
            reason = self._unread.get(self._key(shape, dtype))
            if reason is None and len(self._unread) >= _MOST_BATCHES:
                reason = next(iter(self._unread.values()))
            if reason is not None:
                raise NetworkError(reason)
        if self._pause:
            self._pause -= 1
            raise NetworkError(self._last_reason)
        try:
            reading = read_forward(self.model, shape, dtype, device)
        except NetworkError as error:
            self._unread[self._key(shape, dtype)] = self._last_reason = str(error)
            self._failures += 1
            if self._failures >= _MOST_ATTEMPTS:  # perhaps the forward changes the model: it would fail in every step
                self._pause = 1 << min(self._failures, 16)
            raise
        self._failures = 0
        return reading

    def _key(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple:
        return shape, dtype, tuple(module.training for module in self.model.modules())

    def _bound(self, reading: Reading) -> Iterator[Link]:
        """The links with the tensors that they have now, and their names."""
        parameters = {id(p): name for name, p in self.model.named_parameters()}
        for link in reading.links:
            tensors, label = {}, link.label
            for role, place in link.tensors.items():
                tensor = reading.tensors[place]
                name = parameters.get(id(tensor), f"{label}.{role}")
                if role != "codes" and id(tensor) not in parameters:
                    raise NetworkError(f"{label}: its {role} is no parameter of the model")
                if role == "weight" and label.endswith(")"):  # a call: the layer has the better name
                    label = name.removesuffix(".weight")
                tensors[role] = name, tensor
            yield Link(label, link.kind, link.options, tensors)


def _observed(model: nn.Module) -> str:
    return next(name or type(model).__name__ for name, layer in model.named_modules() if is_observed(layer))
