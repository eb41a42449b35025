"""Decides whether chance reaches an output: random numbers, the clock, the environment, memory nobody has filled.

That a model draws random numbers proves nothing: a layer may draw them and not use them, as LayerDrop does in eval
mode. That one run equals the next proves nothing either: the draw may matter once in a thousand calls. So chance is
steered: other seeds, then the ends of what a generator may return, other times, other variables, other garbage. If an
output moves, chance reaches it.

Source: distributions of torch's, numpy's and Python's generators.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import random
import sys
import time
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tritonbuild import calls, hazards
from tritonbuild.monitors import DROPOUT, UNFILLED, called_random

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from tritonbuild.cases import Case
    from tritonbuild.hazards import Hazard
    from tritonbuild.monitors import Observation
    from tritonbuild.reference import Reference

_ALMOST_ONE = 1 - 2.0**-24
_ENDS = {
    "rand": (0.0, _ALMOST_ONE),
    "rand_like": (0.0, _ALMOST_ONE),
    "randn": (-5.0, 5.0),
    "randn_like": (-5.0, 5.0),
    "bernoulli": (0.0, 1.0),
    "bernoulli_": (0.0, 1.0),
}
_SEEDS = 24
_LIMIT_S = 0.3
_CLOCKS = ("time", "monotonic", "perf_counter", "process_time")
_LATER = (0.37, 1, 61, 3601, 43201, 86400 * 40.5, 86400 * 400)
_VARIABLES = 16
_VALUES = ("1", "0", "2", "true", "false", "0.5", "")


class _Steered(TorchFunctionMode):
    """Replaces what a generator returns: end 0 is its lowest value, end 1 its highest, None leaves it."""

    def __init__(self, end: int | None) -> None:
        super().__init__()
        self.end = end

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.end is None or not isinstance(result, Tensor):
            return result
        name = getattr(func, "__name__", "")
        ends = _ENDS.get(name)
        if name in ("uniform_", "normal_", "normal"):
            result = _spread(result, args[1:] if name.endswith("_") else args, name, self.end)
        elif name == "randint":
            numbers = [arg for arg in args if isinstance(arg, int)]
            if numbers:
                result.fill_(numbers[-1] - 1 if self.end else (numbers[0] if len(numbers) > 1 else 0))
        elif ends:
            result.fill_(ends[self.end])
        elif name in UNFILLED:
            result.fill_(0 if not self.end else math.nan if result.is_floating_point() else 1)
        elif name in DROPOUT and _drops(args, kwargs or {}):
            result = torch.zeros_like(result) if self.end else args[0].clone()
        return result


def _drops(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether a call of dropout may drop something: F.dropout(x, p=0.5, training=True)."""
    probability = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return bool(probability) and bool(training)


def _spread(result: Tensor, args: Sequence[Any], name: str, end: int) -> Tensor:
    low, high = (0.0, 1.0) if name == "uniform_" else (-5.0, 5.0)
    numbers = [float(arg) for arg in args if isinstance(arg, (int, float))]
    if len(numbers) == 2:
        low, high = numbers if name == "uniform_" else (numbers[0] - 5 * numbers[1], numbers[0] + 5 * numbers[1])
    return result.fill_(high if end else low)


@contextlib.contextmanager
def _steered(end: int | None) -> Iterator[None]:
    value = _ALMOST_ONE if end else 0.0

    def one() -> float:
        return value

    def filled(*shape: int, size: Any = None) -> Any:
        return numpy.full(size if size is not None else shape, value)[()]

    with contextlib.ExitStack() as stack:
        if end is not None:
            stack.enter_context(mock.patch.object(random, "random", one))
            for name in ("rand", "random", "random_sample"):
                stack.enter_context(mock.patch.object(numpy.random, name, filled))
        stack.enter_context(_Steered(end))
        yield


@contextlib.contextmanager
def _later(seconds: float, files: Collection[str]) -> Iterator[None]:
    """Let the clocks show a later time, and stand still: what moves between two runs is then not their doing."""
    at = time.time() + seconds
    shown: dict[int, tuple[object, object]] = {}
    for name in _CLOCKS:
        for function, scale in ((name, 1.0), (f"{name}_ns", 1e9)):
            now = getattr(time, function)
            stopped = type(now())(now() + seconds * scale)
            shown[id(now)] = (now, lambda stopped=stopped: stopped)
    for broken in (time.localtime, time.gmtime, time.ctime):
        shown[id(broken)] = (broken, lambda secs=None, broken=broken: broken(at if secs is None else secs))
    strftime, moment, date = time.strftime, datetime.datetime, datetime.date
    shown[id(strftime)] = (strftime, lambda text, t=None: strftime(text, t or time.localtime()))
    shown[id(moment)] = (moment, _calendar(moment, at))
    shown[id(date)] = (date, _calendar(date, at))
    # The names under which the model's own files know them as well: from datetime import datetime.
    modules = [time, datetime, *(m for m in list(sys.modules.values()) if getattr(m, "__file__", None) in files)]
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name, value in list(vars(module).items()):
                if id(value) in shown and shown[id(value)][0] is value:
                    stack.enter_context(mock.patch.object(module, name, shown[id(value)][1]))
        yield


def _calendar(real: Any, at: float) -> Any:
    """Return datetime or date as they are when it is that late."""

    class Kind(type(real)):  # type: ignore[misc]
        def __instancecheck__(cls, thing: object) -> bool:
            return isinstance(thing, real)

    class Later(real, metaclass=Kind):  # type: ignore[misc]
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return real.fromtimestamp(at, tz)

        @classmethod
        def utcnow(cls) -> Any:
            return real.fromtimestamp(at, datetime.timezone.utc).replace(tzinfo=None)

        @classmethod
        def today(cls) -> Any:
            return real.fromtimestamp(at)

    return Later


def found(reference: Reference, case: Case, seen: Observation, *, drew: bool) -> Hazard | None:
    """Return the hazard of a model whose answer to a case differs from call to call, or None.

    Args:
        reference: Eager.
        case: Which inputs.
        seen: What eager does on them.
        drew: Whether it moves a global random generator.
    """
    random = called_random(seen)
    where = str(random[0][1]) if random and random[0][1] else ""
    name = "training-mode" if seen.dropout and not seen.random else "nondeterministic"
    again = [reference.attempt(reference.usable(), reference.inputs(case)) for _ in range(2)]
    first = reference.outputs(case)
    assert first is not None
    if not all(isinstance(answer, tuple) and reference.same(first, answer) for answer in again):
        text = "a second call with the same inputs and seed differs"
        return hazards.found(name, text, case=str(case), where=where)

    inputs = reference.inputs(case)  # before chance is steered: drawing them is a matter of chance, too

    def run(seed: int) -> tuple[Tensor, ...]:
        return calls.eager(reference.usable(), [tensor.clone() for tensor in inputs], reference.device, seed)

    detail = reaches(run, reference.same, _LIMIT_S) if drew or seen.random or seen.unfilled else None
    if detail:
        return hazards.found(name, detail, case=str(case), where=where)
    if seen.clocks:
        detail = clock_reaches(run, reference.same, {site.file for _, site in seen.clocks if site})
    if seen.environment and not detail:
        detail = environment_reaches(run, reference.same, [name for name, _ in seen.environment], seen.texts)
    return hazards.found("nondeterministic", detail, case=str(case), where=where) if detail else None


def reaches(
    run: Callable[[int], Sequence[Tensor]],
    same: Callable[[Sequence[Tensor], Sequence[Tensor]], bool],
    limit_s: float,
) -> str | None:
    """Return how chance reaches the outputs of a model, or None.

    Args:
        run: Runs a fresh eager copy on a fixed case after seeding every global generator with the number given.
        same: Whether two results are equal but for rounding.
        limit_s: Seconds after which no further seed is tried.
    """
    first = run(0)
    started = time.perf_counter()
    for seed in range(1, _SEEDS):
        if not same(first, run(seed)):
            return f"outputs differ between seed 0 and seed {seed} of the global random generators"
        if time.perf_counter() - started > limit_s and seed >= 4:
            break
    with _steered(None):  # a watched call may take another path through torch: compare with one of its kind
        plain = _answer(run)
    for end, text in ((0, "lowest"), (1, "highest")) if plain is not None else ():
        with _steered(end):
            answer = _answer(run)
        if answer is None or (plain is not None and not same(plain, answer)):
            return f"outputs differ when the random numbers drawn in forward take their {text} values"
    return None


def clock_reaches(
    run: Callable[[int], Sequence[Tensor]], same: Callable[..., bool], files: Collection[str]
) -> str | None:
    """Return how the time of day, or the date, reaches the outputs of a model, or None.

    Args:
        run: As for `reaches`.
        same: As for `reaches`.
        files: Files of the model's code that read it.
    """
    with _later(0, files):
        first = _answer(run)
    for seconds in _LATER if first is not None else ():
        with _later(seconds, files):
            answer = _answer(run)
        if answer is not None and first is not None and not same(first, answer):
            return f"outputs differ when the call is made {seconds:g} s later"
    return None


def environment_reaches(
    run: Callable[[int], Sequence[Tensor]],
    same: Callable[..., bool],
    names: Sequence[str],
    texts: Collection[str],
) -> str | None:
    """Return how a variable of the environment reaches the outputs of a model, or None.

    Args:
        run: As for `reaches`.
        same: As for `reaches`.
        names: Variables that forward reads.
        texts: What the model's code may compare them with.
    """
    first = run(0)
    for name in list(dict.fromkeys(names))[:_VARIABLES]:
        for value in (None, *_VALUES, *sorted(set(texts) - {*_VALUES, *names})[:_VARIABLES]):
            if os.environ.get(name) == value:
                continue
            with mock.patch.dict(os.environ):
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
                answer = _answer(run)
            if answer is not None and not same(first, answer):
                state = "is not set" if value is None else f"is {value!r}"
                return f"outputs differ when the environment variable {name} {state}"
    return None


def _answer(run: Callable[[int], Sequence[Tensor]]) -> Sequence[Tensor] | None:
    """Return the result, or None when the model cannot take the steered numbers, which is an answer, too."""
    try:
        return run(0)
    except (RuntimeError, ValueError, LookupError, TypeError, OSError, AttributeError):
        return None
