"""Pictures of a trained network: filters, feature maps, the wiring of C3, its mistakes and what it says to noise.

They need matplotlib, which is imported only when one is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import data
from .images import check_replaceable, save_png
from .inference import outputs, probabilities
from .models import InputSpec, classify, measures_distance
from .nn import FusedConv2d
from .plots import MISSING
from .reference import ACTIVATIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_IMAGES = 12
_MISTAKES = (4, 6)  # rows and columns of them
_NOISE_IMAGES = 2000
_PLAIN, _STRONG = "tab:blue", "tab:orange"


@dataclass(frozen=True)
class Study:
    """A trained network and the data set that the pictures show it on."""

    model: nn.Module
    input_spec: InputSpec
    dataset: data.Dataset
    title: str

    @cached_property
    def outputs(self) -> Tensor:
        """Of all test images, (N, 10)."""
        return outputs(self.model, self.input_spec, self.dataset.test.images)

    @cached_property
    def probabilities(self) -> Tensor:
        """Of all test images, (N, 10)."""
        return probabilities(self.model, self.outputs)

    @cached_property
    def classes(self) -> Tensor:
        """The class of each test image as the network sees it, (N,)."""
        return classify(self.model, self.outputs)


def draw_all(study: Study, folder: str | Path, images: Sequence[int] = (0, 1, 2)) -> list[Path]:
    """Draw every picture into `folder`, replacing those drawn before; `images` are test images, by index.

    Raises:
        ValueError: `images` is empty, too long or has an index that the test images lack.
        FileExistsError: a file of the same name is there that is none of ours.
        ImportError: matplotlib is not installed.
    """
    size = len(study.dataset.test.labels)
    if not 1 <= len(images) <= _MOST_IMAGES:
        raise ValueError(f"images: expected 1 to {_MOST_IMAGES} of them, got {len(images)}")
    for index in images:
        if not 0 <= index < size:
            raise ValueError(f"images: expected indices of the test images, 0 to {size - 1}, got {index}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(MISSING) from error
    pictures: dict[str, Callable[[], Figure]] = {
        "filters_c1.png": lambda: filters(study, "c1"),
        "filters_c3.png": lambda: filters(study, "c3"),
        "maps_c1.png": lambda: feature_maps(study, "c1", images),
        "maps_c3.png": lambda: feature_maps(study, "c3", images),
        "wiring_c3.png": lambda: wiring(study),
        "confusion.png": lambda: confusion_matrix(study),
        "mistakes.png": lambda: worst_mistakes(study),
        "noise.png": lambda: noise(study),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in pictures]
    for path in paths:  # before the first is drawn
        check_replaceable(path)
    for path, draw in zip(paths, pictures.values(), strict=True):
        _save(draw(), path)
    return paths


def _save(figure: Figure, path: Path) -> None:
    from PIL import Image

    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    with Image.open(content) as picture:
        save_png(picture.convert("RGB"), path)


def _figure(study: Study, title: str, width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")  # not pyplot: no window, no global state
    figure.suptitle(f"{study.title}: {title}", fontsize=12)
    return figure


# ---- Convolutions


@dataclass(frozen=True)
class _Convolution:
    """The convolution `c1` or `c3` of a network, fused or plain: what it computes before pooling."""

    weight: Tensor  # (C_out, C_in, K, K), 0 where there is no connection
    bias: Tensor | None
    padding: Any
    activation: Callable[[Tensor], Tensor]
    table: Tensor | None  # bool (C_out, C_in); None where all are connected
    input: Tensor  # of the network on the images given

    @classmethod
    @torch.no_grad()
    def of(cls, study: Study, name: str, images: Tensor) -> _Convolution:
        layers = dict(study.model.named_children())
        layer, like = layers[name], next(study.model.parameters())
        inputs: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        study.model.eval()(study.input_spec.prepare(images.to(like.device), like.dtype))
        handle.remove()
        if isinstance(layer, FusedConv2d):
            table = None if layer.connections is None else layer.connections.table()
            return cls(layer.dense_weight(), layer.bias, layer.padding, ACTIVATIONS[layer.activation], table, inputs[0])
        return cls(layer.weight, layer.bias, layer.padding, layers[f"{name}_act"], None, inputs[0])

    @torch.no_grad()
    def maps(self) -> np.ndarray:
        """After the activation, before pooling: (N, C_out, H, W)."""
        return self.activation(F.conv2d(self.input, self.weight, self.bias, padding=self.padding)).float().cpu().numpy()


def _no_ticks(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])


class _Tiles:
    """Small images in rows and columns of equal cells, on one axes: much faster than an axes each."""

    def __init__(self, axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
        self.axes = axes
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0), aspect="equal", facecolor="lightgrey")
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set_xticks([column + 0.5 for column in range(len(columns))], columns)
        axes.set_yticks([row + 0.5 for row in range(len(rows))], rows)
        axes.tick_params(length=0, labelsize=9)
        axes.spines[:].set_visible(False)

    def draw(self, row: int, column: int, image: np.ndarray, **colors: Any) -> Any:
        """Draw `image` into a cell; returns what a colour bar needs."""
        extent = (column + 0.04, column + 0.96, row + 0.96, row + 0.04)
        limits = self.axes.get_xlim(), self.axes.get_ylim()
        shown = self.axes.imshow(image, extent=extent, **colors)
        self.axes.set(xlim=limits[0], ylim=limits[1])  # imshow sets them to its extent
        return shown


def filters(study: Study, name: str) -> Figure:
    """The kernels of c1, or of c3: a row for each input map, a column for each output map, grey where none is."""
    convolution = _Convolution.of(study, name, study.dataset.test.images[:1])
    weight = convolution.weight.detach().float().cpu().numpy()
    out_maps, in_maps = weight.shape[:2]
    cell = 1.2 if in_maps == 1 else 0.65
    figure = _figure(study, f"kernels of {name.upper()}", cell * out_maps + 2, cell * in_maps + 1.1)
    axes = figure.subplots()
    rows = [""] if in_maps == 1 else [str(index) for index in range(in_maps)]
    tiles = _Tiles(axes, rows, [str(index) for index in range(out_maps)])
    limit, table = np.abs(weight).max(), convolution.table
    for target, source in np.ndindex(out_maps, in_maps):
        if table is None or table[target, source]:
            shown = tiles.draw(source, target, weight[target, source], cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes.set(xlabel=f"map of {name.upper()}", ylabel="input" if in_maps == 1 else "map of S2")
    figure.colorbar(shown, ax=axes, aspect=15, label="weight")
    return figure


def feature_maps(study: Study, name: str, images: Sequence[int]) -> Figure:
    """What c1 or c3 makes of test images, after its activation and before pooling: one image a row."""
    test = study.dataset.test
    chosen = test.images[list(images)]
    maps = _Convolution.of(study, name, chosen).maps()
    count, height, width = maps.shape[1:]
    title = f"the {count} maps of {name.upper()} ({height} x {width}, before pooling)"
    cell = 1.4 if count <= 8 else 0.85
    figure = _figure(study, title, cell * (count + 1) + 2.4, cell * len(images) + 0.9)
    axes = figure.subplots()
    rows = [f"image {index}\nclass {study.dataset.classes[test.labels[index]]}" for index in images]
    tiles = _Tiles(axes, rows, ["input", *(f"map {index}" for index in range(count))])
    low, high = np.quantile(maps, (0.005, 0.995))  # a few strong spots would leave the rest dark
    for row in range(len(images)):
        tiles.draw(row, 0, chosen[row].numpy(), cmap="gray")
        for target in range(count):
            shown = tiles.draw(row, target + 1, maps[row, target], cmap="gray", vmin=low, vmax=high)
    figure.colorbar(shown, ax=axes, aspect=15, label="activation", extend="both")
    return figure


def wiring(study: Study) -> Figure:
    """Which input maps each map of C3 sees, as LeCun et al. (1998), table I, shows it."""
    convolution = _Convolution.of(study, "c3", study.dataset.test.images[:1])
    out_maps, in_maps = convolution.weight.shape[:2]
    dense = convolution.table is None
    table = torch.ones(out_maps, in_maps, dtype=torch.bool) if dense else convolution.table
    pairs = f"{int(table.sum())} of {table.numel()} pairs of maps"
    how = f"C3 is dense, every map sees all {in_maps}" if dense else f"the wiring of C3, {pairs} are connected"
    figure = _figure(study, how, 0.45 * out_maps + 2.6, 0.45 * in_maps + 2)
    axes = figure.subplots()
    axes.imshow(table.T.numpy(), cmap="Blues", vmin=0, vmax=1.6, aspect="equal")
    for target, source in table.nonzero().tolist():
        axes.text(target, source, "X", ha="center", va="center", color="white")
    axes.set_xticks(range(out_maps))
    axes.set_yticks(range(in_maps))
    axes.set_xticks([edge - 0.5 for edge in range(1, out_maps)], minor=True)
    axes.set_yticks([edge - 0.5 for edge in range(1, in_maps)], minor=True)
    axes.grid(which="minor", color="lightgrey")
    axes.tick_params(which="both", length=0)
    axes.set(xlabel="map of C3", ylabel="map of S2")
    for secondary, places, counts, label in (
        (axes.secondary_xaxis("top"), range(out_maps), table.sum(1), "input maps seen"),
        (axes.secondary_yaxis("right"), range(in_maps), table.sum(0), "times used"),
    ):
        secondary.tick_params(length=0, labelcolor="grey")
        which = secondary.set_xticks if label == "input maps seen" else secondary.set_yticks
        which(list(places), [str(int(count)) for count in counts])
        (secondary.set_xlabel if label == "input maps seen" else secondary.set_ylabel)(label, color="grey")
    return figure


# ---- Answers


def confusion_matrix(study: Study) -> Figure:
    """How often each class of test image is taken for each class."""
    labels, names = study.dataset.test.labels, study.dataset.classes
    size = len(names)
    counts = torch.bincount(labels * size + study.classes, minlength=size * size).view(size, size)
    wrong = counts.clone().fill_diagonal_(0)
    errors, total = int(wrong.sum()), len(labels)
    title = f"{errors:,} errors in {total:,} test images ({100 * errors / total:.2f} %)"
    figure = _figure(study, title, 8.2, 7.4)
    axes = figure.subplots()
    most = max(1, int(wrong.max()))
    shown = axes.imshow(wrong.numpy(), cmap="Oranges", vmin=0, vmax=most)
    for row in range(size):
        axes.add_patch(_square(row, "whitesmoke"))
        for column in range(size):
            count = int(counts[row, column])
            if count:
                dark = row != column and count > 0.6 * most
                axes.text(column, row, str(count), ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(size), names, rotation=0 if max(map(len, names)) < 3 else 45)
    axes.set_yticks(range(size), names)
    axes.set(xlabel="the network says", ylabel="true class")
    figure.colorbar(shown, ax=axes, shrink=0.8, label="errors (off the diagonal)")
    return figure


def _square(at: int, color: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((at - 0.5, at - 0.5), 1, 1, facecolor=color)


def worst_mistakes(study: Study) -> Figure:
    """The mistakes that the network was surest of: true class, its answer, and both probabilities."""
    labels, names = study.dataset.test.labels, study.dataset.classes
    wrong = (study.classes != labels).nonzero().flatten()
    sure = study.probabilities[wrong, study.classes[wrong]]
    rows, columns = _MISTAKES
    worst = wrong[sure.argsort(descending=True, stable=True)][: rows * columns].tolist()
    if not worst:
        return _figure(study, f"no mistakes in {len(labels):,} test images", 8, 1.5)
    rows = -(-len(worst) // columns)
    title = f"the {len(worst)} surest of {len(wrong):,} mistakes (true class → answer, and their probabilities)"
    figure = _figure(study, title, 10.5, 2.15 * rows + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(worst) :]:
        axes.axis("off")
    for index, axes in zip(worst, grid, strict=False):
        true, answer = int(labels[index]), int(study.classes[index])
        share = study.probabilities[index]
        axes.imshow(study.dataset.test.images[index].numpy(), cmap="gray_r")
        axes.set_title(f"{names[true]} → {names[answer]}\n{share[true]:.3f} → {share[answer]:.3f}", fontsize=10)
        axes.set_xlabel(f"image {index}", fontsize=8, color="grey")
        axes.spines[:].set_color("lightgrey")
        _no_ticks(axes)
    return figure


def noise(study: Study) -> Figure:
    """How sure the network is of noise and of an empty image, beside test images; and the classes that it names."""
    test, names = study.dataset.test, study.dataset.classes
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randint(256, (_NOISE_IMAGES, *test.images.shape[1:]), generator=generator, dtype=torch.uint8)
    empty = torch.zeros_like(noisy[:1])
    said = {
        f"{len(test.labels):,} test images": study.outputs,
        f"{_NOISE_IMAGES:,} images of uniform noise": outputs(study.model, study.input_spec, noisy),
        "an empty image": outputs(study.model, study.input_spec, empty),
    }
    is_distance = measures_distance(study.model)
    values = {
        name: said.min(1).values if is_distance else probabilities(study.model, said).max(1).values
        for name, said in said.items()
    }
    figure = _figure(study, "behaviour on noise", 11, 6.6)
    mosaic = figure.subplot_mosaic([["sure"] * 4, ["noise", "empty", "says", "says"]], height_ratios=[1.2, 1])

    label = "distance to the nearest class" if is_distance else "probability of the class named"
    together = torch.cat(list(values.values())).numpy()
    bins = np.geomspace(max(together.min(), 1e-3), together.max(), 60) if is_distance else np.linspace(0, 1, 51)
    axes = mosaic["sure"]
    (seen, seen_values), (noise_name, noise_values), (empty_name, empty_value) = values.items()
    for name, sample, color in ((seen, seen_values, _PLAIN), (noise_name, noise_values, _STRONG)):
        sample = sample.numpy().clip(bins[0], bins[-1])
        axes.hist(sample, bins, weights=np.full(len(sample), 100 / len(sample)), alpha=0.7, color=color, label=name)
    answer = names[int(classify(study.model, said[empty_name])[0])]
    axes.axvline(
        float(empty_value), color="black", linestyle="--", label=f'{empty_name}: "{answer}", {empty_value[0]:.3g}'
    )
    (axes.set_xscale if is_distance else axes.set_yscale)("log")
    (axes.xaxis if is_distance else axes.yaxis).set_major_formatter("{x:g}")
    axes.set(xlabel=label, ylabel="share of the images (%)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)

    for place, image, title in (("noise", noisy[0], "such noise"), ("empty", empty[0], "empty")):
        mosaic[place].imshow(image.numpy(), cmap="gray", vmin=0, vmax=255)
        mosaic[place].set_title(title, fontsize=10)
        _no_ticks(mosaic[place])
    counts = torch.bincount(classify(study.model, said[noise_name]), minlength=len(names))
    axes = mosaic["says"]
    axes.bar(range(len(names)), 100 * counts.numpy() / _NOISE_IMAGES, color=_STRONG)
    axes.set_xticks(range(len(names)), names, rotation=0 if max(map(len, names)) < 3 else 45)
    axes.set(xlabel="the network calls noise", ylabel="share of the noise (%)", ylim=(0, 100))
    return figure
