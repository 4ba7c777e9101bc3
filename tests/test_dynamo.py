"""The backend of `torch.compile`: found by its name, fuses the graph that it gets, sees what changes afterwards."""

import copy
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from tutorial_lenets import Blitz, d2l

from lenet_fast import functional
from lenet_fast.dynamo import backend, compiled_forward

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()


def test_is_an_entry_point():
    group = "torch_dynamo_backends"
    _, found, lines = PROJECT.read_text().partition(f"[project.entry-points.{group}]")
    assert found
    name, value = (part.strip().strip('"') for part in lines.splitlines()[1].split("="))
    assert name == "lenet_fast"
    assert EntryPoint(name, value, group).load() is backend


def test_torch_compile_takes_it_by_name():
    from torch._dynamo.backends import registry

    if "lenet_fast" not in registry.list_backends():  # the tests may run in a source tree that is not installed
        registry.register_backend(backend, "lenet_fast")
    model, images = Blitz(), torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(torch.compile(model, backend="lenet_fast")(images), model(images))


@pytest.fixture
def seen(monkeypatch):
    """The graphs that go to Inductor; they run as they are."""
    from torch._inductor import compile_fx

    graphs = []

    def compile_graph(graph_module, example_inputs):
        graphs.append([node.target for node in graph_module.graph.nodes])
        return graph_module.forward

    monkeypatch.setattr(compile_fx, "compile_fx", compile_graph)
    return graphs


def test_gives_the_fused_graph_to_inductor_where_asked_to(seen):
    model, images = d2l(), torch.randn(2, 1, 28, 28)
    compiled = torch.compile(model, backend=backend, options={"inductor": True}, fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))
    assert [graph.count(functional.conv_act_pool) for graph in seen] == [2]
    torch.compile(model, backend=backend, options={"inductor": False})(images)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("options: expected 'inductor' alone, got 'indutcor'", {"options": {"indutcor": True}}),
        ("mode: expected none for the backend lenet_fast, got 'max-autotune'", {"mode": "max-autotune"}),
    ],
    ids=["options", "mode"],
)
def test_refuses_other_options(message, arguments):
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
        torch.compile(Blitz(), backend=backend, **arguments)(torch.randn(2, 1, 32, 32))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.conv1.register_forward_hook(lambda module, inputs, output: output * 2),
        lambda model: model.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)),
        lambda model: prune.l1_unstructured(model.conv2, "weight", 500),
        lambda model: parametrizations.orthogonal(model.conv2),
        lambda model: setattr(model, "fc3", nn.Identity()),
        lambda model: setattr(model.conv1, "padding", (2, 2)) or setattr(model, "fc1", nn.LazyLinear(120)),
        lambda model: setattr(model.conv1, "forward", lambda x: x[:, :, :28, :28].repeat(1, 6, 1, 1)),
        lambda model: setattr(type(model), "forward", lambda self, x: x.flatten(1)),
    ],
    ids=["hook", "pre-hook", "prune", "parametrization", "child", "options", "forward", "forward-of-class"],
)
def test_sees_what_changes_after_a_call(change):
    class Changing(Blitz):
        pass

    torch.manual_seed(0)
    model, images = Changing(), torch.randn(2, 1, 32, 32)
    compiled = torch.compile(model, backend=backend)
    before = compiled(images)
    change(model)
    after = model(images)
    assert after.shape != before.shape or not torch.allclose(after, before)
    torch.testing.assert_close(compiled(images), after)


def test_trains_in_both_modes_with_any_batch_size():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 5), nn.Dropout2d(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3)
    )
    compiled = torch.compile(model, backend=backend)
    for count in (5, 2, 1, 7):
        images = torch.randn(count, 1, 12, 12)
        for training in (True, False):
            values = []
            for each in (compiled, model):
                torch.manual_seed(3)
                model.zero_grad()
                each.train(training)
                output = each(images)
                output.square().sum().backward()
                values.append([output.detach(), *(p.grad.clone() for p in model.parameters())])
            torch.testing.assert_close(*values)


def test_compiled_forward_calls_a_model_with_its_hooks():
    torch.manual_seed(0)
    model, images = Blitz(), torch.randn(2, 1, 32, 32)
    called = compiled_forward(model)
    assert vars(model) == vars(copy.copy(model))  # nothing is attached
    torch.testing.assert_close(called(images), model(images))
    model.register_forward_hook(lambda module, inputs, output: output + 1)
    torch.testing.assert_close(called(images), model(images))
    torch.testing.assert_close(called(x=images), model(images))
    with torch.autograd.profiler.profile(use_kineto=False) as events:
        called(images)
    assert sum(event.name == "lenet_fast::_conv_recording" for event in events.function_events) == 2
