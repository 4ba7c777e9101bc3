"""The CPU kernel variants that this machine runs, and a way to run a check on one of them."""

import os
import subprocess
import sys
from pathlib import Path

try:
    from lenet_fast._build_info import selected_isa, supported_isas

    ISAS = supported_isas()
except ImportError:  # nothing is compiled
    ISAS = []

TESTS = Path(__file__).parent


def run_on(isa: str, module: str, check: str) -> None:
    """Call `check` of the test module `module` in a process of its own, whose CPU kernels are the variant `isa`."""
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"LENET_FAST_CPU_ISA": isa, "OMP_NUM_THREADS": "2", "PYTHONPATH": paths}
    program = f"import instruction_sets, {module}; instruction_sets.assert_selected(); {module}.{check}()"
    subprocess.run([sys.executable, "-c", program], cwd=TESTS.parent, env=environment, check=True, timeout=100)


def assert_selected() -> None:
    """The variant in use is the one that the environment names."""
    assert selected_isa() == os.environ["LENET_FAST_CPU_ISA"]
