"""Everything that a machine with a GPU needs of this package, built and checked on one without: `make gpu-bundle`.

    python scripts/gpu_bundle.py make [--architecture 9.0] [--python python3.12]
    python scripts/gpu_bundle.py check .gpu        # exits with 1 where the folder was made of other sources

The folder .gpu then has
    lib/                      the compiled libraries, for any Python from 3.10 and any PyTorch from 2.11 on
    clocks/                   _C_cuda once more, with phase clocks (csrc/cuda/phase_clock.cuh)
    phase_instructions.csv    instructions of each phase (scripts/phase_instructions.py)
    mnist/                    the four files of MNIST, where they are at hand
    sources                   digest of what the libraries were compiled from
    CONTENTS                  a line for each file: bytes, SHA-256 and path
It has to travel as it is, beside the tracked files. benchmarks/gpu_run.sh takes what it needs out of it.

`make` ends with a check under the Python and PyTorch of the GPU machine, from the package registry, in build/gpu_check:
the libraries load there, and the tests of the training that need no GPU pass.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import cuda_toolkit
import phase_instructions

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT / ".gpu"
MOST_BYTES = 50 << 20
LIBRARIES = ("_C", "_C_cuda", "_build_info", "_snapshot")
CHECKED_WITH = ("torch==2.11.0", "setuptools<82", "numpy", "rich", "typer", "pillow", "matplotlib", "pytest")
# Everything of the training that a machine without a GPU can run: steps in graphs, and on a pretended GPU.
HOST_TESTS = (
    ("-m", "pytest", "tests/test_graphed_steps.py"),
    ("tests/pretend_cuda.py", "-m", "pytest", "tests/test_cuda_training.py", "-m", "not alone"),
)


def sources_digest() -> str:
    """Of all that the libraries are compiled from."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("csrc/**/*.*"), ROOT / "setup.py", ROOT / "scripts" / "cuda_toolkit.py"]):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def is_current(bundle: Path) -> bool:
    """Whether `bundle` was made of the sources that are here."""
    noted = bundle / "sources"
    return noted.is_file() and noted.read_text().strip() == sources_digest()


def make(architecture: str, python: str | None) -> None:
    """Build the bundle and check it."""
    start = time.monotonic()
    for reason in (cuda_toolkit.why_unavailable(), phase_instructions.why_unavailable()):
        if reason is not None:
            raise SystemExit(f"gpu_bundle: the CUDA kernels cannot be built: {reason}")
    shutil.rmtree(BUNDLE, ignore_errors=True)
    (BUNDLE / "lib").mkdir(parents=True)
    build = ROOT / "build" / "gpu"
    _run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], LENET_FAST_CUDA="0")
    print(f"building the CUDA kernels for compute capability {architecture}, without and with clocks", flush=True)
    for name, clocks in (("plain", "0"), ("clocks", "1")):
        options = ["--build-lib", str(build / name), "--build-temp", str(build / "objects")]
        environment = {"LENET_FAST_CUDA": "only", "LENET_FAST_CLOCKS": clocks, "TORCH_CUDA_ARCH_LIST": architecture}
        _run([sys.executable, "setup.py", "--quiet", "build_ext", *options], **environment)
    for name in LIBRARIES:
        built = build / "plain" / "lenet_fast" / f"{name}.abi3.so"
        source = built if built.exists() else ROOT / "lenet_fast" / built.name
        shutil.copy(source, BUNDLE / "lib")
    (BUNDLE / "clocks").mkdir()
    shutil.copy(build / "clocks" / "lenet_fast" / "_C_cuda.abi3.so", BUNDLE / "clocks")
    number = architecture.partition("+")[0].replace(".", "")
    table = str(BUNDLE / "phase_instructions.csv")
    _run([sys.executable, "scripts/phase_instructions.py", "--architecture", f"sm_{number}", "--write", table])
    _copy_mnist()
    (BUNDLE / "sources").write_text(f"{sources_digest()}\n")
    size = _list_contents()
    print(f"{BUNDLE.name}/: {size / 2**20:.1f} MiB, made in {time.monotonic() - start:.0f} s", flush=True)
    if size > MOST_BYTES:
        raise SystemExit(f"gpu_bundle: expected at most {MOST_BYTES >> 20} MiB")
    check_elsewhere(python)


def _copy_mnist() -> None:
    """The 60,000 digits, from where `lenet_fast.data` finds them without a download."""
    sys.path.insert(0, str(ROOT))
    from lenet_fast import data

    given = os.environ.get("LENET_FAST_DATA")
    files = data._find_user_files("LENET_FAST_DATA", given, "mnist") if given else {}
    if not files and (cache := data._cache_folder("mnist")) is not None:
        files = data._find(cache)
    if len(files) < len(data.FILES):
        print("without MNIST: set LENET_FAST_DATA to the folder that has its four files", flush=True)
        return
    (BUNDLE / "mnist").mkdir()
    for name, path in files.items():
        shutil.copy(path, BUNDLE / "mnist" / (f"{name}.gz" if path.suffix == ".gz" else name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of data that is somebody's own
        try:
            data.load("mnist", BUNDLE)
        except (UserWarning, ValueError) as error:
            shutil.rmtree(BUNDLE / "mnist")
            print(f"without MNIST: {error}", flush=True)


def _list_contents() -> int:
    """Write CONTENTS; bytes of all files together."""
    files = sorted(path for path in BUNDLE.rglob("*") if path.is_file())
    lines = [
        f"{path.stat().st_size:>10} {hashlib.sha256(path.read_bytes()).hexdigest()} {path.relative_to(BUNDLE)}"
        for path in files
    ]
    (BUNDLE / "CONTENTS").write_text("\n".join(lines) + "\n")
    return sum(path.stat().st_size for path in files)


def find_python(named: str | None) -> str | None:
    """An interpreter like the GPU machine's: the one that was named, else a Python 3.12 of the PATH or of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [named] if named else ["python3.12", *map(str, sorted(pyenv.glob("versions/3.12.*/bin/python3.12")))]
    for candidate in filter(None, map(shutil.which, candidates)):
        if subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:  # pyenv's shims may fail
            return candidate
    return None


def check_elsewhere(named: str | None) -> None:
    """Load the bundle and run the tests under the GPU machine's versions; says so where there is no such Python."""
    interpreter = find_python(named)
    if interpreter is None:
        print(f"NOT CHECKED under Python 3.12: there is no {named or 'python3.12'} here (GPU_PYTHON names one)")
        return
    start = time.monotonic()
    environment = ROOT / "build" / "gpu_check"
    elsewhere = environment / "bin" / "python"
    print(f"checking under {' '.join(CHECKED_WITH[:1])} in build/gpu_check", flush=True)
    if not elsewhere.exists():
        _run([interpreter, "-m", "venv", str(environment)])
    _run([str(elsewhere), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *CHECKED_WITH])
    tree = ROOT / "build" / "gpu_tree"
    shutil.rmtree(tree, ignore_errors=True)
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True)
    for name in filter(None, tracked.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    for path in (BUNDLE / "lib").iterdir():
        shutil.copy(path, tree / "lenet_fast")
    program = (
        "from lenet_fast import backends, _build_info, _snapshot\n"
        "reasons = [reason for reason in backends.missing_native().values() if reason]\n"
        "raise SystemExit('; '.join(reasons) or None)"
    )
    _run([str(elsewhere), "-c", program], tree)
    for test in HOST_TESTS:
        _run([str(elsewhere), *test, "-p", "no:cacheprovider", "-q"], tree)
    print(f"the bundle loads and its tests pass there; the check took {time.monotonic() - start:.0f} s")


def _run(command: list[str], folder: Path = ROOT, **environment: str) -> None:
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)} | environment)
    if done.returncode != 0:
        raise SystemExit(f"gpu_bundle: failed: {' '.join(command)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="build the bundle and check it")
    making.add_argument("--architecture", default="9.0", help="compute capability of the GPU (9.0: H100)")
    making.add_argument("--python", help="interpreter like the GPU machine's (python3.12)")
    checking = commands.add_parser("check", help="exit with 1 if the bundle was made of other sources")
    checking.add_argument("bundle", type=Path)
    options = parser.parse_args()
    if options.command == "check":
        raise SystemExit(0 if is_current(options.bundle) else 1)
    make(options.architecture, options.python)


if __name__ == "__main__":
    main()
