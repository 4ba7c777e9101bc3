"""`FusedTrainer`: whole LeNet training steps, forward, loss, backward and update, many in a call."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .eager import check_memory
from .functional import check_choice
from .lenet import InputSpec
from .loss import Loss
from .training_steps import Masks, TrainingSteps
from .watch import Watch

__all__ = ["FusedTrainer", "History", "TrainingError"]

_CONVERTED = (torch.int32, torch.int16, torch.int8, torch.uint8)  # labels of these dtypes are copied first

OnStep = Callable[[int, float], None]

_CALL_SECONDS = 0.1  # of a native call on the CPU: how long Ctrl-C waits


class TrainingError(RuntimeError):
    """Training cannot go on: a loss or parameter is not finite."""


@dataclass(frozen=True)
class History:
    """What a run saw, step by step, before each update.

    Args:
        losses: mean loss of each batch, float64 (epochs, steps of an epoch).
        correct: images of each batch that were classified rightly, int64 of the same shape.
        images: of an epoch.
    """

    losses: Tensor
    correct: Tensor
    images: int

    @property
    def accuracy(self) -> list[float]:
        """Share of the images classified rightly in each epoch."""
        return [right / self.images for right in self.correct.sum(1).tolist()]


class FusedTrainer:
    """Trains a model in place, where it can many steps in one native call: forward, loss, backward and update.

    Every model that PyTorch can train with its loss is trained, in one of two ways; `how` tells in which.

    *Whole steps in native code*, without autograd: every model of `lenet_fast.models`, its `.reference()` twin, and any
    other module whose forward is a chain of one to four convolution blocks (dense or sparse connections or trainable
    subsampling, any activation and pooling), a flattening and one to four dense layers, perhaps with an `nn.RBF` at the
    end. A forward that someone wrote by hand is read by PyTorch's tracer Dynamo, at the first batch.

    *The accelerated forward, autograd and the fused `torch.optim` optimizer* for everything else: other layers, hooks,
    parametrizations, shared parameters, half precision, a loss of the user's own.

    The loss is softmax cross-entropy, or LeCun's MAP loss behind an RBF layer. The model stays an ordinary one: its
    parameters are updated in place, and evaluation, `state_dict` and further training with plain PyTorch go on from
    there. Steps put it into training mode if it is not; layers of it that are in eval mode stay so.

    `optimizer` is a `torch.optim` optimizer over the parameters of the model, whose settings and state are those of the
    training: learning-rate schedulers and `optimizer.step()` work on it, and its `state_dict` is PyTorch's.

    On CUDA a native run is one launch. A network that does not fit a multiprocessor's shared memory, or of dtype
    float64, takes its steps in CUDA graphs of the operators, autograd and torch.optim instead, which a warning says.
    There a learning rate is rounded to float32, and every other setting that changes makes new graphs.

    With the same number of threads, or on the same kind of GPU, a native training repeats itself to the bit.

    Args:
        model: parameters that do not require gradients stay as they are.
        optimizer: "sgd", "adam" or "adamw", by PyTorch's definitions.
        lr: learning rate.
        momentum, nesterov: of sgd.
        weight_decay: L2 penalty; of adamw decoupled.
        betas, eps: of adam and adamw.
        j: of the MAP loss, see `nn.MAPLoss`.
        label_smoothing: of cross-entropy, from 0 to 1, see `torch.nn.CrossEntropyLoss`.
        loss: a function of the model's outputs and the labels that returns a scalar tensor, in place of those losses.
            `torch.nn.CrossEntropyLoss`, `nn.MAPLoss` behind an RBF layer and `torch.nn.NLLLoss` behind a log_softmax,
            without weights of classes, keep native steps.
        input_spec: how uint8 images become an input; None takes that of the model, if it has one.
        native_only: raise NetworkError, which names the part, where native code cannot take the steps: here where that
            is known, else at the first step.

    Raises:
        NetworkError (a ValueError): see `native_only`.
        TypeError, ValueError: an argument of the wrong kind, out of range or not fitting the others.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: str = "sgd",
        *,
        lr: float,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        j: float = 0.0,
        label_smoothing: float = 0.0,
        loss: Callable[[Any, Tensor], Tensor] | None = None,
        input_spec: InputSpec | None = None,
        native_only: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        check_choice("optimizer", optimizer, ("sgd", "adam", "adamw"))
        if optimizer != "sgd" and (momentum or nesterov):
            raise ValueError(f"momentum, nesterov: only 'sgd' takes them, got {momentum!r}, {nesterov!r}")
        if not (isinstance(j, int | float) and 0 <= j < math.inf):
            raise ValueError(f"j: expected a finite number of at least 0, got {j!r}")
        if not (isinstance(label_smoothing, int | float) and 0 <= label_smoothing <= 1):
            raise ValueError(f"label_smoothing: expected a number from 0 to 1, got {label_smoothing!r}")
        if loss is not None and not callable(loss):
            raise TypeError(f"loss: expected a function of outputs and labels, got {type(loss).__name__}")
        if loss is not None and (label_smoothing or j):
            raise ValueError(f"j, label_smoothing: the given loss has its own, got {j!r}, {label_smoothing!r}")
        if input_spec is None:
            input_spec = getattr(model, "input_spec", None)
        if input_spec is not None and not isinstance(input_spec, InputSpec):
            raise TypeError(f"input_spec: expected an InputSpec, got {type(input_spec).__name__}")
        self.model = model
        self._pace = 0, 1  # batch size, steps a call
        common = {"lr": lr, "weight_decay": weight_decay, "fused": _can_be_fused(model)}
        parameters = model.parameters()
        owner: torch.optim.Optimizer = {
            "sgd": lambda: torch.optim.SGD(parameters, **common, momentum=momentum, nesterov=nesterov),
            "adam": lambda: torch.optim.Adam(parameters, **common, betas=betas, eps=eps),
            "adamw": lambda: torch.optim.AdamW(parameters, **common, betas=betas, eps=eps),
        }[optimizer]()
        minimised = Loss(loss, float(label_smoothing), float(j))
        self._steps = TrainingSteps(model, owner, optimizer, input_spec, minimised, native_only)

    def how(self, images: Tensor | None = None, labels: Tensor | None = None) -> str:
        """What takes the steps, in one line: native code, or PyTorch, and then which part of the model is why.

        Args:
            images: a batch, where a forward that someone wrote has to be read and the model has no `input_spec`.
            labels: of the batch, where they may be others than classes.
        """
        return self._steps.how(images, labels)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of `torch.optim`, over the parameters of the model; its settings and state are those of the training."""
        return self._steps.optimizer

    def step(self, images: Tensor, labels: Tensor, *, generator: torch.Generator | None = None) -> float:
        """One training step on one batch; returns the mean loss before the update.

        Args:
            images: floating (N, C, H, W) as the model takes it and of its dtype, or uint8 (N, H, W) or (N, C, H, W).
            labels: (N,), integers from 0 to the number of classes - 1; for a loss of the user's own, what that takes.
            generator: draws the seed of dropout in native steps; None: PyTorch's default one of the CPU.

        Raises:
            TrainingError: the loss is not finite; the step was not taken.
            TypeError, ValueError: images or labels of another kind or shape.
            RuntimeError (on CUDA a ValueError): a label out of range; nothing was trained.
        """
        images, labels = self._check_data(images, labels)
        number = len(labels)
        if images.is_cuda:
            self._steps.check(images, labels, number)
        rates = [self._steps.group()["lr"]]
        losses, _ = self._steps.take(images, labels, None, number, rates, Masks(generator))
        (loss,) = losses.tolist()
        if not math.isfinite(loss):
            raise TrainingError(_not_finite(1))
        return loss

    def run(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        epochs: int = 1,
        generator: torch.Generator | None = None,
        on_step: OnStep | None = None,
    ) -> History:
        """Train `epochs` times on all images, each time in a new random order; the last batch may be smaller.

        Ctrl-C and exceptions of `on_step` stop it between steps, with all parameters at the same step.

        Args:
            images, labels: the whole data set, as `step` takes a batch.
            batch_size: images a step.
            generator: draws the orders, `torch.randperm(N, generator=generator)` on its device, and behind the first of
                them the seed of dropout in native steps; None: PyTorch's default one of the CPU. The same generator
                gives the same batches wherever the model is.
            on_step: called for every step, counted from 1, with its mean loss; several steps at a time, ten times a
                second or more. The parameters may be those of a later step by then.

        Raises:
            TrainingError: a loss is not finite; the parameters are those before that step.
            TypeError, ValueError: as `step`.
        """
        _check_count("batch_size", batch_size)
        _check_count("epochs", epochs)
        images, labels = self._check_data(images, labels)
        self._steps.check(images, labels, batch_size)
        steps = math.ceil(len(labels) / batch_size)
        losses, correct = [], []
        masks = Masks(generator)
        drawn_on = torch.device("cpu") if generator is None else generator.device
        pinned = images.is_cuda and drawn_on.type == "cpu"
        for _ in range(epochs):
            order = torch.randperm(len(labels), generator=generator, device=drawn_on, pin_memory=pinned)
            rates = [self._steps.group()["lr"]] * steps
            results = self._run(images, labels, order, batch_size, rates, masks, on_step)
            losses.append(results[0])
            correct.append(results[1])
        return History(torch.stack(losses), torch.stack(correct), len(labels))

    def run_epoch(
        self,
        images: Tensor,
        labels: Tensor,
        order: Tensor,
        batch_size: int,
        learning_rates: Sequence[float] | None = None,
        on_step: OnStep | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Train on the images that `order` names, int64 (M,), batch after batch; see `run`.

        Args:
            learning_rates: one for each step; None: the optimizer's.
            generator: draws the seed of dropout in native steps; None: PyTorch's default one of the CPU.

        Returns:
            The mean loss, float64, and the number of images classified rightly, int64, of each step.
        """
        _check_count("batch_size", batch_size)
        images, labels = self._check_data(images, labels)
        self._steps.check(images, labels, batch_size)
        if order.dtype != torch.int64 or order.dim() != 1 or not len(order):
            raise ValueError(f"order: expected int64 (M,), M > 0, got {order.dtype} of shape {tuple(order.shape)}")
        check_memory("order", order)
        for index in torch.stack(order.aminmax()).tolist():
            if not 0 <= index < len(labels):
                raise ValueError(f"order: expected indices from 0 to {len(labels) - 1}, got {index}")
        steps = math.ceil(len(order) / batch_size)
        rates = [self._steps.group()["lr"]] * steps if learning_rates is None else list(learning_rates)
        if len(rates) != steps:
            raise ValueError(f"learning_rates: expected one for each of the {steps} steps, got {len(rates)}")
        return self._run(images, labels, order, batch_size, rates, Masks(generator), on_step)

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer, in the form of `torch.optim`; the parameters are in the model's own `state_dict`."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, of this class or of the `torch.optim` optimizer of the same kind."""
        # fused, whatever it was: then the state is on the device
        groups = [{**group, "fused": True, "foreach": None} for group in state["param_groups"]]
        self.optimizer.load_state_dict({**state, "param_groups": groups})
        self._steps.group()

    # --- calls that take steps ----------------------------------------------------------------------------------------

    def _run(
        self,
        images: Tensor,
        labels: Tensor,
        order: Tensor,
        batch_size: int,
        rates: list[float],
        masks: Masks,
        on_step: OnStep | None,
    ) -> tuple[Tensor, Tensor]:
        """`run_epoch` on checked arguments; `masks.first_step` steps were taken in other epochs."""
        before = masks.first_step
        order = order.to(images.device, non_blocking=True).contiguous()
        losses, correct = [], []
        done, steps_a_call = 0, self._pace[1] if self._pace[0] == batch_size else 1

        def note(new: list[float]) -> None:
            nonlocal done
            for loss in new:
                done += 1
                if not math.isfinite(loss):
                    raise TrainingError(_not_finite(before + done))
                if on_step is not None:
                    on_step(before + done, loss)

        while done < len(rates):
            queued = self._steps.are_queued(images, labels, len(order), batch_size)
            stop = len(rates) if queued else min(len(rates), done + steps_a_call)
            data = images, labels, order[done * batch_size : stop * batch_size], batch_size, rates[done:stop], masks
            masks.first_step = before + done
            started = time.perf_counter()
            if queued:
                results = self._watched_call(*data, note)
            else:
                results = self._steps.take(*data)
                seconds = time.perf_counter() - started
                steps_a_call = max(1, min(4 * steps_a_call, int(_CALL_SECONDS / seconds * len(results[0]))))
                self._pace = batch_size, steps_a_call
                note(results[0].tolist())
            losses.append(results[0])
            correct.append(results[1])
        masks.first_step = before + done
        return torch.cat(losses), torch.cat(correct)

    def _watched_call(
        self,
        images: Tensor,
        labels: Tensor,
        order: Tensor,
        batch_size: int,
        rates: list[float],
        masks: Masks,
        note: Callable[[list[float]], None],
    ) -> tuple[Tensor, Tensor]:
        """A call that only queues the steps: what it returned of those that were taken, when all have ended."""
        stream = torch.cuda.current_stream(images.device)
        watch = Watch(len(rates))
        try:
            losses, correct = self._steps.take(images, labels, order, batch_size, rates, masks, watch.memory)
            taken = watch.follow(stream.record_event(), note)
        except BaseException:
            watch.stop()
            stream.synchronize()  # the device may still write to the watch
            raise
        return losses[:taken].cpu(), correct[:taken].cpu()

    def _check_data(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels as steps take them: contiguous, labels int64 where they are classes."""
        device = self._steps.device
        for name, value in (("images", images), ("labels", labels)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
            if value.dtype in _CONVERTED or not value.is_contiguous():  # the native step checks what it takes as it is
                check_memory(name, value)
            if value.device != device:
                raise ValueError(f"{name}: expected on {device} as the model is, got {value.device}")
        if labels.shape[:1] != images.shape[:1] or not labels.dim() or not len(labels):
            raise ValueError(
                f"labels: expected ({len(images)},), one an image and at least one, got {tuple(labels.shape)}"
            )
        if self._steps.takes_any_labels:
            return images.contiguous(), labels.contiguous()
        if labels.dtype not in (torch.int64, *_CONVERTED):
            raise TypeError(f"labels: expected an integer dtype, got {labels.dtype}")
        if labels.dim() != 1:
            raise ValueError(f"labels: expected ({len(images)},), one an image, got {tuple(labels.shape)}")
        return images.contiguous(), labels.to(torch.int64).contiguous()


def _can_be_fused(model: nn.Module) -> bool | None:
    """Whether PyTorch's fused optimizers, the fastest, take these parameters; None: PyTorch chooses."""
    fitting = all(
        not is_lazy(parameter) and parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda")
        for parameter in model.parameters()
    )
    return True if fitting else None


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")


def _not_finite(step: int) -> str:
    return f"the loss is not finite in step {step}: training diverged; a lower learning rate may help"
