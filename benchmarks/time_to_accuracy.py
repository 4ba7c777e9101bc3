"""Seconds of training from scratch until a test accuracy on MNIST is reached, over several seeds.

    python benchmarks/time_to_accuracy.py --seeds 20 --csv benchmarks/results/time_to_accuracy_cpu.csv
    python benchmarks/time_to_accuracy.py --engine autograd --reference          # plain PyTorch, the same recipe

The seconds are those of the epochs alone, shuffling included; loading the data, building the model and looking at the
accuracy after each epoch are not. Before the first seed, one epoch is trained and thrown away. On a GPU too they are
the wall clock's, the host's part included. In the median, who does not reach the accuracy took longest.
"""

import contextlib
import dataclasses
import math
import statistics
from pathlib import Path
from typing import Annotated

import rows
import torch
import typer

from lenet_fast import data
from lenet_fast.models import MODELS
from lenet_fast.train import Epoch, Run, TrainConfig


class _ReachedError(Exception):
    """Ends a run."""


def train(config: TrainConfig, dataset: data.Dataset, target: float) -> list[Epoch]:
    """The epochs up to the first whose test accuracy is at least `target`, or all."""
    epochs: list[Epoch] = []

    def note(epoch: Epoch) -> None:
        epochs.append(epoch)
        if epoch.test_accuracy >= target:
            raise _ReachedError

    with contextlib.suppress(_ReachedError):
        Run(config, dataset=dataset).fit(on_epoch=note)
    return epochs


def main(
    target: Annotated[float, typer.Option(min=0, max=100, help="Test accuracy, percent.")] = 98.9,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings, each from a seed of its own.")] = 20,
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "lenet5",
    dataset: Annotated[str, typer.Option(help="mnist, or mnist-10k, which is embedded.")] = "mnist",
    data_dir: Annotated[str | None, typer.Option(help="Where the digits are.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="At most; the course of the learning rate is over them.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    optimizer: Annotated[str, typer.Option()] = "adam",
    lr: Annotated[float, typer.Option()] = 4e-3,
    schedule: Annotated[str, typer.Option()] = "one-cycle",
    engine: Annotated[str, typer.Option(help="fused or autograd.")] = "fused",
    reference: Annotated[bool, typer.Option("--reference", help="The plain PyTorch twin.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="PyTorch's threads.")] = None,
    csv: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the rows here, one a seed.")] = None,
) -> None:
    """Time trainings to a test accuracy."""
    if csv is not None and not csv.parent.is_dir():
        raise typer.BadParameter(f"--csv: no such folder: {csv.parent}")
    if threads is not None:
        torch.set_num_threads(threads)
    options = {"model": model, "optimizer": optimizer, "lr": lr, "schedule": schedule, "batch_size": batch_size}
    try:
        config = TrainConfig(
            **options,
            epochs=epochs,
            engine=engine,
            reference=reference,
            device=device,
            dataset=dataset,
            data_dir=data_dir,
        )
        digits = data.load(dataset, data_dir)
        train(dataclasses.replace(config, epochs=1), digits, target)  # compiles, brings the data in
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    settings = {**options, "epochs_planned": epochs, "dataset": dataset, "engine": engine, "reference": reference}
    settings |= {"device": torch.cuda.get_device_name() if device.startswith("cuda") else device, **rows.environment()}
    table = []
    for seed in range(seeds):
        run = train(dataclasses.replace(config, seed=seed), digits, target / 100)
        row = {"seed": seed, "target_percent": target, "reached": run[-1].test_accuracy >= target / 100}
        row |= {"seconds": f"{sum(epoch.seconds for epoch in run):.4f}", "epochs": len(run)}
        table.append({**row, "test_accuracy_percent": f"{100 * run[-1].test_accuracy:.2f}", **settings})
        print(*(f"{name}={value}" for name, value in table[-1].items() if name not in settings), flush=True)
        if csv is not None:  # what was measured stays, whatever ends this process
            rows.write(csv, table)
    seconds = [float(row["seconds"]) if row["reached"] else math.inf for row in table]
    median = statistics.median(seconds)
    print(f"{sum(map(math.isfinite, seconds))} of {seeds} trainings reached {target} %", end="")
    print(f", in {median:.3f} s (median)" if math.isfinite(median) else ", too few for a median")


if __name__ == "__main__":
    typer.run(main)
