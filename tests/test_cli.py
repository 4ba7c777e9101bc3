"""The command line: what it prints, its exit codes, and interruptions of the real process."""

import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lenet_fast
from lenet_fast import cli, data, interrupts, train
from lenet_fast.checkpoint import load_checkpoint
from lenet_fast.engines import FusedEngine
from lenet_fast.interrupts import Interrupted, Interrupts
from lenet_fast.run_folder import FolderInUseError, RunFolder

LAST_LINE = r"loss \d\.\d{3}, train acc [01]\.\d{3}, test acc [01]\.\d{3}, [\d,]+\.\d examples/s on cpu"
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(lenet_fast.__file__).parents[1]),  # whether installed or not
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "200",
}


@pytest.fixture
def call(tmp_path, capsys, monkeypatch):
    """Run the command line in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        with pytest.raises(SystemExit) as exit:
            cli.main(list(map(str, arguments)))
        return exit.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture
def few(monkeypatch):
    """Replace the embedded digits by 200 of them."""
    whole = data.load("mnist-10k")
    train_part = data.Split(whole.train.images[:200], whole.train.labels[:200])
    test_part = data.Split(whole.test.images[:100], whole.test.labels[:100])
    dataset = data.Dataset(whole.name, train_part, test_part, whole.classes, "a test [source]")
    monkeypatch.setattr(data, "load", lambda name, data_dir: dataset)


def start(*arguments, cwd):
    command = [sys.executable, "-m", "lenet_fast", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, env=ENVIRONMENT, text=True, **pipes)


def test_train_tells_what_it_does_and_where_the_results_are(call, few, tmp_path):
    code, out, err = call("train", "--epochs", 2, "--device", "cpu", "--seed", 5)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"lenet5-mnist-10k-\d{8}-\d{6}-\d{6}", folder.name)
    assert lines[:2] == [
        "model   lenet5, fused layers, 61,706 parameters",
        "data    mnist-10k, 200 training and 100 test images: a test [source]",
    ]
    assert "epochs 1 to 2, batches of 32, adam, lr 0.002 (cosine), seed 5" in lines[2]
    assert re.search(r"cpu, \d+ threads, float32, fused engine", lines[3])
    assert lines[4] == f"folder  runs/{folder.name}"
    for number, line in enumerate(lines[5:7], 1):
        epoch = rf"epoch {number}/2  loss [\d.]+  train acc [\d.]+  test acc [\d.]+  [\d,]+ images/s"
        assert re.fullmatch(epoch, line)
    assert re.fullmatch(r"time        \d+\.\d s for 2 epochs, \d+\.\d s of it training", lines[7])
    assert lines[8:10] == [
        f"curve       runs/{folder.name}/curve.png",
        f"checkpoint  runs/{folder.name}/checkpoint.pt",
    ]
    assert re.fullmatch(LAST_LINE, lines[10])
    assert len(lines) == 11
    assert {path.name for path in folder.iterdir()} == {"checkpoint.pt", "config.json", "metrics.csv", "curve.png"}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_lecun1998_sets_his_experiment_beside_ours(call, few, tmp_path):
    makefile = Path(lenet_fast.__file__).parents[1]
    if not (makefile / "Makefile").exists():
        pytest.skip("an installed package has no Makefile")
    make = ["make", "--dry-run", "--no-print-directory", "--assume-old=install", "lecun1998"]
    recipe = subprocess.run(make, cwd=makefile, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    program, *arguments = shlex.split(recipe.replace("\\\n", ""))
    assert Path(program).name == "lenet-fast"
    code, out, err = call(*arguments, "--epochs", 2, "--device", "cpu")
    assert (code, err) == (0, "")
    (folder,) = (tmp_path / "runs").iterdir()
    config = load_checkpoint(folder / "checkpoint.pt")["config"]
    assert (config["model"], config["dataset"], config["engine"]) == ("lenet5-1998", "mnist", "fused")
    assert arguments[arguments.index("--epochs") + 1] == "20"
    assert re.search(
        r"^on      cpu, \d+ threads, float32, fused engine: whole steps in native code$", out, re.MULTILINE
    )
    error = 100 * (1 - load_checkpoint(folder / "checkpoint.pt")["history"][-1]["test_accuracy"])
    ours = f"test error {error:.2f} % after 2 passes over 200 digits"
    assert f"1998        {ours}; LeCun et al.: 0.95 % after 20 passes over 60,000 digits, in 2 to 3 days\n" in out
    assert re.search(r"^time        \d+\.\d s for 2 epochs", out, re.MULTILINE)
    assert f"curve       runs/{folder.name}/curve.png\n" in out


def test_every_option_reaches_the_run(call, few, tmp_path):
    options = {
        "model": "lenet5-d2l",
        "dataset": "mnist",
        "data_dir": str(tmp_path),
        "epochs": 1,
        "batch_size": 50,
        "optimizer": "sgd",
        "lr": 0.03,
        "schedule": "constant",
        "momentum": 0.5,
        "weight_decay": 0.01,
        "seed": 4,
        "device": "cpu",
        "dtype": "float64",
        "reference": True,
        "engine": "autograd",
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if name != "reference"]
    code, out, err = call("train", *flags, "--reference", "--run-dir", "results")
    assert (code, err) == (0, "")
    assert load_checkpoint("results/checkpoint.pt")["config"] == options
    assert "lenet5-d2l, plain PyTorch twin" in out


def test_resume_goes_on_and_a_finished_run_says_so(call, few):
    call("train", "--epochs", 1, "--run-dir", "run", "--schedule", "constant", "--device", "cpu")
    code, out, err = call("train", "--resume", "run")
    assert (code, err) == (0, "")
    assert "nothing left to do" in out
    assert "all 1 epochs are finished; --epochs N with a larger N goes on" in out
    assert re.fullmatch(LAST_LINE, out.splitlines()[-1])
    code, out, err = call("train", "--resume", "run", "--epochs", 3)
    assert (code, err) == (0, "")
    assert "epochs 2 to 3" in out
    assert [epoch["epoch"] for epoch in load_checkpoint("run/checkpoint.pt")["history"]] == [1, 2, 3]


def test_missing_matplotlib_is_one_line(call, few, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = call("train", "--epochs", 1, "--run-dir", "run")
    assert (code, err) == (0, "")
    assert "curve       not drawn: matplotlib is not installed; `pip install lenet-fast[plot]` draws it\n" in out
    assert not Path("run/curve.png").exists()


def test_expected_errors_are_one_line_and_leave_nothing(call, few):
    call("train", "--epochs", 1, "--run-dir", "used")
    Path("broken").mkdir()
    Path("broken/checkpoint.pt").write_text("no checkpoint")
    for arguments, message in (
        (["--model", "lenet6"], "model: expected one of 'lenet1', 'lenet5', 'lenet5-d2l', 'lenet5-1998', got 'lenet6'"),
        (["--epochs", "0"], "epochs: expected an int of at least 1, got 0"),
        (["--lr", "nan"], "lr: expected a finite number above 0, got nan"),
        (["--device", "cuda:99"], "device: 'cuda:99' is not available"),
        (["--run-dir", "used"], "used: not empty"),
        (["--resume", "used", "--batch-size", "99"], "batch_size: cannot change in a run, used has 32; got 99"),
        (["--resume", "used", "--run-dir", "new"], "--run-dir and --resume exclude each other"),
        (["--resume", "broken"], "broken/checkpoint.pt: the checkpoint is damaged"),
        (["--resume", "none"], "none/checkpoint.pt: no such checkpoint"),
        (["--optimizer", "sgd", "--lr", "1e30", "--run-dir", "diverged"], "the loss is not finite in epoch 1"),
    ):
        code, _, err = call("train", *arguments)
        assert code == 1, arguments
        assert err.startswith(f"lenet-fast: error: {message}")
        assert err.count("\n") == 1
    assert {path.name for path in Path.cwd().iterdir()} == {"used", "broken", "diverged"}


def test_damaged_data_never_trains(call, tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03 and no more")
    code, out, err = call("train", "--data-dir", tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith("lenet-fast: error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_wrong_usage_is_exit_code_2(call):
    for arguments in (["train", "--no-such-option"], ["train", "--epochs", "many"], ["no-such-command"]):
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert err


def test_help_names_the_choices(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = call("train", "--help")
    assert code == 0
    for name in ("lenet5-d2l", "fashion-mnist", "adam", "cosine", "bfloat16", "--resume", "0.002 for adam"):
        assert name in out


def test_env_prints_the_report(call):
    code, out, _ = call("env")
    assert code == 0
    assert torch.__version__ in out


def test_importing_the_package_or_training_needs_no_command_line_or_picture_library():
    check = "import sys, lenet_fast.train; print({'typer', 'rich', 'matplotlib', 'triton'} & sys.modules.keys())"
    output = subprocess.run([sys.executable, "-c", check], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert output.stdout == "set()\n"


# --- One error boundary -----------------------------------------------------------------------------


def fail_with(monkeypatch, error):
    def load(name, data_dir):
        raise error

    monkeypatch.setattr(data, "load", load)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory: MemoryError"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried 1 MiB.\nmore"),
            "out of memory: CUDA out of memory. Tried 1 MiB.",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory: DefaultCPUAllocator"),
        (OSError(28, "No space left on device", "runs/x"), "[Errno 28] No space left on device: 'runs/x'"),
        (ValueError("lr: expected"), "lr: expected"),
    ],
)
def test_what_input_or_the_machine_cause_is_one_line(call, monkeypatch, tmp_path, error, message):
    fail_with(monkeypatch, error)
    code, out, err = call("train", "--run-dir", "run")
    assert (code, out) == (1, "")
    assert err.startswith(f"lenet-fast: error: {message}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), KeyError("a bug"), TypeError("a bug"), AssertionError("a bug")]
)
def test_a_bug_shows_where_it_is(tmp_path, monkeypatch, error):
    monkeypatch.chdir(tmp_path)
    fail_with(monkeypatch, error)
    with pytest.raises(type(error), match="a bug"):
        cli.main(["train"])


def test_too_large_a_batch_says_so(call, few, monkeypatch):
    def run_epoch(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.\nmore")

    monkeypatch.setattr(FusedEngine, "run_epoch", run_epoch)
    code, _, err = call("train", "--run-dir", "run", "--device", "cpu", "--batch-size", 150)
    assert code == 1
    assert err.startswith(
        "lenet-fast: error: out of memory: not enough for a batch of 150 images; a smaller batch size "
    )
    assert err.endswith("you tried to allocate 99 bytes.)\n")
    assert err.count("\n") == 1


def test_a_full_disk_in_a_run_leaves_the_last_checkpoint(call, few, monkeypatch):
    replace, saved = os.replace, []

    def fill(source, target):
        saved.append(target)
        if len(saved) > 6:  # three files, twice
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fill)
    code, _, err = call("train", "--run-dir", "run", "--epochs", 3, "--device", "cpu")
    assert (code, err) == (1, "lenet-fast: error: [Errno 28] No space left on device: 'run/checkpoint.pt'\n")
    assert len(load_checkpoint("run/checkpoint.pt")["history"]) == 1
    assert {path.name for path in Path("run").iterdir()} == {"checkpoint.pt", "config.json", "metrics.csv"}
    monkeypatch.undo()


@pytest.fixture
def homeless(monkeypatch):
    """A user without a name, as in a container: no home folder."""
    import pwd

    def unknown(user):
        raise KeyError(user)

    for name in ("HOME", "XDG_CACHE_HOME", "LENET_FAST_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_without_a_home_folder(call, homeless, tmp_path, monkeypatch):
    no_home = "mnist: there is no home folder to download into, set HOME or XDG_CACHE_HOME"
    unknown = "expected a path, or one in a home folder that exists; got "
    for arguments, message in (
        (("--dataset", "mnist"), no_home),
        (("--data-dir", "~/mnist"), f"data_dir: {unknown}'~/mnist'"),
        (("--data-dir", "~nosuchuser/mnist"), f"data_dir: {unknown}'~nosuchuser/mnist'"),
    ):
        code, out, err = call("train", *arguments)
        assert (code, out) == (1, "")
        assert err.startswith(f"lenet-fast: error: {message}")
        assert err.count("\n") == 1
    monkeypatch.setenv("LENET_FAST_DATA", "~nosuchuser/mnist")
    code, _, err = call("train", "--dataset", "mnist")
    assert (code, err) == (1, f"lenet-fast: error: $LENET_FAST_DATA: {unknown}'~nosuchuser/mnist'\n")
    assert list(tmp_path.iterdir()) == []


def test_what_needs_no_home_folder_works_without_one(call, homeless, few):
    assert call("train", "--epochs", 1, "--run-dir", "run", "--device", "cpu")[0] == 0
    assert call("eval", "run")[0] == 0
    assert call("env")[0] == 0


@pytest.mark.parametrize("there", ["a file", "nothing that can be made"])
def test_a_cache_that_cannot_be_written_is_one_line(call, monkeypatch, tmp_path, there):
    (tmp_path / "file").write_text("")
    home = tmp_path / "file" if there == "a file" else Path("/proc/no such folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.delenv("LENET_FAST_DATA", raising=False)
    code, out, err = call("train", "--dataset", "mnist")
    assert (code, out) == (1, "")
    assert err.startswith(
        f"lenet-fast: error: mnist: cannot write to the folder to download into, {home}/lenet_fast/mnist: "
    )
    assert err.count("\n") == 1


def test_an_unknown_instruction_set_is_one_line(call, few, monkeypatch):
    build_info = pytest.importorskip("lenet_fast._build_info", reason="nothing compiled")
    call("train", "--epochs", 1, "--run-dir", "run", "--device", "cpu")

    class Wrong:
        @staticmethod
        def selected_isa():
            raise RuntimeError("LENET_FAST_CPU_ISA: expected one that this machine runs (portable), got 'nope'")

        supported_isas, cuda_architectures = build_info.supported_isas, build_info.cuda_architectures
        compiler, flags, torch_version = build_info.compiler, build_info.flags, build_info.torch_version

    monkeypatch.setitem(sys.modules, "lenet_fast._build_info", Wrong)
    Wrong.__spec__ = build_info.__spec__  # what importlib looks for
    monkeypatch.setattr(lenet_fast, "_build_info", Wrong)
    for command in (["train", "--run-dir", "new"], ["train", "--resume", "run"], ["eval", "run"], ["figures", "run"]):
        code, out, err = call(*command, *([] if "--resume" in command else ["--device", "cpu"]))
        assert (code, out) == (1, "")
        assert err.startswith("lenet-fast: error: LENET_FAST_CPU_ISA: expected one that this machine runs")
        assert err.count("\n") == 1
    assert not Path("new").exists()
    code, out, err = call("env")
    assert (code, err) == (0, "")
    assert "got 'nope'" in out


# --- Ctrl-C -----------------------------------------------------------------------------------------


def press(times=1):
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("times", [1, 30])
def test_ctrl_c_before_the_first_step_leaves_nothing(call, monkeypatch, tmp_path, times):
    monkeypatch.setattr(data, "load", lambda name, data_dir: press(times))
    before = signal.getsignal(signal.SIGINT)
    assert call("train", "--run-dir", "runs/new") == (130, "", "lenet-fast: interrupted\n")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is before
    for command in ("eval", "figures"):
        monkeypatch.setattr(cli.SavedRun, "load", lambda path, device: press(times))
        assert call(command, "run") == (130, "", "lenet-fast: interrupted\n")


@pytest.mark.parametrize("times", [1, 30])
@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_ctrl_c_in_the_first_batch_leaves_a_run_to_resume(call, few, monkeypatch, times, engine):
    monkeypatch.setattr(train, "_REPORT_SECONDS", 0)
    prepare, pressed = train.InputSpec.prepare, []

    def press_first(*arguments):
        if not pressed:
            pressed.append(times)
            press(times)
        return arguments

    if engine == "fused":  # before its only call
        run_epoch = FusedEngine.run_epoch
        monkeypatch.setattr(FusedEngine, "run_epoch", lambda *arguments: run_epoch(*press_first(*arguments)))
    else:
        monkeypatch.setattr(train.InputSpec, "prepare", lambda *arguments: prepare(*press_first(*arguments)))
    options = ("--run-dir", "run", "--device", "cpu", "--batch-size", 8, "--epochs", 2, "--engine", engine)
    code, _, err = call("train", *options)
    finished = "0 of 2 epochs are finished and saved. Continue with: lenet-fast train --resume run"
    assert (code, err) == (130, f"lenet-fast: interrupted; {finished}\n")
    assert {path.name for path in Path("run").iterdir()} == {"checkpoint.pt", "config.json", "metrics.csv"}
    code, out, err = call("train", "--resume", "run")
    assert (code, err) == (0, "")
    assert "epochs 1 to 2" in out


def test_deferred_ctrl_c_waits_for_the_next_check_and_a_second_one_does_not():
    with Interrupts() as own:
        own.check()
        with own.deferred():
            press()
            with pytest.raises(Interrupted):
                own.check()
            press(3)  # on its way already
            with pytest.raises(Interrupted):  # it was lost
                own.check()
    with Interrupts() as own, own.deferred():
        press()
        with pytest.raises(Interrupted):
            press()
        press(3)
    with Interrupts():
        with pytest.raises(Interrupted):
            press()
        press(3)


def test_ctrl_c_that_was_lost_ends_the_process_when_pressed_again(monkeypatch):
    monkeypatch.setattr(interrupts, "_PATIENCE_SECONDS", -1.0)
    monkeypatch.setattr(interrupts, "_leave", lambda: left.append(1))
    left = []
    with Interrupts():
        with pytest.raises(Interrupted):
            press()
        assert left == []
        press()
    assert left == [1]


def test_ignored_ctrl_c_stays_ignored():
    """So it is in a background job."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts():
            press()
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("how", ["module", "script", "library"])
def test_ctrl_c_while_pytorch_is_imported(tmp_path, how):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    (tmp_path / "lenet-fast").write_text("from lenet_fast.cli import main\nmain()\n")
    arguments = {"module": ["-m", "lenet_fast"], "script": [str(tmp_path / "lenet-fast")], "library": ["-c"]}[how]
    arguments += ["import lenet_fast"] if how == "library" else ["train"]
    path = os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, *arguments], env=ENVIRONMENT | {"PYTHONPATH": path}, **pipes)
    assert process.stdout.readline() == "importing\n"
    for _ in range(30):
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    if how == "library":
        assert process.returncode != 130
        assert "KeyboardInterrupt" in err  # that is for the program to decide
    else:
        assert (process.returncode, err) == (130, "lenet-fast: interrupted\n")


# --- The real process, interrupted ------------------------------------------------------------------


TRAIN = ("train", "--epochs", 4, "--batch-size", 8, "--device", "cpu")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = start(*TRAIN, "--run-dir", "run", cwd=folder)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert "\x1b" not in out  # no terminal: no bar, no colours
    return load_checkpoint(folder / "run" / "checkpoint.pt")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_process_resumes_bit_for_bit(tmp_path, uninterrupted, how):
    process = start(*TRAIN, "--run-dir", "a run", cwd=tmp_path)
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    started = time.monotonic()
    for second in (RunFolder.open, RunFolder.create):
        with pytest.raises(FolderInUseError, match=f"a run: in use by process {process.pid} on .* since 20"):
            second(tmp_path / "a run")
    time.sleep(max(0.0, started + 0.1 - time.monotonic()))  # into the second epoch
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    saved = load_checkpoint(tmp_path / "a run" / "checkpoint.pt")
    finished = len(saved["history"])
    assert 1 <= finished < 4
    if how == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert err == (
            f"lenet-fast: interrupted; {finished} of 4 epochs are finished and saved. "
            "Continue with: lenet-fast train --resume 'a run'\n"
        )
    process = start("train", "--resume", "a run", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert f"epochs {finished + 1} to 4" in out
    resumed = load_checkpoint(tmp_path / "a run" / "checkpoint.pt")
    assert resumed["config"] == uninterrupted["config"]
    assert torch.equal(resumed["generator"], uninterrupted["generator"])
    for key, value in uninterrupted["model"].items():
        assert torch.equal(resumed["model"][key], value)
    for index, state in uninterrupted["engine"]["state"].items():
        assert all(torch.equal(resumed["engine"]["state"][index][key], value) for key, value in state.items())
    for one, other in zip(resumed["history"], uninterrupted["history"], strict=True):
        for name in ("epoch", "learning_rate", "loss", "train_accuracy", "test_accuracy"):
            assert one[name] == other[name]
    assert (tmp_path / "a run" / "curve.png").exists()


def test_a_terminal_sees_a_progress_bar(tmp_path):
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "lenet_fast", "train", "--epochs", "1", "--batch-size", "16", "--device", "cpu"]
    environment = {**ENVIRONMENT, "TERM": "xterm"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=child, stderr=child)
    os.close(child)
    seen = b""
    try:
        while chunk := os.read(parent, 1 << 16):
            seen += chunk
    except OSError:  # Linux: the other end is closed
        pass
    os.close(parent)
    assert process.wait(timeout=60) == 0
    text = seen.decode()
    assert re.search(r"loss \d\.\d{4}  [\d,]+ images/s", text)  # of the bar; epoch lines say more in between
    assert "epoch 1/1" in text
    assert "epoch 2/" not in text
    assert re.fullmatch(LAST_LINE, text.splitlines()[-1])
