"""The folder of a run: one process at a time, whatever its creation was interrupted by; no memory, no disk."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lenet_fast
from lenet_fast import checkpoint, data, run_folder, train
from lenet_fast.checkpoint import load_checkpoint, write_atomically
from lenet_fast.run_folder import FolderInUseError, RunFolder
from lenet_fast.train import Run, TrainConfig

FILES = {"checkpoint.pt", "config.json", "metrics.csv"}


@pytest.fixture(scope="module")
def few():
    whole = data.load("mnist-10k")
    parts = (data.Split(split.images[:100], split.labels[:100]) for split in (whole.train, whole.test))
    return data.Dataset(whole.name, *parts, whole.classes, "few")


def config(**changes):
    return TrainConfig(**{"model": "lenet1", "device": "cpu", "epochs": 2, "schedule": "constant"} | changes)


def names(folder):
    return {entry.name for entry in folder.iterdir()}


# --- One at a time --------------------------------------------------------------------------------


def test_a_folder_is_refused_by_the_name_of_the_process_that_uses_it(tmp_path, few):
    run = Run.create(config(epochs=1), tmp_path, dataset=few)
    assert names(tmp_path) == FILES | {"lock"}
    holder = rf"in use by process {os.getpid()} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d; wait"
    refused = []

    def second(epoch):
        for start in (lambda: Run.resume(tmp_path, dataset=few), lambda: Run.create(config(), tmp_path, dataset=few)):
            with pytest.raises(FolderInUseError, match=holder):
                start()
            refused.append(epoch.epoch)

    run.fit(on_epoch=second)
    assert refused == [1, 1]
    assert names(tmp_path) == FILES
    assert len(load_checkpoint(tmp_path / "checkpoint.pt")["history"]) == 1
    assert len(Run.resume(tmp_path, dataset=few, epochs=2).fit()) == 2


def test_of_two_that_start_at_once_one_gets_the_folder(tmp_path):
    first = RunFolder.create(tmp_path / "run")
    with pytest.raises(FolderInUseError):
        RunFolder.create(tmp_path / "run")
    first.release()
    RunFolder.create(tmp_path / "run").discard()
    assert names(tmp_path) == {"run"}  # the first has made it


def test_a_lock_file_that_nobody_holds_locks_nothing(tmp_path, few):
    (tmp_path / "lock").write_text("process 1 on a machine since 1998-11-01 00:00:00\n")
    run = Run.create(config(epochs=1), tmp_path, dataset=few)
    assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
    run.fit()
    assert names(tmp_path) == FILES


def test_a_run_that_is_given_up_or_fails_lets_go(tmp_path, few):
    Run.create(config(), tmp_path / "run", dataset=few)  # nothing refers to it
    with pytest.raises(ValueError, match="batch_size"):
        Run.resume(tmp_path / "run", dataset=few, batch_size=1)
    run = Run.resume(tmp_path / "run", dataset=few)
    with pytest.raises(ZeroDivisionError):
        run.fit(on_epoch=lambda epoch: 1 / 0)
    assert names(tmp_path / "run") == FILES
    Run.resume(tmp_path / "run", dataset=few).fit()


def test_a_run_does_not_undo_what_another_has_done_meanwhile(tmp_path, few):
    run = Run.create(config(), tmp_path, dataset=few)
    run.fit()
    Run.resume(tmp_path, dataset=few, epochs=3).fit()
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(FolderInUseError, match="has gone on with the run"):
        run.fit()
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept


def test_whoever_finds_the_lock_removed_takes_a_new_one(tmp_path, monkeypatch):
    """The holder removes the file between another's opening and locking it."""
    flock, calls = fcntl.flock, []

    def remove_first(file, how):
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / "lock").unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    RunFolder.create(tmp_path)
    assert len(calls) == 2


@pytest.mark.parametrize("system", ["no locks on this file system", "no flock"])
def test_where_there_are_no_locks_a_warning_says_so(tmp_path, few, monkeypatch, system):
    if system == "no flock":
        monkeypatch.setattr(run_folder, "fcntl", None)
    else:

        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="not locked, .*train in it only once"):
        run = Run.create(config(epochs=1), tmp_path, dataset=few)
    run.fit()
    assert names(tmp_path) == FILES


def test_two_who_write_one_file_at_once_do_not_tear_it(tmp_path, monkeypatch):
    """The second writes and renames while the first is about to rename."""
    replace, path = os.replace, tmp_path / "file"

    def write_meanwhile(source, target):
        monkeypatch.setattr(os, "replace", replace)
        write_atomically(path, b"second")
        assert path.read_bytes() == b"second"
        replace(source, target)

    monkeypatch.setattr(os, "replace", write_meanwhile)
    write_atomically(path, b"first")
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == {"file"}


# --- No dead end ----------------------------------------------------------------------------------


def test_a_creation_that_was_killed_is_no_dead_end(tmp_path, few):
    for leftovers in (
        {},
        {"lock": b"process 1 on a machine since 1998-11-01 00:00:00\n"},
        {"lock": b"", "checkpoint.pt.0a1b2c3d.tmp": b"half a checkpo"},
        {"config.json": b"", "checkpoint.pt.tmp": b"half a checkpo"},  # of versions before the lock
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, content in leftovers.items():
            (folder / name).write_bytes(content)
        with pytest.raises(FileNotFoundError, match=r"checkpoint\.pt: no such checkpoint; .* start it anew in this"):
            Run.resume(folder, dataset=few)
        run = Run.create(config(epochs=1), folder, dataset=few)
        assert names(folder) - {"lock"} - leftovers.keys() == FILES - leftovers.keys()
        run.fit()
        assert len(Run.resume(folder, dataset=few).fit()) == 1
        assert names(folder) == FILES


def test_a_full_disk_while_the_folder_is_created_leaves_nothing(tmp_path, few, monkeypatch):
    replace = os.replace
    for name in sorted(FILES):

        def fail(source, target, name=name):
            if os.path.basename(target) == name:
                raise OSError(errno.ENOSPC, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match=rf"No space left on device: '.*{name}'"):
            Run.create(config(), tmp_path / "runs" / "new", dataset=few)
        assert names(tmp_path) == set()
    monkeypatch.setattr(os, "pwrite", lambda *_: os.replace("", os.devnull + "/checkpoint.pt"))
    with pytest.raises(OSError, match=r"'.*lock'"):
        Run.create(config(), tmp_path / "runs" / "new", dataset=few)
    assert names(tmp_path) == set()


def test_nothing_of_anyone_is_overwritten(tmp_path, few):
    for name in ("checkpoint.pt", "config.json", "metrics.csv", "notes.txt", "other.tmp", "checkpoint.pt.old.tmp"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_bytes(b"something")
        with pytest.raises(FileExistsError, match=f"not empty, it has {name}; name another folder"):
            Run.create(config(), folder, dataset=few)
        assert names(folder) == {name}
        assert (folder / name).read_bytes() == b"something"
        if name != "checkpoint.pt":
            with pytest.raises(FileNotFoundError, match=r"no such checkpoint; .* is not the folder of a run"):
                Run.resume(folder, dataset=few)
            assert names(folder) == {name}
    with pytest.raises(FileNotFoundError, match=r"none.checkpoint\.pt: no such checkpoint; .*none is no folder"):
        Run.resume(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_resuming_clears_up_after_a_process_that_was_killed(tmp_path, few):
    Run.create(config(epochs=1), tmp_path, dataset=few).fit()
    for name in ("checkpoint.pt.tmp", "metrics.csv.01234567.tmp", "curve.png.89abcdef.tmp", "lock", "mine.tmp"):
        (tmp_path / name).write_bytes(b"half")
    Run.resume(tmp_path, dataset=few).fit()
    assert names(tmp_path) == FILES | {"mine.tmp"}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*file'"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"file"}


def test_a_file_is_on_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    """Else a power failure may leave the new name with nothing behind it."""
    path, steps = tmp_path / "file", []
    path.write_bytes(b"old")

    def noted(name, size_of, call):
        def note(file, *target):
            steps.append((name, size_of(file), path.read_bytes()))
            call(file, *target)

        monkeypatch.setattr(checkpoint.os, name, note)

    noted("fsync", lambda file: os.fstat(file).st_size, os.fsync)
    noted("replace", lambda file: file.stat().st_size, os.replace)
    write_atomically(path, b"a new one")
    assert steps == [("fsync", 9, b"old"), ("replace", 9, b"old")]
    assert path.read_bytes() == b"a new one"


# --- Out of memory --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nmore"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_out_of_memory_names_the_batch_and_the_remedy(tmp_path, few, monkeypatch, error):
    run = Run.create(config(batch_size=64), tmp_path, dataset=few)

    def fail(*_):
        raise error

    monkeypatch.setattr(run.engine, "run_epoch", fail)
    reason = str(error).partition("\n")[0] or "MemoryError"
    with pytest.raises(MemoryError) as raised:
        run.fit()
    assert str(raised.value) == f"not enough for a batch of 64 images; a smaller batch size needs less ({reason})"
    assert names(tmp_path) == FILES


def test_another_error_of_an_engine_is_itself(few, monkeypatch):
    run = train.Run(config(), dataset=few)

    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(run.engine, "run_epoch", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run.fit()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_does_not_keep_the_folder_of_a_process_that_is_gone(tmp_path):
    program = (
        "import os\n"
        "from lenet_fast.run_folder import RunFolder\n"
        "folder = RunFolder.create('run')\n"
        "if os.fork():\n"
        "    os._exit(0)  # as a process that is killed: nothing is released\n"
        "os.read(0, 1)\n"
    )
    path = os.pathsep.join([str(Path(lenet_fast.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": path}, "stdin": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], **options) as process:
        assert process.wait(60) == 0
        RunFolder.create(tmp_path / "run").release()
        process.stdin.close()  # ends the child
