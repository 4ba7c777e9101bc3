"""Pictures of a trained network: what they show is what the network does, for every model and its twin."""

import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from lenet_fast import data, figures, functional
from lenet_fast.data import Dataset, Split
from lenet_fast.figures import Study
from lenet_fast.images import save_png
from lenet_fast.models import MODELS, lenet5, lenet5_1998
from lenet_fast.tables import LENET5_C3
from lenet_fast.train import Run, TrainConfig

NAMES = {
    "filters_c1.png",
    "filters_c3.png",
    "maps_c1.png",
    "maps_c3.png",
    "wiring_c3.png",
    "confusion.png",
    "mistakes.png",
    "noise.png",
}


@pytest.fixture(scope="module")
def few():
    whole = data.load("mnist-10k")
    train_part = Split(whole.train.images[:300], whole.train.labels[:300])
    test_part = Split(whole.test.images[:100], whole.test.labels[:100])
    return Dataset(whole.name, train_part, test_part, whole.classes, "few")


@pytest.fixture(scope="module")
def studies(few):
    """A briefly trained network of every model, fused and plain."""
    made = {}
    for name in MODELS:
        for reference in (False, True):
            config = TrainConfig(model=name, epochs=1, batch_size=10, device="cpu", reference=reference)
            run = Run(config, dataset=few)
            run.fit()
            made[name, reference] = Study(run.model, run.input_spec, few, name)
    return made


def titles(figure):
    return figure.get_suptitle()


# --- All of them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_picture_of_every_model_is_drawn(studies, tmp_path, name):
    plain, folder = name in ("lenet5", "lenet5-1998"), tmp_path / "new" / "folder"
    folder.mkdir(parents=True)
    save_png(Image.new("RGB", (3, 3), "red"), folder / "noise.png")  # our own is replaced
    paths = figures.draw_all(studies[name, plain], folder, [3, 99])
    assert {path.name for path in paths} == {path.name for path in folder.iterdir()} == NAMES
    for path in paths:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 100
            body = np.asarray(picture.convert("L"))[60:]  # below the title
        assert (body < 250).mean() > 0.02, path


def test_nothing_is_drawn_where_it_would_replace_a_file_of_another(studies, tmp_path):
    own = tmp_path / "filters_c1.png"
    save_png(Image.new("RGB", (3, 3), "red"), own)
    before = own.read_bytes()
    (tmp_path / "noise.png").write_text("my own")
    with pytest.raises(FileExistsError, match=r"noise\.png: exists and is no picture that lenet-fast wrote"):
        figures.draw_all(studies["lenet1", False], tmp_path, [0])
    assert (tmp_path / "noise.png").read_text() == "my own"
    assert own.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"filters_c1.png", "noise.png"}


def test_wrong_images_are_refused_before_anything_is_written(studies, tmp_path):
    for images, message in (
        ([], "images: expected 1 to 12 of them, got 0"),
        (range(13), "images: expected 1 to 12 of them, got 13"),
        ([0, 100], "images: expected indices of the test images, 0 to 99, got 100"),
        ([-1], "images: expected indices of the test images, 0 to 99, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            figures.draw_all(studies["lenet1", False], tmp_path / "out", images)
    assert not (tmp_path / "out").exists()


def test_missing_matplotlib_says_what_to_install(studies, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install lenet-fast\[plot\]"):
        figures.draw_all(studies["lenet1", False], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- Convolutions -----------------------------------------------------------------------------------


def note(seen, key, module, inputs, output):
    seen[key] = output


@pytest.mark.parametrize("layer", ["c1", "c3"])
@pytest.mark.parametrize("name", MODELS)
def test_feature_maps_are_what_the_network_computes(studies, few, name, layer):
    """Pooled, they are the output of the fused layer; and they are the plain twin's, hook and all."""
    images = few.test.images[:3]
    for reference in (False, True):
        study = studies[name, reference]
        maps = torch.from_numpy(figures._Convolution.of(study, layer, images).maps())
        seen = {}
        handles = [
            module.register_forward_hook(partial(note, seen, key)) for key, module in study.model.named_children()
        ]
        with torch.no_grad():
            study.model(study.input_spec.prepare(images))
        for handle in handles:
            handle.remove()
        own = study.model.get_submodule(layer)
        if name == "lenet5-1998":
            summed = 4 * F.avg_pool2d(maps, 2) * own.coefficient.view(-1, 1, 1) + own.pool_bias.view(-1, 1, 1)
            pooled, expected = functional.reference.ACTIVATIONS["scaled_tanh"](summed), seen[layer]
        elif reference:
            pooled, expected = maps, seen[f"{layer}_act"]
        else:
            pooled, expected = functional.reference.POOLS[own.pool](maps), seen[layer]
        torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)
        assert not any(module._forward_pre_hooks for module in study.model.modules())


def test_a_map_of_each_image_is_shown_beside_it(studies, few):
    study = studies["lenet5", False]
    figure = figures.feature_maps(study, "c3", [7, 4])
    maps = figures._Convolution.of(study, "c3", few.test.images[[7, 4]]).maps()
    shown = [image.get_array() for image in figure.axes[0].images]
    assert len(shown) == 2 * (1 + 16)
    assert np.array_equal(shown[17], few.test.images[4].numpy())
    assert np.array_equal(shown[18 + 5], maps[1, 5])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        f"image {index}\nclass {few.test.labels[index]}" for index in (7, 4)
    ]


def test_a_kernel_is_shown_for_every_connection_and_no_other(studies):
    dense = figures.filters(studies["lenet5-d2l", True], "c3").axes[0].images
    assert len(dense) == 96
    weight = studies["lenet5-d2l", True].model.c3.weight
    assert np.array_equal(dense[6 * 5 + 2].get_array(), weight[5, 2].detach().numpy())
    sparse = figures.filters(studies["lenet5-1998", False], "c3").axes[0].images
    places = {(int(image.get_extent()[0]), int(image.get_extent()[3])) for image in sparse}
    assert places == {(target, source) for target, source in LENET5_C3.nonzero().tolist()}
    packed = studies["lenet5-1998", False].model.c3.weight.detach().numpy()
    assert all(np.array_equal(image.get_array(), kernel) for image, kernel in zip(sparse, packed, strict=True))


@pytest.mark.parametrize("reference", [False, True])
def test_the_wiring_is_table_one_of_the_paper(studies, reference):
    figure = figures.wiring(studies["lenet5-1998", reference])
    assert "60 of 96 pairs of maps are connected" in titles(figure)
    crosses = {tuple(map(int, text.get_position())) for text in figure.axes[0].texts if text.get_text() == "X"}
    assert crosses == {(target, source) for target, source in LENET5_C3.nonzero().tolist()}
    figure.draw_without_rendering()
    above, beside = figure.axes[0].child_axes
    assert [label.get_text() for label in above.get_xticklabels()] == list("3333334444444446")
    assert [label.get_text() for label in beside.get_yticklabels()] == ["10"] * 6


def test_a_dense_c3_says_so(studies, few):
    for name, maps, crosses in (("lenet5", 6, 96), ("lenet1", 4, 48)):
        for reference in (False, True):
            figure = figures.wiring(studies[name, reference])
            assert f"C3 is dense, every map sees all {maps}" in titles(figure)
            assert len(figure.axes[0].texts) == crosses
    opened = lenet5_1998(connections=None)
    assert "C3 is dense" in titles(figures.wiring(Study(opened, opened.input_spec, few, "")))
    sparse = lenet5(connections=LENET5_C3)
    assert "60 of 96" in titles(figures.wiring(Study(sparse, sparse.input_spec, few, "")))
    assert "60 of 96" in titles(figures.wiring(Study(sparse.reference(), sparse.input_spec, few, "")))


# --- Answers ----------------------------------------------------------------------------------------


class Fixed(Study):
    """A study whose network answers as told."""

    def __init__(self, model, dataset, outputs):
        super().__init__(model, model.input_spec, dataset, "told")
        self.__dict__["outputs"] = outputs


def told(few, wrong, rate=5.0):
    """Right about every test image but those in {index: (class, score)}."""
    outputs = rate * F.one_hot(few.test.labels, 10).double()
    for index, (answer, score) in wrong.items():
        outputs[index, answer] = score
    return outputs


def test_the_confusion_matrix_counts(few):
    labels = few.test.labels
    wrong = {index: ((int(labels[index]) + 1) % 10, 9.0) for index in range(30)}
    figure = figures.confusion_matrix(Fixed(lenet5(), few, told(few, wrong)))
    assert "30 errors in 100 test images (30.00 %)" in titles(figure)
    counts = torch.zeros(10, 10, dtype=torch.int64)
    for text in figure.axes[0].texts:
        column, row = map(int, text.get_position())
        counts[row, column] = int(text.get_text())
    expected = torch.zeros(10, 10, dtype=torch.int64)
    for index, label in enumerate(labels.tolist()):
        expected[label, (label + 1) % 10 if index < 30 else label] += 1
    assert torch.equal(counts, expected)


def test_the_worst_mistakes_are_the_surest(few):
    labels = few.test.labels
    wrong = {index: ((int(labels[index]) + 3) % 10, 6.0 + index / 10) for index in range(40)}
    figure = figures.worst_mistakes(Fixed(lenet5(), few, told(few, wrong)))
    assert "the 24 surest of 40 mistakes" in titles(figure)
    for place, index in enumerate(range(39, 15, -1)):
        axes = figure.axes[place]
        assert np.array_equal(axes.images[0].get_array(), few.test.images[index].numpy())
        assert axes.get_xlabel() == f"image {index}"
        share = torch.tensor([5.0, 6.0 + index / 10] + [0.0] * 8, dtype=torch.float64).softmax(0)
        label, answer = int(labels[index]), wrong[index][0]
        assert axes.get_title() == f"{label} → {answer}\n{share[0]:.3f} → {share[1]:.3f}"


def test_few_or_no_mistakes(few):
    figure = figures.worst_mistakes(Fixed(lenet5(), few, told(few, {5: (int(few.test.labels[5]) - 1, 9.0)})))
    assert [len(axes.images) for axes in figure.axes] == [1, 0, 0, 0, 0, 0]
    assert "no mistakes in 100 test images" in titles(figures.worst_mistakes(Fixed(lenet5(), few, told(few, {}))))


@pytest.mark.parametrize("name", ["lenet5", "lenet5-1998"])
def test_noise_shows_how_sure_the_network_is(studies, few, name):
    study = studies[name, False]
    figure = figures.noise(study)
    sure, noisy, empty, says = figure.axes
    is_distance = name == "lenet5-1998"
    assert sure.get_xlabel() == ("distance to the nearest class" if is_distance else "probability of the class named")
    legend = [text.get_text() for text in sure.get_legend().get_texts()]
    assert legend[:2] == ["100 test images", "2,000 images of uniform noise"]
    with torch.no_grad():
        output = study.model(study.input_spec.prepare(torch.zeros(1, 28, 28, dtype=torch.uint8)))[0]
    answer, value = (output.argmin(), output.min()) if is_distance else (output.argmax(), output.softmax(0).max())
    label, number = re.fullmatch(r'an empty image: "(\d)", ([\d.e+]+)', legend[2]).groups()
    assert int(label) == answer
    assert float(number) == pytest.approx(value.item(), rel=0.01)
    shares = [sum(bar.get_height() for bar in bars) for bars in sure.containers]
    assert shares == pytest.approx([100, 100])
    assert sum(bar.get_height() for bar in says.containers[0]) == pytest.approx(100)
    assert noisy.images[0].get_array().std() > 60
    assert empty.images[0].get_array().max() == 0
