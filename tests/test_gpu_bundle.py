"""What `make gpu-bundle` makes, but for compiling: its list, its check, and the count of instructions by phase."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import gpu_bundle
import phase_instructions
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_bundle, "BUNDLE", tmp_path)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "_C.abi3.so").write_bytes(b"compiled")
    (tmp_path / "sources").write_text(f"{gpu_bundle.sources_digest()}\n")
    return tmp_path


def test_a_bundle_of_other_sources_is_refused(bundle):
    def check():
        return subprocess.run([sys.executable, ROOT / "scripts" / "gpu_bundle.py", "check", bundle]).returncode

    assert check() == 0
    (bundle / "sources").write_text("0\n")
    assert check() == 1
    (bundle / "sources").unlink()
    assert check() == 1


def test_the_digest_is_of_every_source(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "cuda_toolkit.py", tmp_path / "scripts")
    before = gpu_bundle.sources_digest()
    monkeypatch.setattr(gpu_bundle, "ROOT", tmp_path)
    assert gpu_bundle.sources_digest() == before
    for name in (
        "setup.py",
        "scripts/cuda_toolkit.py",
        "csrc/network.h",
        "csrc/cuda/train_network.cu",
        "csrc/cpu/vec.h",
    ):
        path = tmp_path / name
        text = path.read_text()
        path.write_text(f"{text}\n")
        assert gpu_bundle.sources_digest() != before, name
        path.write_text(text)


def test_contents_are_listed_with_their_bytes_and_digest(bundle):
    size = gpu_bundle._list_contents()
    lines = [line.split() for line in (bundle / "CONTENTS").read_text().splitlines()]
    assert [name for _, _, name in lines] == ["lib/_C.abi3.so", "sources"]
    assert lines[0][:2] == ["8", hashlib.sha256(b"compiled").hexdigest()]
    assert size == 8 + 65


def test_without_a_python_like_the_gpu_machines_it_says_so(capsys):
    gpu_bundle.check_elsewhere("no-such-python")
    assert capsys.readouterr().out.startswith("NOT CHECKED under Python 3.12: there is no no-such-python here")


# ---- Instructions by phase


def line_of(name, text):
    lines = (phase_instructions.CUDA / name).read_text().splitlines()
    return name, next(number for number, line in enumerate(lines, 1) if line.strip() == text)


def test_lines_belong_to_the_phase_that_ends_next():
    lines = phase_instructions.phase_lines()
    assert lines[line_of("network_images.cuh", "stage_convolutions(n, shared);")] == "stage"
    assert lines[line_of("network_images.cuh", "load_image(n, shared, index, HasDropout);")] == "load"
    assert lines[line_of("network_images.cuh", "score(n, shared);")] == "score"
    assert lines[line_of("network_images.cuh", "add_weight_gradient<K>(n.conv[l], shared);")] == "gradients"
    assert lines[line_of("network_images.cuh", "sum.loss += one.loss;")] == "loss"
    assert line_of("train_network.cu", "clear_borders(n, shared);") not in lines
    assert set(lines.values()) == set(phase_instructions.phases())


def test_instructions_are_counted_where_the_innermost_known_line_is():
    _, stage = line_of("network_images.cuh", "stage_convolutions(n, shared);")
    _, call = line_of("train_network.cu", "train_images<K, HasDropout>(n, shared, step);")
    listing = f"""
//--------------------- .text._Z11train_stepsILi5ELb0EEEvNS0_11NetworkPlanE --------------------------
\t//## File "/x/window.cuh", line 3 inlined at "/x/network_images.cuh", line {stage}
\t//## File "/x/network_images.cuh", line {stage} inlined at "/x/train_network.cu", line {call}
\t//## File "/x/train_network.cu", line {call}
        /*0010*/                   FFMA R1, R2, R3, R4 ;
        /*0020*/              @!P0 LDS.64 R4, [R5] ;
        /*0030*/                   NOP ;
\t//## File "/x/other.cuh", line 1
        /*0040*/               @P1 BAR.SYNC.DEFER_BLOCKING 0x0 ;
//--------------------- .text._Z11train_stepsILi5ELb1EEEvNS0_11NetworkPlanE --------------------------
        /*0010*/                   FFMA R1, R2, R3, R4 ;
"""
    counts = phase_instructions.count(listing)
    assert dict(counts["stage"]) == {"instructions": 2, "multiply_adds": 1, "shared": 1}
    assert dict(counts["other"]) == {"instructions": 1, "barriers": 1}
    table = phase_instructions.table(counts)
    assert [row["phase"] for row in table] == [*phase_instructions.phases(), "other"]
    assert sum(row["instructions"] for row in table) == 3
