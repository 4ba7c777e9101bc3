"""Test error and training time of every model on every data set, each beside its plain PyTorch twin.

    python benchmarks/bench_models.py --data-dir mnist=FOLDER --csv benchmarks/results/models.csv
    python benchmarks/bench_models.py --csv benchmarks/results/models.csv --speed benchmarks/results/models_speed.csv \\
        --data-dir mnist=FOLDER                                                 # seconds a pass, on a quiet machine
    python benchmarks/bench_models.py --csv benchmarks/results/models.csv --speed benchmarks/results/models_speed.csv \\
        --table                                                                 # the README's table from the rows

A row that the CSV has already is not run again. The twin starts from the same weights and trains on the same batches.
Speed is measured apart, one pass of each in turn, because the runs to the full accuracy are too long to keep a machine
quiet.
"""

import argparse
import csv
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rows import environment

from lenet_fast import data
from lenet_fast.train import Run, TrainConfig


@dataclass(frozen=True)
class Recipe:
    """How a model is trained on a data set."""

    model: str
    dataset: str
    epochs: int = 20
    batch_size: int = 64
    optimizer: str = "adamw"
    lr: float = 5e-3
    schedule: str = "one-cycle"
    weight_decay: float = 0.1
    seeds: int = 1
    note: str = ""

    def config(self, seed: int, reference: bool, data_dir: str | None) -> TrainConfig:
        settings = {k: v for k, v in asdict(self).items() if k not in ("seeds", "note")}
        return TrainConfig(**settings, seed=seed, reference=reference, data_dir=data_dir, device="cpu")


RECIPES = [
    Recipe("lenet5-1998", "mnist", seeds=5),
    Recipe("lenet1", "mnist", lr=1e-2),
    Recipe("lenet5", "mnist", lr=2e-3),
    Recipe("lenet5-d2l", "mnist"),
    Recipe("lenet1", "fashion-mnist", lr=1e-2),
    Recipe("lenet5", "fashion-mnist", lr=2e-3),
    Recipe("lenet5-d2l", "fashion-mnist", lr=1e-2, weight_decay=0.01),
    Recipe("lenet5-1998", "fashion-mnist"),
    Recipe(
        "lenet5-d2l",
        "fashion-mnist",
        epochs=10,
        batch_size=128,
        optimizer="sgd",
        lr=0.1,
        schedule="constant",
        weight_decay=0.0,
        note="the tutorial's settings",
    ),
]
PUBLISHED = {("lenet1", "mnist"): "1.7 %", ("lenet5-1998", "mnist"): "0.95 %"}  # LeCun et al. (1998), figure 9
KEY = ("model", "dataset", "note", "reference", "seed")


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: dict) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def measure(recipe: Recipe, seed: int, reference: bool, folders: dict[str, str]) -> dict:
    run = Run(recipe.config(seed, reference, folders.get(recipe.dataset)))
    history = run.fit()
    return {
        **{k: v for k, v in asdict(recipe).items() if k != "seeds"},
        "reference": reference,
        "seed": seed,
        "test_error_percent": round(100 * (1 - history[-1].test_accuracy), 3),
        "train_loss": round(history[-1].loss, 6),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def measure_speed(model: str, folders: dict[str, str], rounds: int = 3) -> dict:
    """Median seconds of a pass over MNIST, fused and twin in turn in one process."""
    recipe = next(recipe for recipe in RECIPES if recipe.model == model)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    dataset = data.load("mnist", folders.get("mnist"))
    for _ in range(rounds):
        for reference in seconds:
            (epoch,) = Run(replace(recipe.config(0, reference, None), epochs=1), dataset=dataset).fit()
            seconds[reference].append(epoch.seconds)
    return {
        "model": model,
        "batch_size": recipe.batch_size,
        "seconds_a_pass": round(statistics.median(seconds[False]), 3),
        "twin_seconds_a_pass": round(statistics.median(seconds[True]), 3),
        "ratio": round(statistics.median(t / f for f, t in zip(*seconds.values(), strict=True)), 3),
        "rounds": rounds,
        **environment(),
    }


def table(rows: list[dict[str, str]], speed: list[dict[str, str]]) -> str:
    lines = [
        "| model | data set | training | test error | twin | published | seconds a pass | twin |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for recipe in RECIPES:
        same = [r for r in rows if (r["model"], r["dataset"], r["note"]) == (recipe.model, recipe.dataset, recipe.note)]
        fused, twin = ([r for r in same if r["reference"] == flag] for flag in ("False", "True"))
        if not fused:
            continue
        errors = [float(r["test_error_percent"]) for r in fused]
        error = f"{errors[0]:.2f} %"
        if len(errors) > 1:
            error = f"{statistics.mean(errors):.2f} ± {statistics.stdev(errors):.2f} % ({len(errors)} seeds)"
        (rate,) = [r for r in speed if r["model"] == recipe.model]
        how = f"{recipe.optimizer} {recipe.lr:g}, {recipe.schedule}, batch {recipe.batch_size}"
        lines.append(
            f"| {recipe.model} | {recipe.dataset} | {recipe.epochs} epochs, {recipe.note or how} | {error} "
            f"| {format(float(twin[0]['test_error_percent']), '.2f') + ' %' if twin else ''} "
            f"| {PUBLISHED.get((recipe.model, recipe.dataset), '') if not recipe.note else ''} "
            f"| {float(rate['seconds_a_pass']):.1f} | {float(rate['twin_seconds_a_pass']):.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="rows are added to this file")
    parser.add_argument("--data-dir", action="append", default=[], metavar="DATASET=FOLDER")
    parser.add_argument("--models", default="", help="only these, e.g. lenet1,lenet5")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--speed", type=Path, help="measure the seconds of a pass into this new file, or read them")
    parser.add_argument("--table", action="store_true", help="print the table of the rows so far and stop")
    options = parser.parse_args()
    if options.table:
        print(table(read_rows(options.csv), read_rows(options.speed) if options.speed else []))
        return
    torch.set_num_threads(options.threads)
    folders = dict(entry.split("=", 1) for entry in options.data_dir)
    unknown = folders.keys() - set(data.DATASETS)
    if unknown:
        parser.error(f"--data-dir: expected one of {', '.join(data.DATASETS)} before '=', got {', '.join(unknown)}")
    if options.speed:
        for model in dict.fromkeys(recipe.model for recipe in RECIPES):
            append_row(options.speed, measure_speed(model, folders))
        return
    wanted = options.models.split(",") if options.models else {recipe.model for recipe in RECIPES}
    for recipe in RECIPES:
        runs = [(seed, False) for seed in range(recipe.seeds)] + [(0, True)]
        for seed, reference in runs if recipe.model in wanted else ():
            key = tuple(map(str, (recipe.model, recipe.dataset, recipe.note, reference, seed)))
            if key in {tuple(row[name] for name in KEY) for row in read_rows(options.csv)}:
                continue
            row = measure(recipe, seed, reference, folders)
            append_row(options.csv, row)
            print(*(f"{k}={v}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
