"""A race on one layer: its operands, the contestants made ready and checked against float64, the time of each."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import agreement
import harness
import torch
import torch.nn.functional as F
from devices import Device
from layers import OURS, OWN, PLAIN, Case, Contestant, Layer, Parameters, build_fused, store_dense
from torch import Tensor

PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Operands:
    """The tensors that every contestant of a case gets, each in its own memory format."""

    input: Tensor
    parameters: Parameters  # of the fused layer
    grad_output: Tensor

    @classmethod
    def make(cls, case: Case, batch: int, dtype: torch.dtype, device: str = "cpu") -> "Operands":
        """The same random values at every call; no two maps alike, also where a layer starts with constants."""
        layer = case.layer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            starts = [parameter.detach() for parameter in build_fused(case).parameters()]
            parameters = [(start + 0.05 * torch.randn_like(start)).to(device, dtype) for start in starts]
            input = torch.rand(batch, layer.in_channels, layer.size, layer.size).to(device, dtype)
            weight, bias, *_ = (parameter.double() for parameter in store_dense(layer, parameters))
            stable = _stable(F.conv2d(input.double(), weight, bias, padding=layer.padding), case, dtype)
            return cls(input, parameters, torch.randn(stable.shape).to(device, dtype) * stable)

    def double(self) -> "Operands":
        return Operands(self.input.double(), [each.double() for each in self.parameters], self.grad_output.double())


def _stable(conv: Tensor, case: Case, dtype: torch.dtype) -> Tensor:
    """Pooled positions whose gradient does not hang on rounding; at the others grad_output is 0.

    Near a tie of the maximum, or near the kink of a ReLU, two right results can differ wholly.
    """
    height, width = (side // 2 for side in conv.shape[-2:])
    blocks = (
        conv[..., : 2 * height, : 2 * width]
        .unflatten(-2, (height, 2))
        .unflatten(-1, (width, 2))
        .transpose(-2, -3)
        .flatten(-2)
    )
    distances = [torch.ones_like(blocks[..., 0])]
    if case.pool == "max":
        first, second = blocks.topk(2).values.unbind(-1)
        distances.append(first - second)
    if case.activation == "relu":
        distances.append(blocks.abs().amin(-1))
    margin = 8 * torch.finfo(dtype).eps * conv.abs().max()
    return torch.stack(distances).amin(0) > margin


def prepare(contestant: Contestant, case: Case, operands: Operands, passes: str, copies: int = 1) -> harness.Run:
    """The call to be timed, once on each of so many copies of input and incoming gradient.

    It returns a list: for each copy the output, after "forward+backward" followed by its own gradients. All of them
    live until the next call, so that no copy's results are written where another's are in the cache.
    """
    module = contestant.build(case).to(operands.input.device, operands.input.dtype)
    with torch.no_grad():
        values = contestant.store(case.layer, operands.parameters)
        for parameter, value in zip(module.parameters(), values, strict=True):
            parameter.copy_(value.view_as(parameter))
    module.to(memory_format=contestant.memory_format)
    inputs = [operands.input.clone(memory_format=contestant.memory_format) for _ in range(copies)]
    layer = module
    if contestant.compiled:
        options = {"freezing": passes == "forward", **contestant.compile_options}  # weights as constants: its best
        layer = torch.compile(module, fullgraph=True, dynamic=False, options=options)
    if passes == "forward":
        return lambda: [layer(input) for input in inputs]

    needed = case.layer.needs_input_grad
    for input in inputs:
        input.requires_grad_(needed)
    like = layer(inputs[0]).detach()  # strided as the output is
    grad_outputs = [torch.empty_like(like).copy_(operands.grad_output) for _ in inputs]
    parameters = list(module.parameters())

    def forward_and_backward(input: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
        output = layer(input)
        return output, *torch.autograd.grad(output, [input, *parameters] if needed else parameters, grad_output)

    return lambda: [forward_and_backward(*copy) for copy in zip(inputs, grad_outputs, strict=True)]


def results(run: harness.Run, contestant: Contestant, case: Case, passes: str) -> agreement.Results:
    """Call once; the last results by name, the gradients of parameters in the layout of the fused layer."""
    *_, last = run()
    if passes == "forward":
        return {agreement.OUTPUT: last}
    output, *gradients = last
    named = {agreement.OUTPUT: output}
    if case.layer.needs_input_grad:
        named["gradient of input"] = gradients.pop(0)
    parameters = dict(build_fused(case).named_parameters())
    gradients = _as_in_the_fused_layer(gradients, contestant, case.layer, list(parameters.values()))
    return named | {f"gradient of {name}": each for name, each in zip(parameters, gradients, strict=True)}


def _as_in_the_fused_layer(
    gradients: Parameters, contestant: Contestant, layer: Layer, parameters: Parameters
) -> Parameters:
    """Gradients of a contestant's parameters as gradients of `parameters`, the fused layer's.

    Their elements are numbered from 1 and the numbers stored: where number n went, the gradient of element n is.
    """
    sizes = [parameter.numel() for parameter in parameters]
    numbers = torch.arange(1, sum(sizes) + 1).split(sizes)
    numbers = [number.view_as(parameter) for number, parameter in zip(numbers, parameters, strict=True)]
    flat = gradients[0].new_zeros(1 + sum(sizes))  # 0 takes those of absent connections
    for stored, gradient in zip(contestant.store(layer, numbers), gradients, strict=True):
        flat[stored.flatten()] = gradient.flatten()
    return [part.view_as(parameter) for part, parameter in zip(flat[1:].split(sizes), parameters, strict=True)]


def measure(
    case: Case,
    passes: str,
    contestants: Mapping[str, Contestant],
    *,
    batch: int,
    dtype: torch.dtype,
    rounds: int,
    sample_seconds: float,
    device: Device,
    left_out: agreement.Report | None = None,
) -> tuple[dict[str, harness.Race], dict[str, agreement.Verdict]]:
    """Check the contestants against float64, then race them: a race for each way to launch that the device has.

    A rival that fails or is wrong is left out and reported to `left_out`; without that, the exception is raised. On a
    GPU an operator of ours that is wrong is reported, too, and timed all the same: its verdict says so.

    Returns:
        The races by their way to launch, and the contestants' verdicts.

    Raises:
        agreement.Disagreement: one of them is wrong; none was timed.
    """
    torch.compiler.reset()  # no guards of earlier races to check, no limit on recompilations reached
    mode = torch.inference_mode if passes == "forward" else nullcontext
    operands = Operands.make(case, batch, dtype, device.type)
    copies = device.copies(batch * case.layer.elements(passes) * dtype.itemsize)
    true_run, own_run = (prepare(PLAIN, case, each, passes) for each in (operands.double(), operands))
    with mode():
        truth, own_results = (results(run, PLAIN, case, passes) for run in (true_run, own_run))
    judge = agreement.Judge(truth, own_results, left_out, writes_down=OWN if device.type == "cuda" else ())
    runs: dict[str, dict[str, harness.Run]] = {launch: {} for launch in device.launches}
    for name, contestant in contestants.items():
        try:
            run = prepare(contestant, case, operands, passes, copies)
            for launch, launched in device.launches.items():
                with mode():
                    ready = launched(run)
                    slack = agreement.INDUCTOR_SLACK if contestant.compiled else 1
                    judge(name, results(ready, contestant, case, passes), slack=slack)
                runs[launch][name] = ready
        except Exception as error:  # noqa: PERF203 (once a contestant)
            if left_out is None or name == OURS:
                raise
            left_out(name, error)
    with mode():
        options = {"probe": device.probe, "timer": device.timer, "repeats": copies}
        races = {
            launch: harness.race(ready, rounds=rounds, sample_seconds=sample_seconds, **options)
            for launch, ready in runs.items()
        }
    return races, judge.verdicts
