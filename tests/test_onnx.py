"""Restored models exported to ONNX: standard operators only, run by ONNX Runtime at any batch size."""

import numpy as np
import pytest
import torch

from lenet_fast.accelerate import accelerate, restore
from lenet_fast.models import MODELS

REASON = "{} is not installed (requirements-interop.txt)"
onnx = pytest.importorskip("onnx", reason=REASON.format("onnx"))
onnxruntime = pytest.importorskip("onnxruntime", reason=REASON.format("onnxruntime"))
pytest.importorskip("onnxscript", reason=REASON.format("onnxscript, PyTorch's exporter to ONNX,"))


@pytest.mark.filterwarnings(
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
)  # of PyTorch's own
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "make", [lambda lenet: lenet, lambda lenet: accelerate(lenet.reference())], ids=["own", "twin"]
)
def test_restored_model_runs_in_onnx_runtime(make, name, tmp_path):
    torch.manual_seed(0)
    lenet = MODELS[name]()
    size = lenet.input_spec.size
    inputs = lenet.input_spec.prepare(torch.randint(256, (7, size, size), dtype=torch.uint8))
    model = make(lenet).eval()
    with torch.no_grad():
        expected = model(inputs).numpy()

    file = tmp_path / f"{name}.onnx"
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        restore(model), (inputs[:2],), file, dynamic_shapes=({0: batch},), external_data=False, verbose=False
    )
    graph = onnx.load(file)
    onnx.checker.check_model(graph, full_check=True)
    assert {opset.domain for opset in graph.opset_import} == {""}

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    assert entry.shape == ["batch", 1, size, size]
    assert np.ptp(expected, axis=0).min() > 1e-4  # the output depends on the image
    for part in (slice(0, 1), slice(2, 7)):
        (output,) = session.run(None, {entry.name: inputs[part].numpy()})
        np.testing.assert_allclose(output, expected[part], rtol=0, atol=2e-6 * np.abs(expected).max())
