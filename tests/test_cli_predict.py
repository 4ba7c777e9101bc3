"""The commands on a trained network: `lenet-fast eval`, `predict` and `figures`."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from lenet_fast import cli, data, figures, images, inference
from lenet_fast.checkpoint import load_checkpoint, save_checkpoint
from lenet_fast.inference import evaluate
from lenet_fast.models import MODELS, criterion
from lenet_fast.train import Run, TrainConfig
from lenet_fast.train_display import print_result, print_summary


@pytest.fixture(scope="module")
def few():
    whole = data.load("mnist-10k")
    train_part = data.Split(whole.train.images[:3000], whole.train.labels[:3000])
    test_part = data.Split(whole.test.images[:400], whole.test.labels[:400])
    return data.Dataset(whole.name, train_part, test_part, whole.classes, "a test [source]")


@pytest.fixture(scope="module")
def runs(few, tmp_path_factory):
    """A trained run of every model, two of them of the twin, by the model's name."""
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for name in MODELS:
        reference = name in ("lenet1", "lenet5-1998")
        config = TrainConfig(model=name, epochs=2, batch_size=16, device="cpu", reference=reference)
        made[name] = Run.create(config, folder / name, dataset=few)
        made[name].fit()
    return made


@pytest.fixture
def call(few, tmp_path, capsys, monkeypatch):
    """Run the command line in this process, in an empty folder, on a few digits: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", lambda name, data_dir: few)

    def call(*arguments):
        with pytest.raises(SystemExit) as exit:
            cli.main(list(map(str, arguments)))
        return exit.value.code or 0, *capsys.readouterr()

    return call


def draw(few, index, path):
    """Test image `index`, blue on white, large and off centre."""
    ink = Image.fromarray(few.test.images[index].numpy()).resize((170, 170), Image.Resampling.BICUBIC)
    picture = Image.new("RGB", (400, 300), "white")
    picture.paste(Image.new("RGB", (170, 170), "navy"), (200, 10), ink)
    picture.save(path)


# --- eval -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_eval_reports_what_the_run_saw(call, runs, few, name):
    run = runs[name]
    code, out, err = call("eval", run.folder)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    kind = "plain PyTorch twin" if run.config.reference else "fused layers"
    assert lines[:2] == [
        f"model   {name}, {kind}, 2 of 2 epochs on mnist-10k; on cpu",
        "data    mnist-10k, 400 test images: a test [source]",
    ]
    number = r"([\d.,]+)"
    pattern = rf"test    loss {number}, accuracy {number} %, error rate {number} %, {number} errors"
    loss, accuracy, rate, errors = map(float, re.fullmatch(pattern, lines[2]).groups())
    assert accuracy / 100 == pytest.approx(run.history[-1].test_accuracy, abs=1e-4)
    assert accuracy / 100 == pytest.approx(evaluate(run.model, run.input_spec, few.test), abs=1e-4)
    assert rate == pytest.approx(100 - accuracy)
    assert errors == pytest.approx(4 * rate)
    with torch.no_grad():
        outputs = run.model(run.input_spec.prepare(few.test.images))
    assert loss == pytest.approx(criterion(run.model)(outputs, few.test.labels).item(), abs=1e-3)
    classes = [line.split() for line in lines[4:]]
    assert [row[0] for row in classes] == list("0123456789")
    assert [int(row[1]) for row in classes] == torch.bincount(few.test.labels).tolist()
    assert sum(int(row[2]) for row in classes) == errors
    for _, count, wrong, rate, _ in classes:
        assert float(rate) == pytest.approx(100 * int(wrong) / int(count), abs=0.01)


@pytest.mark.filterwarnings("always:the network was trained")
def test_eval_takes_a_file_and_another_data_set(call, runs, few, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "load", lambda name, data_dir: asked.append((name, data_dir)) or few)
    checkpoint = runs["lenet1"].folder / "checkpoint.pt"
    for arguments, expected in (
        ((), ("mnist-10k", None)),
        (("--data-dir", "digits"), ("mnist", Path("digits"))),
        (("--dataset", "mnist"), ("mnist", None)),
        (("--dataset", "fashion-mnist", "--data-dir", "x"), ("fashion-mnist", Path("x"))),
    ):
        code, _, err = call("eval", checkpoint, *arguments)
        assert code == 0
        assert asked.pop() == expected
        assert ("has other classes" in err) == (expected[0] == "fashion-mnist")


def test_the_run_finds_its_own_data(call, runs, few, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "load", lambda name, data_dir: asked.append((name, data_dir)) or few)
    config = TrainConfig(model="lenet1", data_dir=str(tmp_path), epochs=1, device="cpu")
    Run.create(config, "run", dataset=few).fit()
    call("eval", "run")
    call("eval", "run", "--dataset", "mnist-10k")
    assert asked == [("mnist", str(tmp_path)), ("mnist-10k", None)]


def test_bad_checkpoints_are_one_line(call, runs, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/checkpoint.pt").write_text("no checkpoint")
    state = load_checkpoint(runs["lenet5"].folder / "checkpoint.pt")
    del state["format"]
    save_checkpoint(tmp_path / "other.pt", state | {"config": state["config"] | {"model": "lenet1"}})
    save_checkpoint(tmp_path / "newer.pt", state | {"config": state["config"] | {"sparkle": 1}})
    for path, message in (
        ("none", "none: no such checkpoint"),
        ("broken", "broken/checkpoint.pt: the checkpoint is damaged"),
        (".", "checkpoint.pt: no such checkpoint"),
        ("other.pt", "other.pt: its parameters do not fit lenet1"),
        ("newer.pt", "newer.pt: written by another version of lenet_fast, with sparkle"),
    ):
        for command in (["eval", path], ["predict", path, "picture.png"], ["figures", path]):
            code, out, err = call(*command)
            assert (code, out) == (1, "")
            assert err.startswith(f"lenet-fast: error: {message}")
            assert err.count("\n") == 1
    code, _, err = call("eval", runs["lenet5"].folder, "--device", "cuda:99")
    assert code == 1
    assert "device: 'cuda:99' is not available" in err


@pytest.mark.filterwarnings("always:.*not trained yet")
def test_an_untrained_network_is_noted(call, few):
    Run.create(TrainConfig(model="lenet1", device="cpu"), "run", dataset=few)
    code, _, err = call("eval", "run")
    assert code == 0
    assert err == "lenet-fast: note: run/checkpoint.pt: not trained yet, its weights are the initial ones\n"


# --- predict ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_predict_names_the_digits_that_were_drawn(call, runs, few, name):
    run = runs[name]
    with torch.no_grad():
        outputs = run.model(run.input_spec.prepare(few.test.images))
        surest = inference.probabilities(run.model, outputs).max(1).values.argsort(descending=True)[:3].tolist()
        for index in surest:
            draw(few, index, f"{index}.png")
        code, out, err = call("predict", run.folder, *(f"{index}.png" for index in surest))
        assert (code, err) == (0, "")
        lines = out.splitlines()[1:]
        for line, index in zip(lines, surest, strict=False):
            said = run.model(run.input_spec.prepare(images.read_digit(f"{index}.png").pixels[None]))[0].double()
            if name == "lenet5-1998":
                shares = (-said).exp() / (1 + (-said).exp().sum())
                rest = f"; no digit, probability {1 - shares.sum():.3f}; distance {said.min():.3g}"
            else:
                shares, rest = said.softmax(0), ""
            first, second = shares.topk(2).indices.tolist()
            assert first == few.test.labels[index]
            assert line == (
                f"{index}.png: {first}, probability {shares[first]:.3f}; "
                f"runner-up {second}, probability {shares[second]:.3f}{rest}"
            )
    assert lines[3:] == ["what the network saw: seen.png"]
    with Image.open("seen.png") as picture:
        assert picture.format == "PNG"
    assert call("predict", run.folder, f"{surest[0]}.png")[0] == 0  # replaces its own picture


def test_predict_goes_on_after_unreadable_pictures_and_fails_at_the_end(call, runs, few):
    draw(few, 0, "good.png")
    draw(few, 1, "also good.jpg")
    Image.new("RGB", (50, 50), "white").save("blank.png")
    Path("text.png").write_text("no picture")
    pictures = ["none.png", "good.png", "blank.png", "text.png", "also good.jpg"]
    code, out, err = call("predict", runs["lenet5"].folder, *pictures, "--save", "what.png")
    assert code == 1
    errors = err.splitlines()
    assert len(errors) == 3
    assert all(line.startswith("lenet-fast: error: ") for line in errors)
    for line, name in zip(errors, ("none.png", "blank.png", "text.png"), strict=True):
        assert name in line
    lines = out.splitlines()
    assert [line.partition(":")[0] for line in lines[1:]] == ["good.png", "also good.jpg", "what the network saw"]
    assert Path("what.png").exists()


def test_predict_without_a_single_digit_leaves_no_picture(call, runs):
    code, out, _ = call("predict", runs["lenet5"].folder, "none.png")
    assert code == 1
    assert out.count("\n") == 1
    assert not list(Path.cwd().iterdir())


def test_predict_never_replaces_a_file_of_another(call, runs, few):
    draw(few, 0, "good.png")
    draw(few, 1, "seen.png")
    before = Path("seen.png").read_bytes()
    folder = runs["lenet5"].folder
    for arguments, message in (
        (["good.png"], "seen.png: exists and is no picture that lenet-fast wrote; name another"),
        (["seen.png"], "--save: seen.png is one of the pictures to read; name another"),
        (["good.png", "--save", "good.png"], "--save: good.png is one of the pictures to read; name another"),
    ):
        code, _, err = call("predict", folder, *arguments)
        assert (code, err) == (1, f"lenet-fast: error: {message}\n")
    assert Path("seen.png").read_bytes() == before
    code, _, err = call("predict", folder, "good.png", "--save", "no/such/folder.png")
    assert code == 1
    assert "no/such/folder.png" in err


def test_predict_reads_pictures_whatever_their_names(call, runs, few):
    names = ["a\nb.png", "\x1b]0;owned\x07.png", os.fsdecode(b"caf\xe9.png"), "ok.png: 7, probability 1.000\nx.png"]
    for index, name in enumerate(names):
        draw(few, index, name)
    code, out, err = call("predict", runs["lenet5"].folder, "no\nsuch.png", *names)
    assert code == 1
    assert err.startswith("lenet-fast: error: ")
    assert err.count("\n") == 1
    lines = out.split("\n")
    assert all(line.isprintable() for line in lines)
    shown = [r"a\nb.png", r"\x1b]0;owned\x07.png", r"caf\xe9.png", r"ok.png: 7, probability 1.000\nx.png"]
    for line, name in zip(lines[1:5], shown, strict=True):
        assert line.startswith(f"{name}: ")
    assert lines[5:] == ["what the network saw: seen.png", ""]
    assert Path("seen.png").exists()


def test_run_folders_of_any_name(call, runs, few, monkeypatch, capsys):
    draw(few, 0, "good.png")
    folder = os.fsdecode(b"run\n\x1b[31m\xe9")
    for command in (["eval", folder], ["predict", folder, "good.png"], ["figures", folder]):
        code, out, err = call(*command)
        assert (code, out) == (1, "")
        assert err.count("\n") == 1
        assert r"run\n\x1b[31m\xe9" in err
    monkeypatch.setattr(figures, "draw_all", lambda study, folder, images: [folder / "filters.png"])
    shutil.copytree(runs["lenet5"].folder, folder)
    code, out, _ = call("figures", folder)
    assert (code, out.splitlines()[1:]) == (0, [r"run\n\x1b[31m\xe9/figures/filters.png"])
    run = Run.resume(folder, dataset=few)
    print_summary(run)
    print_result(run)
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.split("\n"))
    assert out.count(r"  run\n\x1b[31m\xe9") == 3  # folder, curve, checkpoint


def test_predict_saves_onto_files_only(call, runs, few, monkeypatch):
    draw(few, 0, "good.png")
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("link").symlink_to("pipe")
    message = "exists and is no picture that lenet-fast wrote; name another"
    for target in ("pipe", "folder", "link", "/dev/null"):
        code, out, err = call("predict", runs["lenet5"].folder, "good.png", "--save", target)
        assert (code, err) == (1, f"lenet-fast: error: {target}: {message}\n")
        assert out.count("\n") == 1  # nothing is predicted that cannot be shown
    monkeypatch.setattr(os, "access", lambda path, mode, **_: not mode & os.W_OK)
    code, _, err = call("predict", runs["lenet5"].folder, "good.png", "--save", "folder/seen.png")
    assert (code, err.count("\n")) == (1, 1)
    assert "folder/seen.png: nothing can be written into the folder folder" in err


def test_predict_passes_over_what_is_no_file(call, runs, few):
    draw(few, 0, "good.png")
    os.mkfifo("pipe.png")
    Path("loop.png").symlink_to("loop.png")
    code, out, err = call("predict", runs["lenet5"].folder, "pipe.png", "/dev/zero", ".", "loop.png", "good.png")
    assert code == 1
    assert err.count("\n") == 4
    assert out.splitlines()[1].startswith("good.png: ")
    assert Path("seen.png").exists()


def test_predict_says_what_it_left_out(call, runs, few):
    draw(few, 0, "good.png")
    picture = Image.open("good.png")
    ImageDraw.Draw(picture).rectangle((0, 0, 399, 299), outline="black", width=4)
    picture.save("framed.png")
    _, out, _ = call("predict", runs["lenet5"].folder, "good.png", "framed.png")
    good, framed = out.splitlines()[1:3]
    assert framed == good.replace("good", "framed") + "; left out: the frame or edge along the border"


@pytest.mark.filterwarnings("always:the network was trained")
def test_predict_warns_of_garments(call, runs, few):
    draw(few, 0, "good.png")
    shutil.copytree(runs["lenet5"].folder, "garments")
    state = load_checkpoint("garments/checkpoint.pt")
    del state["format"]
    config = state["config"] | {"dataset": "fashion-mnist"}
    save_checkpoint(Path("garments/checkpoint.pt"), state | {"config": config})
    code, out, err = call("predict", "garments", "good.png")
    assert code == 0
    assert err.startswith("lenet-fast: note: the network was trained on fashion-mnist")
    assert any(name in out for name in data.CLASSES["fashion-mnist"])


def test_missing_libraries_are_one_line(call, runs, few, monkeypatch):
    draw(few, 0, "good.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = call("figures", runs["lenet5"].folder)
    assert code == 1
    assert err == "lenet-fast: error: matplotlib is not installed; `pip install lenet-fast[plot]` draws it\n"
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    code, _, err = call("predict", runs["lenet5"].folder, "good.png")
    assert code == 1
    assert err == "lenet-fast: error: Pillow is not installed; `pip install lenet-fast[plot]` brings it\n"
    assert call("eval", runs["lenet5"].folder)[0] == 0  # which draws nothing


# --- figures ----------------------------------------------------------------------------------------


def test_figures_go_to_the_run_folder_or_where_told(call, runs):
    shutil.copytree(runs["lenet5-1998"].folder, "run")
    code, out, err = call("figures", "run", "--images", "7,3")
    assert (code, err) == (0, "")
    drawn = out.splitlines()[1:]
    assert len(drawn) == 8
    assert {Path("run/figures") / Path(path).name for path in drawn} == set(Path("run/figures").iterdir())
    assert not list(Path.cwd().glob("*.png"))


def test_figures_refuse_wrong_images_and_folders(call, runs):
    Path("file").write_text("")
    for arguments, message in (
        (["--images", "1,two"], "images: expected indices such as 0,1,2, got '1,two'"),
        (["--images", ""], "images: expected indices such as 0,1,2, got ''"),
        (["--images", "400"], "images: expected indices of the test images, 0 to 399, got 400"),
        (["--out", "file"], "[Errno 17] File exists: 'file'"),
    ):
        code, _, err = call("figures", runs["lenet1"].folder, "--out", "pictures", *arguments)
        assert (code, err) == (1, f"lenet-fast: error: {message}\n")
    assert not Path("pictures").exists()


def test_help_says_what_each_command_does(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = call("--help")
    assert code == 0
    for words in ("Test a trained network", "Name the digit in each picture", "Draw a trained network"):
        assert words in out
