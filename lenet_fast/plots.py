"""Pictures of a training run. They need matplotlib, which is imported only when one is drawn."""

import io
from collections.abc import Sequence
from pathlib import Path

from .checkpoint import write_atomically
from .train import Epoch

MISSING = "matplotlib is not installed; `pip install lenet-fast[plot]` draws it"


def learning_curves(history: Sequence[Epoch], path: Path, title: str) -> None:
    """Draw loss and accuracies over the epochs, as PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(MISSING) from error
    epochs = [epoch.epoch for epoch in history]
    curves = (
        ("loss", {"training": [epoch.loss for epoch in history]}),
        (
            "accuracy (%)",
            {
                "training": [100 * epoch.train_accuracy for epoch in history],
                "test": [100 * epoch.test_accuracy for epoch in history],
            },
        ),
    )
    figure = Figure(figsize=(9, 3.6), layout="constrained")  # not pyplot: no window, no global state
    figure.suptitle(title)
    for axes, (label, lines) in zip(figure.subplots(1, 2), curves, strict=True):
        for (name, values), color in zip(lines.items(), ("tab:blue", "tab:orange"), strict=False):
            last = f"{name}, last {values[-1]:.4g}"
            axes.plot(epochs, values, marker="o", markersize=3, color=color, label=last)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, picture.getvalue())
