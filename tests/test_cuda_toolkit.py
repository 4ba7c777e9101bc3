"""How the CUDA sources are compiled: which GPUs for, with which flags. Needs no nvcc."""

import importlib
import stat

import cuda_toolkit
import pytest


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """Makes an nvcc that knows some architectures."""

    def make(*architectures):
        path = tmp_path / "nvcc"
        path.write_text(f"#!/bin/sh\n[ \"$1\" = --list-gpu-code ] && printf '%s\\n' {' '.join(architectures)}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setattr(cuda_toolkit, "find_nvcc", lambda: path)
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        cuda_toolkit._default_architectures.cache_clear()

    yield make
    cuda_toolkit._default_architectures.cache_clear()


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        (("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "sm_121"), "7.5;8.0;9.0;10.0;12.0+PTX"),
        (("sm_50", "sm_75", "sm_80", "sm_90"), "7.5;8.0;9.0+PTX"),  # nvcc 12.0
        (("sm_80", "sm_90", "sm_100", "sm_120", "sm_200"), "8.0;9.0;10.0;12.0+PTX"),
    ],
)
def test_the_default_is_what_nvcc_knows(nvcc, known, expected):
    nvcc(*known)
    assert cuda_toolkit.architectures() == expected
    *compiled, ptx = cuda_toolkit.architecture_flags()
    codes = [entry.removesuffix("+PTX").replace(".", "") for entry in expected.split(";")]
    assert compiled == [f"-gencode=arch=compute_{code},code=sm_{code}" for code in codes]
    assert ptx == f"-gencode=arch=compute_{codes[-1]},code=compute_{codes[-1]}"


def test_an_nvcc_that_knows_none_of_them_says_what_to_do(nvcc):
    nvcc("sm_200")
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST"):
        cuda_toolkit.architectures()


def test_the_environment_decides(nvcc, monkeypatch):
    nvcc("sm_75")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a+PTX")
    assert cuda_toolkit.architecture_flags() == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]


@pytest.mark.parametrize(("wish", "strict"), [("1", True), ("0", False), (None, False)])
def test_warnings_are_errors_only_on_request(monkeypatch, wish, strict):
    with monkeypatch.context() as patch:
        patch.delenv("LENET_FAST_WERROR", raising=False)
        if wish is not None:
            patch.setenv("LENET_FAST_WERROR", wish)
        assert ("-Werror" in importlib.reload(cuda_toolkit).NVCC_FLAGS) == strict
    importlib.reload(cuda_toolkit)
