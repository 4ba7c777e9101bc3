"""Checkpoints that were edited: whatever entry it is and whatever it became, an error names the file and the entry."""

import copy
import io
import math
import os
import pickle

import pytest
import torch

from lenet_fast import cli, data
from lenet_fast.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from lenet_fast.saved_run import SavedRun
from lenet_fast.train import Run, TrainConfig, build_model

RUNS = [
    {"model": "lenet1"},
    {"model": "lenet1", "optimizer": "sgd", "momentum": 0.9, "dtype": "float64"},
    {"model": "lenet5-1998", "optimizer": "sgd", "lr": 1e-4},  # its output layer has a buffer
]


@pytest.fixture(scope="module")
def few():
    whole = data.load("mnist-10k")
    parts = (data.Split(split.images[:100], split.labels[:100]) for split in (whole.train, whole.test))
    return data.Dataset(whole.name, *parts, whole.classes, "few")


@pytest.fixture(scope="module", params=RUNS, ids=lambda options: "-".join(map(str, options.values())))
def state(request, few, tmp_path_factory):
    """What the checkpoint of a run of one epoch has."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    Run.create(TrainConfig(device="cpu", epochs=1, **request.param), folder, dataset=few).fit()
    return load_checkpoint(folder / "checkpoint.pt")


def places(value, place=()):
    """Every entry of nested dicts and lists, as the keys that lead to it."""
    if place:
        yield place
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*place, key))


def edits(value):
    """What `value` may have become: none of it is right."""
    wrong = [None, "text", -1, 0.5, math.nan, 10**400, True, b"bytes", [], {}, [value], {"a": value}, (), {1}, 1j]
    wrong += [torch.zeros(2, 3), torch.zeros(0, dtype=torch.int32)]
    if isinstance(value, torch.Tensor):
        wrong += [value[None], value.to(torch.float16), value.to(torch.complex64), value.tolist(), value.to("meta")]
        if value.is_floating_point():
            wrong += [torch.full_like(value, math.nan), torch.full_like(value, math.inf), torch.nn.Parameter(value)]
        else:
            wrong += [value[:-1], torch.zeros_like(value)]
        if value.dim():
            wrong += [value.to_sparse(), value.flatten()[1:]]
    if isinstance(value, dict):
        wrong += [value | {"unknown": 0}, value | {99: 0}]
    if isinstance(value, list):
        wrong += [value * 2]
    return [edit for edit in wrong if not same(edit, value)]


def same(one, other):
    tensors = isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor)
    return not tensors and type(one) is type(other) and one == other


def edited(state, place, *value):
    """`state` with another value at `place`, or without it."""
    *way, last = place
    state = copy.deepcopy(state)
    holder = state
    for key in way:
        holder = holder[key]
    if value:
        holder[last] = value[0]
    else:
        del holder[last]
    return state


def believe(path):
    """What `train --resume` and `eval` do with a checkpoint."""
    saved = SavedRun.load(path)
    saved.restore(build_model(saved.config)[0])
    saved.restore_generator(torch.Generator())


OPEN = {  # entries that may have become these
    ("config", "data_dir"): ["text"],
    ("config", "seed"): [],
    ("config", "lr"): [0.5],
    ("config", "weight_decay"): [0.5],
    ("config", "momentum"): [0.5],
    ("config", "reference"): [True],
    ("config", "engine"): [],
    ("history",): [[]],  # it is the engine's state that contradicts
    ("history", 0, "learning_rate"): [0.5],
    ("history", 0, "loss"): [0.5],
    ("history", 0, "train_accuracy"): [0.5],
    ("history", 0, "test_accuracy"): [0.5],
    ("history", 0, "seconds"): [0.5],
    ("history", 0, "examples_per_second"): [0.5],
    ("engine", "param_groups", 0, "lr"): [0.5],
}


OPTIONAL = {("config", "engine"), ("history", 0)}  # versions without engines; as above


def test_whatever_an_entry_has_become_is_said(tmp_path, state, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # two thousand times
    path = tmp_path / "checkpoint.pt"
    believed, unnamed, tried = [], [], 0
    del state["format"]
    save_checkpoint(path, state)
    believe(path)
    for place in places(state):
        if any(isinstance(key, int) and key > 0 for key in place):
            continue  # a parameter like the first
        if state["config"]["optimizer"] == "sgd" and place[0] not in ("model", "engine"):
            continue  # the rest is as with Adam
        for value in [(), *((edit,) for edit in edits(value_at(state, place)))]:
            what = f"{place} {value}"
            if value and any(same(value[0], right) for right in OPEN.get(place, [])):
                continue
            if not value and place in OPTIONAL:
                continue
            try:
                save_checkpoint(path, edited(state, place, *value))
            except (RuntimeError, NotImplementedError):  # torch.save does not take it
                continue
            tried += 1
            try:
                believe(path)
            except CheckpointError as error:
                text = str(error).removeprefix(f"{path}: ")
                is_named = str(place[0]) in text or "damaged" in text
                if text == str(error) or "\n" in text or len(text) > 300 or not is_named:
                    unnamed.append(f"{what}: {error}")
            else:
                believed.append(what)
    assert believed == []
    assert unnamed == []
    assert tried > (200 if state["config"]["optimizer"] == "sgd" else 500)


def value_at(state, place):
    for key in place:
        state = state[key]
    return state


def test_an_error_says_what_was_expected_and_what_was_found(tmp_path, few):
    Run.create(TrainConfig(model="lenet1", device="cpu", epochs=1), tmp_path, dataset=few).fit()
    path = tmp_path / "checkpoint.pt"
    state = load_checkpoint(path)
    del state["format"]
    fit = "its parameters do not fit lenet1: model"
    other = torch.zeros(4, 1, 5, 5, dtype=torch.float64)
    for place, value, message in (
        (("config", "lr"), ("fast",), "config: lr: expected float or None or int, got 'fast'"),
        (("config", "lr"), (None,), "config: lr: expected 0.002, found None"),
        (("config", "lr"), (), "config: expected an entry 'lr', found none"),
        (("config", "sparkle"), (1,), "written by another version of lenet_fast, with sparkle in its config"),
        (("config", "model"), ("lenet6",), "config: model: expected one of .*, got 'lenet6'"),
        (("history", 0, "loss"), (math.nan,), r"history\[0\]: loss: expected a finite number from 0, found nan"),
        (("history", 0, "epoch"), (2,), r"history\[0\]: epoch: expected 1, found 2"),
        (("history", 0, "test_accuracy"), (1.5,), r"history\[0\]: test_accuracy: expected .* from 0 to 1, found 1\.5"),
        (("threads",), (0,), "threads: expected an int from 1 to .*, found 0"),
        (
            ("model", "c1.weight"),
            (other,),
            rf"{fit}: c1\.weight: expected a tensor of float32, \(4, 1, 5, 5\), found a tensor of float64",
        ),
        (("model", "c9.weight"), (other,), f"{fit}: expected no other entries than those .*, found 'c9.weight'"),
        (
            ("engine", "state", 0, "exp_avg_sq"),
            (torch.full((4, 1, 5, 5), -1.0),),
            r"engine: state\[0\]: exp_avg_sq: expected values of at least 0, found -1",
        ),
        (
            ("engine", "param_groups", 0, "betas"),
            ((0.9, 2.0),),
            r"engine: param_groups\[0\]: betas: expected \(0\.9, 0\.999\), found a tuple of 2",
        ),
        (("engine", "state"), ({},), r"engine: state: expected an entry 0, found none"),
    ):
        save_checkpoint(path, edited(state, place, *value))
        with pytest.raises(CheckpointError, match=message):
            believe(path)


def test_tensors_that_are_one_in_the_file_are_two_in_the_run(tmp_path, few):
    config = TrainConfig(model="lenet1", device="cpu", epochs=1, schedule="constant")
    Run.create(config, tmp_path / "run", dataset=few).fit()
    path = tmp_path / "run" / "checkpoint.pt"
    state = load_checkpoint(path)
    del state["format"]
    one = torch.zeros(()).expand(4, 1, 5, 5)
    state["engine"]["state"][0] |= {"exp_avg": one, "exp_avg_sq": one}
    save_checkpoint(path, state)
    assert len(Run.resume(tmp_path / "run", dataset=few, epochs=2).fit()) == 2


def test_files_of_other_programs(tmp_path, few):
    Run.create(TrainConfig(model="lenet1", device="cpu", epochs=1), tmp_path, dataset=few).fit()
    path = tmp_path / "checkpoint.pt"
    state = load_checkpoint(path)
    whole = path.read_bytes()
    contents = [b"", b"text", whole[:-1], whole[: len(whole) // 2], pickle.dumps({"config": {}}), b"\0" * 1000]
    for value, new in (
        (build_model(TrainConfig(model="lenet1", device="cpu"))[0].state_dict(), True),
        (build_model(TrainConfig(model="lenet1", device="cpu"))[0], True),
        (state, False),
        ([1, 2], True),
        (state | {"unknown": 1}, True),
        ({name: value for name, value in state.items() if name != "threads"}, True),
        (state | {"format": torch.zeros(2)}, True),
        (state | {"format": True}, True),
    ):
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=new)
        contents.append(buffer.getvalue())
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as raised:
            believe(path)
        assert str(raised.value).startswith(f"{path}: ")
        assert "\n" not in str(raised.value)


def test_every_command_says_it_in_one_line(tmp_path, few, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", lambda name, data_dir: few)
    Run.create(TrainConfig(model="lenet1", device="cpu", epochs=1), "run", dataset=few).fit()
    path = tmp_path / "run" / "checkpoint.pt"
    whole = path.read_bytes()
    state = load_checkpoint(path)
    del state["format"]
    for place, value in (
        (("config", "sparkle"), 1),
        (("config", "epochs"), "1"),
        (("history",), {}),
        (("model", "c1.bias"), torch.zeros(5)),
        (("engine", "param_groups"), []),
        (("engine", "state", 2, "step"), None),
        (("generator",), torch.zeros(3)),
        (("data_crc32",), -1),
        (None, whole[:5000]),
        (None, b"garbage"),
    ):
        if place is None:
            path.write_bytes(value)
        else:
            save_checkpoint(path, edited(state, place, value))
        kept = path.read_bytes()
        for command in (["train", "--resume", "run"], ["eval", "run"], ["predict", "run", "x.png"], ["figures", "run"]):
            with pytest.raises(SystemExit) as exit:
                cli.main(command)
            out, err = capsys.readouterr()
            assert (exit.value.code, out) == (1, "")
            assert err.startswith("lenet-fast: error: run/checkpoint.pt: ")
            assert err.count("\n") == 1
        assert path.read_bytes() == kept
    assert {entry.name for entry in path.parent.iterdir()} == {"checkpoint.pt", "config.json", "metrics.csv"}
