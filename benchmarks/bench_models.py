"""Test error and training time of every model on every data set, each beside its plain PyTorch twin.

    python benchmarks/bench_models.py --data-dir mnist=FOLDER --csv benchmarks/results/models.csv
    python benchmarks/bench_models.py --csv benchmarks/results/models.csv --table     # the README's table from the rows

A row that the CSV has already is not run again. The twin starts from the same weights and trains on the same batches.
"""

import argparse
import csv
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

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
    Recipe("lenet5-d2l", "fashion-mnist"),
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
        "seconds": round(sum(epoch.seconds for epoch in history), 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def table(rows: list[dict[str, str]]) -> str:
    lines = [
        "| model | data set | training | test error | twin | published | seconds | twin |",
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
        seconds = statistics.median(float(r["seconds"]) for r in fused)
        how = f"{recipe.optimizer} {recipe.lr:g}, {recipe.schedule}, batch {recipe.batch_size}"
        lines.append(
            f"| {recipe.model} | {recipe.dataset} | {recipe.epochs} epochs, {recipe.note or how} | {error} "
            f"| {twin[0]['test_error_percent'] + ' %' if twin else ''} "
            f"| {PUBLISHED.get((recipe.model, recipe.dataset), '') if not recipe.note else ''} "
            f"| {seconds:.0f} | {float(twin[0]['seconds']) if twin else float('nan'):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="rows are added to this file")
    parser.add_argument("--data-dir", action="append", default=[], metavar="DATASET=FOLDER")
    parser.add_argument("--models", default="", help="only these, e.g. lenet1,lenet5")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="print the table of the rows so far and stop")
    options = parser.parse_args()
    if options.table:
        print(table(read_rows(options.csv)))
        return
    torch.set_num_threads(options.threads)
    folders = dict(entry.split("=", 1) for entry in options.data_dir)
    unknown = folders.keys() - set(data.DATASETS)
    if unknown:
        parser.error(f"--data-dir: expected one of {', '.join(data.DATASETS)} before '=', got {', '.join(unknown)}")
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
