import os
import signal

# Threads that spin at a barrier starve each other when the machine runs anything else. Before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Without it, cuBLAS refuses the deterministic mode that `poisoned_memory` switches on.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("LENET_FAST_POISON", "1")  # the native kernels' workspace starts as NaN, too

import pytest
import torch

# A background job of a shell ignores Ctrl-C, and so would everything that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def poisoned_memory():
    """New tensors, and so every kernel's output, start as NaN."""
    was_enabled = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(was_enabled)


@pytest.fixture(autouse=True)
def _reset_dynamo():
    """Compiled functions of one test must not count against the next one's recompile limit."""
    yield
    torch.compiler.reset()
