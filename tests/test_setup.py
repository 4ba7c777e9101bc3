"""What is compiled, and when again: setup.py's build_ext, with nothing compiled in fact."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def build(monkeypatch):
    """The command build_ext of setup.py, not finalized."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(sys, "path", sys.path[:])  # to which setup.py adds
    monkeypatch.setenv("MAX_JOBS", "2")
    namespace = runpy.run_path("setup.py")
    distribution = setuptools.Distribution({"ext_modules": namespace["extensions"]()})
    return namespace["Build"](distribution)


def test_an_editable_installation_compiles_where_a_build_in_place_does(build):
    """Else `pip install -e` and `make install` would compile everything each time."""
    in_place = build.distribution.get_command_obj("build")
    in_place.ensure_finalized()
    expected = in_place.build_temp
    in_place.build_temp = "deleted afterwards"  # as setuptools' editable_wheel has it
    build.editable_mode = True
    build.ensure_finalized()
    assert build.build_temp == expected
    assert build.inplace


def test_the_longest_source_is_compiled_first(build):
    (extension,) = [each for each in build.distribution.ext_modules if each.name == "lenet_fast._C"]
    first, *others = build.swig_sources(sorted(extension.sources), extension)
    assert Path(first).name == "variant_avx512.cpp"
    assert {first, *others} == set(extension.sources)


def test_a_cuda_source_is_compiled_again_only_after_a_change(build, tmp_path, monkeypatch):
    import cuda_toolkit

    compiled = []

    def run(command):
        compiled.append(command)
        Path(command[-1]).write_text("")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(cuda_toolkit, "find_nvcc", lambda: Path("nvcc"))
    monkeypatch.setattr(cuda_toolkit, "compression_flags", lambda: ("--compress-mode=size",))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    build.build_temp = str(tmp_path)
    for _ in range(2):
        build.compile_kernels("csrc/cuda/train_network.cu")
    assert len(compiled) == 1
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    target = build.compile_kernels("csrc/cuda/train_network.cu")
    assert len(compiled) == 2
    os.utime(target, (0, 0))  # older than the sources
    build.compile_kernels("csrc/cuda/train_network.cu")
    assert len(compiled) == 3
    monkeypatch.setattr(subprocess, "run", lambda command: SimpleNamespace(returncode=1))
    os.utime(target, (0, 0))
    with pytest.raises(SystemExit, match=r"train_network\.cu does not compile"):
        build.compile_kernels("csrc/cuda/train_network.cu")
    monkeypatch.setattr(subprocess, "run", run)
    build.compile_kernels("csrc/cuda/train_network.cu")  # although the object that is there looks new
    assert len(compiled) == 4
