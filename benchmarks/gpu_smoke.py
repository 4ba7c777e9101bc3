"""Whether the CUDA kernels compute what the CPU computes: one process, some seconds, the first thing to run on a GPU.

    python benchmarks/gpu_smoke.py

Every layer of the operator benchmark runs forward and backward at batch 5. Every network is trained for three steps at
batch 5 and 128, in one launch and in two launches a step, which must agree to the bit. The judge is float64 on the CPU,
by the rule of agreement.py. Each check prints a line as soon as it is done; the exit status is 1 if one failed.
"""

import faulthandler
import time
from collections.abc import Callable

import agreement
import devices
import operator_race
import torch
from layers import LAYERS, OURS, PLAIN
from networks import NETWORKS, Task
from operator_race import Case, Operands

from lenet_fast import FusedTrainer
from lenet_fast.models import criterion

OPERATOR_BATCH, STEPS, TRAINING_BATCHES = 5, 3, (5, 128)
PASSES = "forward+backward"
MOMENTUM = 0.9


def check_operator(case: Case) -> agreement.Verdict:
    """Output and gradients on the device against float64 on the CPU."""

    def results(contestant: operator_race.Contestant, operands: Operands) -> agreement.Results:
        run = operator_race.prepare(contestant, case, operands, PASSES)
        return {name: value.cpu() for name, value in operator_race.results(run, contestant, case, PASSES).items()}

    on_cpu, on_device = (Operands.make(case, OPERATOR_BATCH, torch.float32, device) for device in ("cpu", "cuda"))
    truth, own = results(PLAIN, on_cpu.double()), results(PLAIN, on_cpu)
    found = results(case.layer.contestants[OURS], on_device)
    return agreement.check(OURS, found, truth=truth, own=own)


def train(network: str, batch: int, cooperative: str) -> agreement.Results:
    """Losses and parameters after some steps of momentum on the device, from bytes."""
    task = Task.make(network, batch, STEPS, "cuda")
    model = task.model.to("cuda")
    with devices.cooperative_launches(cooperative):
        trainer = FusedTrainer(model, "sgd", lr=task.lr, momentum=MOMENTUM)
        losses, _ = trainer.run_epoch(task.pixels, task.labels, torch.arange(len(task.labels), device="cuda"), batch)
    named = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    return {"losses": losses.cpu().float(), **named}


def train_plainly(network: str, batch: int, dtype: torch.dtype) -> agreement.Results:
    """The same by autograd and torch.optim on the CPU: what the kernels are judged by needs no kernels."""
    task = Task.make(network, batch, STEPS, "cpu")
    model = task.model.reference().to(dtype)
    measure = criterion(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr, momentum=MOMENTUM)
    losses = []
    for images, labels in task.batches(dtype):
        optimizer.zero_grad()
        loss = measure(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), **{name: value.detach() for name, value in model.named_parameters()}}


def check_training(network: str, batch: int) -> agreement.Verdict:
    """The trainer on the device against float64 on the CPU, both ways to launch."""
    truth, own = (train_plainly(network, batch, dtype) for dtype in (torch.float64, torch.float32))
    in_one, in_two = (train(network, batch, cooperative) for cooperative in "10")
    verdict = agreement.check("one launch", in_one, truth=truth, own=own)
    if different := [name for name, value in in_one.items() if not torch.equal(value, in_two[name])]:
        agreement.check("two launches a step", in_two, truth=truth, own=own)
        raise agreement.Disagreement(f"one launch and two launches a step differ in the bits of {', '.join(different)}")
    return verdict


def main() -> None:
    checks: dict[str, Callable[[], agreement.Verdict]] = {}
    for name, layer in LAYERS.items():
        for variant in layer.variants:
            case = Case(layer, *variant)
            checks[f"{name} {case.activation} {case.pool}"] = lambda case=case: check_operator(case)
    for batch in TRAINING_BATCHES:
        for network in NETWORKS:
            checks[f"training {network} batch {batch}"] = lambda network=network, batch=batch: check_training(
                network, batch
            )
    failed = 0
    for title, check in checks.items():
        start = time.monotonic()
        try:
            outcome = f"ok, off by {check().error:.1e}"
        except Exception as error:
            failed += 1
            outcome = f"FAILED: {type(error).__name__}: {error}"
        print(f"{title}: {outcome} ({time.monotonic() - start:.1f} s)", flush=True)
    print(f"{len(checks) - failed} passed, {failed} failed")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    faulthandler.enable()
    main()
