"""What takes the steps of a training run: torch.autograd and torch.optim, or `FusedTrainer`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .models import InputSpec, classify, criterion
from .network import NetworkError
from .train_config import TrainConfig
from .trainer import FusedTrainer

__all__ = ["AutogradEngine", "FusedEngine", "make_engine"]

OnStep = Callable[[int, Tensor | float], None]


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of `config`, by torch.optim."""
    common = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}  # a third of the time on the CPU
    return {
        "adam": lambda: torch.optim.Adam(parameters, **common),
        "adamw": lambda: torch.optim.AdamW(parameters, **common),
        "sgd": lambda: torch.optim.SGD(parameters, momentum=config.momentum, **common),
    }[config.optimizer]()


def moments(config: TrainConfig) -> tuple[str, ...]:
    """What that optimizer keeps of each parameter once it has taken a step."""
    if config.optimizer == "sgd":
        return ("momentum_buffer",) if config.momentum else ()
    return "step", "exp_avg", "exp_avg_sq"


class AutogradEngine:
    """Training steps by torch.autograd and torch.optim, of any nn.Module."""

    name = "autograd"
    how = "torch.autograd and torch.optim"

    def __init__(self, model: nn.Module, input_spec: InputSpec, config: TrainConfig) -> None:
        self.model = model
        self.criterion = criterion(model)
        self.input_spec = input_spec
        self.batch_size = config.batch_size
        self.dtype = config.parameter_dtype
        self.autocast = torch.autocast(
            torch.device(config.device).type, torch.bfloat16, enabled=config.dtype == "bfloat16"
        )
        self.optimizer = make_optimizer(model.parameters(), config)

    def run_epoch(
        self,
        images: Tensor,
        labels: Tensor,
        order: Tensor,
        learning_rates: Sequence[float],
        on_step: OnStep,
    ) -> tuple[Tensor, Tensor]:
        """Train once on every image, in batches along `order`, a permutation of their indices; a rate for each batch.

        `on_step` gets the number of images done and the mean loss of the batch after every step.
        Returns, on the device, the mean loss of each batch (steps,) and the number of images it got right.
        """
        self.model.train()
        batches = order.split(self.batch_size)
        losses = torch.empty(len(batches), dtype=self.dtype, device=images.device)
        correct = torch.zeros((), dtype=torch.int64, device=images.device)
        done = 0
        for step, batch in enumerate(batches):
            inputs = self.input_spec.prepare(images.index_select(0, batch), self.dtype)
            targets = labels.index_select(0, batch)
            with self.autocast:
                outputs = self.model(inputs)
                loss = self.criterion(outputs, targets)
            self.optimizer.zero_grad()
            loss.backward()
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rates[step]
            self.optimizer.step()
            losses[step] = loss.detach()
            correct += (classify(self.model, outputs.detach()) == targets).sum()
            done += len(batch)
            on_step(done, losses[step])
        return losses, correct

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer; the parameters are the model's own."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.optimizer.load_state_dict(state)


class FusedEngine:
    """The same by `FusedTrainer`, many steps in a call. The state is the same too."""

    name = "fused"

    def __init__(self, model: nn.Module, input_spec: InputSpec, config: TrainConfig) -> None:
        """Raises NetworkError where native code cannot take whole steps: `AutogradEngine` knows autocast, too."""
        options = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
        self.trainer = FusedTrainer(model, config.optimizer, **options, input_spec=input_spec, native_only=True)
        self.batch_size = config.batch_size

    @property
    def how(self) -> str:
        """What takes the steps."""
        return self.trainer.how()

    def run_epoch(
        self, images: Tensor, labels: Tensor, order: Tensor, learning_rates: Sequence[float], on_step: OnStep
    ) -> tuple[Tensor, Tensor]:
        """As `AutogradEngine.run_epoch`, but `on_step` is called for several steps at a time, when they are done.

        Raises:
            TrainingError: a loss is not finite.
        """

        def report(step: int, loss: float) -> None:
            on_step(min(step * self.batch_size, len(order)), loss)

        losses, correct = self.trainer.run_epoch(images, labels, order, self.batch_size, learning_rates, report)
        return losses, correct.sum()

    def state_dict(self) -> dict[str, Any]:
        """As `AutogradEngine.state_dict`."""
        return self.trainer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` of this or the other engine returned."""
        self.trainer.load_state_dict(state)


def make_engine(
    model: nn.Module, input_spec: InputSpec, config: TrainConfig
) -> tuple[AutogradEngine | FusedEngine, str | None]:
    """The engine that `config` asks for, and why "auto" is not the fused one, None where it is.

    Raises:
        ValueError: "fused" cannot train this.
    """
    reason = None
    if config.engine != "autograd":
        if config.dtype == "bfloat16":
            reason = "the fused engine has no autocast to bfloat16"
        elif config.reference and config.engine == "auto":
            reason = "the twin is there to be trained by plain PyTorch"
        else:
            try:
                return FusedEngine(model, input_spec, config), None
            except NetworkError as error:
                reason = str(error)
        if config.engine == "fused":
            raise ValueError(f"engine: 'fused' cannot train this: {reason}")
    return AutogradEngine(model, input_spec, config), reason
