"""What the commands of this folder share: lists as options, failures in a line, under what conditions they measured."""

import traceback
from collections.abc import Iterable

import agreement
import harness
import torch
import typer
from devices import Device


def some_of(option: str, known: Iterable[str], given: str) -> list[str]:
    """Names with commas between, each of them known."""
    names = given.split(",")
    if wrong := [name for name in names if name not in known]:
        raise typer.BadParameter(f"{option}: expected some of {','.join(known)}, got {wrong[0]!r}")
    return names


def batches(given: str, option: str = "--batch") -> list[int]:
    """Sizes with commas between."""
    if not all(size.isdecimal() and int(size) for size in given.split(",")):
        raise typer.BadParameter(f"{option}: expected numbers of at least 1 with commas between, got {given!r}")
    return [int(size) for size in given.split(",")]


def outcome(contestant: str, error: Exception) -> str:
    """What became of a contestant that failed or is wrong."""
    if isinstance(error, agreement.WrittenDown):
        return f"{contestant} was timed although it disagrees: {error}"
    return f"without {contestant}: {explained(error)}"


def explained(error: Exception) -> str:
    """Type and first line; the whole, for who looks into the log, on stderr."""
    traceback.print_exception(error)
    first, *_ = f"{type(error).__name__}: {error}".splitlines()
    return first


def print_conditions(races: Iterable[harness.Race], device: Device) -> None:
    """The ceilings, and how many rounds another process disturbed."""
    races = list(races)
    probe = device.probe
    rounds = sum(len(race.probes) for race in races)
    disturbed = sum(race.disturbed_rounds(probe.best) for race in races)
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else device.facts["gpu"]
    print(f"peak: {probe.peak:.0f} GFLOP/s, the fastest float32 matrix product seen ({where})")
    if device.type != "cpu":
        print(f"bandwidth: {1e-9 * device.bandwidth:.0f} GB/s, a large copy, bytes read and written")
    limit = harness.DISTURBED_BELOW * probe.best
    print(f"disturbed: {disturbed} of {rounds} rounds had a probe below {limit:.0f} GFLOP/s")
    if disturbed > rounds / 10:
        print("WARNING: more than a tenth: the machine was busy, do not use these figures")
