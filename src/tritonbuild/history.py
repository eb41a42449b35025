"""Decides whether what earlier calls left behind reaches an output.

A cache for one size, a count that nobody reads, are harmless; a mask kept from the first call is not. So the history is
varied: the same call again and again, the same call after other sizes and values, and counters far ahead. If an output
moves, or the model raises, its answer depends on its history, which differs between a server's instances.
"""

from __future__ import annotations

import copy
import itertools
import random
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn

from tritonbuild import calls, cases, hazards, memory
from tritonbuild.draws import PLAIN

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tritonbuild.cases import Case
    from tritonbuild.hazards import Hazard
    from tritonbuild.reference import Reference

_GENERATORS = (torch.Generator, random.Random, numpy.random.Generator, numpy.random.RandomState)
_REPEATS = 12
_OTHERS = 6
_MANY = 1100
_MANY_S = 0.2
"""Calls of a model that leaves something else behind each time, and seconds that they may take."""


def reaches(reference: Reference, touched: Sequence[str]) -> Hazard | None:
    """Return the hazard of a model whose answer depends on earlier calls, or None.

    Args:
        reference: Eager; its example has run.
        touched: Names of what a call leaves behind.
    """
    found = _found(reference, touched)
    if found and any(isinstance(_value(reference.usable(), name), _GENERATORS) for name in touched):
        return hazards.found("nondeterministic", found.detail, case=found.case)
    return found


def _found(reference: Reference, touched: Sequence[str]) -> Hazard | None:
    case = reference.planned[0]
    names = ", ".join(sorted({name.removeprefix("module.") for name in touched})[:3])
    for text, after in _histories(reference, case):
        fresh = reference.attempt(reference.fresh(), reference.inputs(after))
        module = reference.fresh()
        for previous in text[1]:
            reference.attempt(module, reference.inputs(previous))
        used = reference.attempt(module, reference.inputs(after))
        if not isinstance(fresh, tuple):
            continue
        if not isinstance(used, tuple):
            return hazards.found("state", f"{names} changes; {text[0]}, forward raises {used.text}", case=str(after))
        if not reference.same(fresh, used):
            return hazards.found("state", f"{names} changes; {text[0]}, the output differs", case=str(after))
    late = _same_memory(reference) or _many(reference)
    detail = f"{names} changes; {late}" if late else _ahead(reference, touched)
    return hazards.found("state", detail, case=str(case)) if detail else None


def _histories(reference: Reference, case: Case) -> Iterator[tuple[tuple[str, list[Case]], Case]]:
    """Yield (what has happened before, those cases) and the case that is then looked at."""
    affordable = [
        other for other in reference.planned[1:] if other.draw == PLAIN and reference.cheap(other.sizes, limit_s=1.0)
    ]
    others = affordable[:_OTHERS]
    yield ("on the second call", [case]), case
    yield ("on the third call", [case, case]), case
    for other in others:
        yield (f"after a call with {other}", [other]), case
        yield (f"after a call with {case}", [case]), other
    for one, two in _exchanged(reference):
        yield (f"after a call with {one}", [one]), two
    if reference.forward_s < 0.05:
        yield (f"after {_REPEATS} calls", [case] * _REPEATS), case
        yield ("after other calls", others), case


def _exchanged(reference: Reference) -> Iterator[tuple[Case, Case]]:
    """Yield pairs of cases with two sizes exchanged: a cache that knows the product alone takes one for the other."""
    axes = reference.version.all_axes
    for one, two in itertools.islice(itertools.combinations(axes, 2), _OTHERS):
        shared = [size for size in cases.all_sizes(axes[one])[:256] if size in cases.all_sizes(axes[two])][:2]
        pair = [{**reference.planned[0].sizes, one: a, two: b} for a, b in itertools.permutations(shared, 2)]
        if len(pair) == 2 and all(reference.cheap(sizes) for sizes in pair):
            yield cases.case(pair[0]), cases.case(pair[1])


def _same_memory(reference: Reference) -> str | None:
    """Return what becomes of the output where inputs lie at the place of an earlier call's, as a server's do."""
    case = reference.planned[0]
    module, first = reference.fresh(), reference.inputs(case)
    reference.attempt(module, first)
    for other in reference.planned[1:]:
        if other.axes == case.axes:
            second = [_at_the_place_of(tensor) for tensor in first]
            for tensor, values in zip(second, reference.inputs(other), strict=True):
                tensor.copy_(values)
            used = reference.attempt(module, second)
            fresh = reference.attempt(reference.fresh(), reference.inputs(other))
            if isinstance(fresh, tuple) and not (isinstance(used, tuple) and reference.same(fresh, used)):
                return f"with {other} at the same place in memory, the output differs"
            return None
    return None


def _many(reference: Reference) -> str | None:
    """Return after how many calls the output differs, where each call leaves something else behind."""
    case = reference.planned[0]
    module = reference.fresh()
    first = reference.attempt(module, reference.inputs(case))
    settled = memory.state(module)
    reference.attempt(module, reference.inputs(case))
    if not isinstance(first, tuple) or settled == memory.state(module):
        return None
    watch = calls.Watch()
    for count in range(2, _MANY):
        found = reference.attempt(module, reference.inputs(case))
        if not (isinstance(found, tuple) and reference.same(first, found)):
            return f"after {count} calls, the output differs"
        if watch.s > _MANY_S:
            break
    return None


def _at_the_place_of(tensor: Tensor) -> Tensor:
    return tensor.new_empty(0).set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _ahead(reference: Reference, touched: Sequence[str]) -> str | None:
    """Return what a counter does to the output when it is far ahead of what a proof can count to."""
    case = reference.planned[0]
    module = reference.fresh()
    values: list[dict[str, float]] = []
    for _ in range(3):
        reference.attempt(module, reference.inputs(case))
        values.append({name: value for name in touched if (value := _get(module, name)) is not None})
    numbers = sorted({int(n) for n in reference.seen.numbers if abs(n) < 2**31 and float(n).is_integer()})
    for name in values[0]:
        if name not in values[2] or name not in values[1]:
            continue
        now, step = values[2][name], values[2][name] - values[1][name]
        if not step or values[1][name] - values[0][name] != step or not float(step).is_integer():
            continue
        reachable = [
            n + d for n in numbers for d in (-1, 0, 1) if (n + d - now) / step > 0 and (n + d - now) % step == 0
        ]
        for ahead in [*reachable[:32], now + 997 * step, now + 1_000_000 * step]:
            try:
                moved = copy.deepcopy(module)
            except Exception:  # noqa: BLE001 (attributes that cannot be copied)
                return None
            _set(moved, name, ahead)
            answer = reference.attempt(moved, reference.inputs(case))
            if not isinstance(answer, tuple) or not reference.same(reference.example, answer):
                return f"{name.removeprefix('module.')} counts calls; the output differs when it has reached {ahead:g}"
    return None


def _owner(module: nn.Module, name: str) -> tuple[Any, str] | None:
    path, _, attribute = name.rpartition(".")
    try:
        return module.get_submodule(path), attribute
    except AttributeError:
        return memory.shared(module).get(name)


def _value(module: nn.Module, name: str) -> object:
    at = _owner(module, name)
    return getattr(*at, None) if at else None


def _get(module: nn.Module, name: str) -> float | None:
    value = _value(module, name)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _set(module: nn.Module, name: str, number: float) -> None:
    at = _owner(module, name)
    assert at
    value = getattr(*at)
    if isinstance(value, Tensor):
        with torch.no_grad():
            value.fill_(number)
    else:
        setattr(*at, type(value)(number))
