"""What tells whether a model is as it was, compiled or not."""

import gc
import importlib.util
import sys
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn

from lenet_fast import models, snapshot


@pytest.fixture(params=["compiled", "python"])
def module(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setitem(sys.modules, "lenet_fast._snapshot", None)
    elif importlib.util.find_spec("lenet_fast._snapshot") is None:
        pytest.skip("lenet_fast._snapshot was not built")
    spec = importlib.util.spec_from_file_location("lenet_fast.snapshot_again", snapshot.__file__)
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    assert (again.Record.__module__ == again.__name__) == (request.param == "python")
    return again


CHANGES = {
    "a parameter": lambda model: setattr(model.c1, "weight", nn.Parameter(model.c1.weight.detach().clone())),
    "a buffer": lambda model: model.output.register_buffer("codes", model.output.codes.clone()),
    "a layer": lambda model: setattr(model, "f6", nn.Linear(120, 84)),
    "one more layer": lambda model: model.add_module("last", nn.Identity()),
    "one layer less": lambda model: delattr(model, "output"),
    "an option": lambda model: setattr(model.c1, "padding", 1),
    "an option's type": lambda model: setattr(model.c1, "padding", False),
    "a hook": lambda model: model.c1.register_forward_hook(lambda *_: None),
    "a class": lambda model: setattr(model.c1, "__class__", type("Other", (type(model.c1),), {})),
    "a forward of its own": lambda model: setattr(model.c1, "forward", lambda x: x),
    "an attribute with an underscore": lambda model: setattr(model.c1, "_scale", 2.0),
    "an element of a list": lambda model: model.flatten.options.append(2),
    "the order of the layers": lambda model: model._modules.update(f6_act=model._modules.pop("f6_act")),
    "the order of an ordered dictionary": lambda model: model.ordered._modules.move_to_end("0"),
    "the dictionary of the layers": lambda model: setattr(model, "_modules", dict(model._modules)),
    "the dictionary of the parameters": lambda model: setattr(model.c1, "_parameters", dict(model.c1._parameters)),
    "the dictionary of the hooks": lambda model: setattr(model.c1, "_forward_hooks", OrderedDict()),
    "the state of a layer": lambda model: setattr(model.c1, "__dict__", dict(model.c1.__dict__)),
    "the type of a parameter": lambda model: torch.utils.swap_tensors(model.c1.weight, Other(model.c1.weight)),
    "an attribute that cannot be compared": lambda model: setattr(model.c1, "pair", (torch.ones(2), torch.zeros(2))),
}


class Other(nn.Parameter):
    pass


def example():
    model = models.lenet5_1998()
    model.flatten.options = [1]
    model.c1.pair = torch.zeros(2), torch.zeros(2)
    model.ordered = nn.Sequential(nn.ReLU(), nn.Tanh())
    model.ordered._modules = OrderedDict(model.ordered._modules)
    return model


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(module, change):
    model = example()
    taken = module.Snapshot(model)
    assert taken.holds()
    CHANGES[change](model)
    assert not taken.holds()
    assert module.Snapshot(model).holds()


def test_values_and_mode_are_no_part_of_it(module):
    model = example()
    taken = module.Snapshot(model)
    with torch.no_grad():
        model.c1.weight.zero_()
    model.eval()
    model.c1.padding = int("0")  # equal
    model.flatten.options = [1]
    assert taken.holds()


def test_a_dictionary_whose_items_are_no_pairs_does_no_harm(module):
    class Lists(OrderedDict):
        def items(self):
            return [list(pair) for pair in super().items()]

    model = example()
    model._modules = Lists(model._modules)
    assert module.Snapshot(model).holds() in (True, False)


def test_a_model_that_refers_to_its_own_snapshot_is_collected(module):
    model = models.lenet1()
    model.taken = module.Snapshot(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    "arguments", [((),), ((1,), ()), ((), ("dict", ())), ((), ({}, 1)), ((), ({}, ("key",))), ((), [{}, ()])]
)
def test_a_record_of_something_else_is_refused(arguments):
    record = pytest.importorskip("lenet_fast._snapshot", reason="not compiled").Record
    with pytest.raises(TypeError):
        record(*arguments)
