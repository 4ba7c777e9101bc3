"""What is installed decides what runs: instruction-set variants, nothing compiled at all, and the report of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lenet_fast import env

build_info = pytest.importorskip("lenet_fast._build_info", reason="nothing compiled")

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "lenet_fast"


def run_python(*arguments, cwd=TESTS.parent, **environment):
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("isa", build_info.supported_isas()[1:])
def test_operators_and_training_on_every_instruction_set(isa):
    """The default variant is what all other tests run."""
    tests = [str(TESTS / test) for test in ("test_operators.py", "test_random_networks.py")]
    done = run_python("-m", "pytest", "-x", "-k", "cpu-native or test_a_run", *tests, LENET_FAST_CPU_ISA=isa)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_an_unknown_instruction_set_is_refused():
    code = "import torch, lenet_fast as lf; lf.functional.conv_act_pool(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3))"
    done = run_python("-c", code, LENET_FAST_CPU_ISA="avx1024")
    assert done.returncode == 1
    assert "LENET_FAST_CPU_ISA: expected one that this machine runs" in done.stderr
    assert "avx1024" in env_report(LENET_FAST_CPU_ISA="avx1024")


def env_report(**environment):
    done = run_python("-m", "lenet_fast", "env", **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_env_reports_the_build():
    report = env_report()
    assert "kernels on cpu" in report
    for fact in (build_info.compiler, build_info.selected_isa(), "CUDA architectures"):
        assert fact in report
    assert env.facts()["lenet_fast"]


def test_env_tells_how_threads_wait():
    assert "OMP_WAIT_POLICY=passive\n" in env_report(OMP_WAIT_POLICY="passive")
    assert "OMP_WAIT_POLICY is not set" in env_report(OMP_WAIT_POLICY="")


@pytest.fixture
def pure_python(tmp_path):
    """A copy of the package with nothing compiled."""
    target = tmp_path / "lenet_fast"
    target.mkdir()
    for source in [*PACKAGE.glob("*.py"), PACKAGE / "assets"]:
        (target / source.name).symlink_to(source)
    return tmp_path


def test_without_compiled_libraries_the_reference_runs_and_says_so_once(pure_python):
    code = """
import warnings, torch, lenet_fast as lf
layer = lf.nn.ConvActPool2d(1, 2, 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        layer(torch.randn(2, 1, 6, 6)).sum().backward()
assert [w.category for w in caught] == [RuntimeWarning], caught
assert "lenet_fast._C was not built" in str(caught[0].message)
try:
    lf.functional.conv_act_pool(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3), backend="native")
except RuntimeError as error:
    assert "lenet_fast._C was not built" in str(error)
else:
    raise AssertionError
"""
    done = run_python("-c", code, cwd=pure_python)
    assert done.returncode == 0, done.stderr
    done = run_python("-m", "lenet_fast", "env", cwd=pure_python)
    assert "plain PyTorch (lenet_fast._C was not built)" in done.stdout, done.stderr


def test_import_loads_nothing_optional():
    code = "import sys, lenet_fast; print(sorted({'matplotlib', 'typer', 'triton', 'rich'} & set(sys.modules)))"
    # Nor does it ask about GPUs: that would initialise CUDA, after which a process cannot be forked.
    questions = ("is_available", "device_count", "current_device", "get_device_capability", "_lazy_init")
    asks_nothing = f"import torch; [setattr(torch.cuda, name, None) for name in {questions}]; "
    assert run_python("-c", asks_nothing + code).stdout.strip() == "[]"
