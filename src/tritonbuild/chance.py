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
_UNIFORM = frozenset({"rand", "rand_like", "uniform_"})
_NORMAL = frozenset({"randn", "randn_like", "normal", "normal_"})
_PARAMETERS = (("from", "to"), ("a", "b"), ("mean", "std"))
"""What the two parameters of a distribution are called: by Tensor.uniform_, by torch.nn.init, by normal."""

_SEEDS = 24
_LIMIT_S = 0.3
_CASES = 4
"""Cases at which random numbers are drawn, that are tried with others however long that takes."""

_POSSIBLE = 2.0**-23
"""Probability below which a choice is none: softmax leaves hardly a zero."""

_CLOCKS = ("time", "monotonic", "perf_counter", "process_time")
_HOUR, _DAY = 3600, 86400
_LATER = (0.37, 1, 61, _HOUR + 1, 43201, _DAY * 40.5, _DAY * 400)
_MUCH_LATER = (*(hour * _HOUR for hour in range(1, 24)), *(day * _DAY for day in (*range(1, 7), *range(30, 360, 30))))
"""Seconds: all clocks move; then, as far as that is quick, every hour, every day of the week, every month."""
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
        if name in _UNIFORM or name in _NORMAL:
            result = _spread(result, name, args, kwargs or {}, self.end)
        elif name in ("bernoulli", "bernoulli_"):
            result = _tossed(result, name, args, kwargs or {}, self.end)
        elif name == "multinomial":
            result.copy_(_chosen(result, args[0], self.end))
        elif name == "poisson":
            rare = args[0] + (5.0 if self.end else -5.0) * args[0].sqrt()
            result = rare.ceil() if self.end else rare.floor().clamp(min=0.0)
        elif name == "randint":
            numbers = [arg for arg in args if isinstance(arg, int)]
            if numbers:
                result.fill_(numbers[-1] - 1 if self.end else (numbers[0] if len(numbers) > 1 else 0))
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


def _spread(result: Tensor, name: str, args: Sequence[Any], kwargs: dict[str, Any], end: int) -> Tensor:
    """Fill a uniform or normal draw with its lowest or highest value; sizes are no parameters of a distribution."""
    given: list[Any] = []
    if name in ("normal", "normal_", "uniform_"):
        given = [arg for arg in args[name.endswith("_") :][:2] if isinstance(arg, (int, float, Tensor))]
        given += [kwargs[key] for names in _PARAMETERS for key in names if key in kwargs]
    first, second = given + [0.0, 1.0][len(given) :]
    if name in _NORMAL:
        value = first + (5.0 if end else -5.0) * second
    else:
        # The largest number below 1 that the dtype has.
        value = first + (second - first) * (1 - torch.finfo(result.dtype).eps / 2) if end else first
    return _filled(result, value)


def _tossed(result: Tensor, name: str, args: Sequence[Any], kwargs: dict[str, Any], end: int) -> Tensor:
    """Fill a draw of zeros and ones with the rarer of what its probabilities allow: never with the impossible."""
    probability = kwargs.get("p", args[1] if len(args) > 1 else args[0] if name == "bernoulli" else 0.5)
    probability = torch.as_tensor(probability, device=result.device)
    return _filled(result, (probability > 0 if end else probability >= 1).to(result.dtype))


def _chosen(result: Tensor, weights: Tensor, end: int) -> Tensor:
    """Return the least or the most probable choices: never an impossible one, unless eager had no others."""
    possible = weights > _POSSIBLE * weights.sum(-1, keepdim=True)
    ranked = torch.where(possible, weights, -1.0 if end else math.inf).argsort(-1, descending=bool(end))
    places = torch.arange(result.shape[-1], device=result.device) % possible.sum(-1, keepdim=True).clamp(min=1)
    return ranked.gather(-1, places)


def _filled(result: Tensor, value: Any) -> Tensor:
    with torch.no_grad():  # a parameter may be drawn: nn.init draws in place
        return result.copy_(torch.as_tensor(value, device=result.device).expand_as(result))


@contextlib.contextmanager
def _steered(end: int | None) -> Iterator[None]:
    value = _ALMOST_ONE if end else 0.0

    def one() -> float:
        return value

    def below(n: int) -> int:
        return n - 1 if end else 0

    def filled(*shape: int, size: Any = None) -> Any:
        return numpy.full(size if size is not None else shape, value)[()]

    def chosen(a: Any, size: Any = None, replace: bool = True, p: Any = None) -> Any:  # noqa: ARG001 (numpy's)
        things = numpy.arange(a) if isinstance(a, int) else numpy.asarray(a)
        possible = range(len(things)) if p is None else sorted(numpy.flatnonzero(p), key=lambda i: float(p[i]))
        return numpy.resize(things[list(possible)[:: 1 if end else -1]], () if size is None else size)[()]

    with contextlib.ExitStack() as stack:
        if end is not None:
            stack.enter_context(mock.patch.object(random, "random", one))
            for name, steered in (("random", one), ("_randbelow", below)):  # choice, uniform, gauss, ... ask these
                stack.enter_context(mock.patch.object(random._inst, name, steered))
            for name in ("rand", "random", "random_sample"):
                stack.enter_context(mock.patch.object(numpy.random, name, filled))
            stack.enter_context(mock.patch.object(numpy.random, "choice", chosen))
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
    where = random[0][1] if random else None
    name = "training-mode" if seen.dropout and not seen.random else "nondeterministic"
    again = [reference.attempt(reference.usable(), reference.inputs(case)) for _ in range(2)]
    first = reference.outputs(case)
    assert first is not None
    if not all(isinstance(answer, tuple) and reference.same(first, answer) for answer in again):
        text = "a second call with the same inputs and seed differs"
        return hazards.found(name, text, case=str(case), where=where)

    inputs = reference.inputs(case)  # before chance is steered: drawing them is a matter of chance, too

    def run(seed: int, around: contextlib.AbstractContextManager[None] | None = None) -> tuple[Tensor, ...]:
        module = reference.usable()
        with around or contextlib.nullcontext():
            return calls.eager(module, [tensor.clone() for tensor in inputs], reference.device, seed)

    detail = reaches(run, reference.same, _LIMIT_S) if drew or seen.random or seen.unfilled else None
    if detail:
        return hazards.found(name, detail, case=str(case), where=where)
    if seen.clocks:
        detail = clock_reaches(run, reference.same, {site.file for _, site in seen.clocks if site})
    if seen.environment and not detail:
        detail = environment_reaches(run, reference.same, [name for name, _ in seen.environment], seen.texts)
    return hazards.found("nondeterministic", detail, case=str(case), where=where) if detail else None


def further(reference: Reference, drawn: Sequence[Case]) -> list[Hazard]:
    """Return the hazard of a model that draws random numbers on a rare way, if they reach an output there."""
    kinds = {case.draw: case for case in reversed(drawn)}
    watch = calls.Watch()
    for tried, case in enumerate(dict.fromkeys((*reversed(kinds.values()), *drawn))):
        if tried >= _CASES and watch.s > _LIMIT_S:
            break
        hazard = found(reference, case, reference.observe(case), drew=True)
        if hazard:
            return [hazard]
    return []


def reaches(
    run: Callable[..., Sequence[Tensor]],
    same: Callable[[Sequence[Tensor], Sequence[Tensor]], bool],
    limit_s: float,
) -> str | None:
    """Return how chance reaches the outputs of a model, or None.

    Args:
        run: Runs a fresh eager copy on a fixed case after seeding every global generator with the number given, and
            within the context given: what builds the copy draws its weights, which is no chance.
        same: Whether two results are equal but for rounding.
        limit_s: Seconds after which no further seed is tried.
    """
    first = run(0)
    watch = calls.Watch()
    for seed in range(1, _SEEDS):
        if not same(first, run(seed)):
            return f"outputs differ between seed 0 and seed {seed} of the global random generators"
        if watch.s > limit_s and seed >= 4:
            break
    plain = _answer(run, _steered(None))  # a watched call may take another path: compare with one of its kind
    for end, text in ((0, "lowest"), (1, "highest")) if plain is not None else ():
        answer = _answer(run, _steered(end))
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
    watch = calls.Watch()
    for seconds in (*_LATER, *_MUCH_LATER) if first is not None else ():
        if watch.s > _LIMIT_S and seconds not in _LATER:
            break
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


def _answer(
    run: Callable[..., Sequence[Tensor]], around: contextlib.AbstractContextManager[None] | None = None
) -> Sequence[Tensor] | None:
    """Return the result, or None when the model cannot take the steered numbers, which is an answer, too."""
    try:
        return run(0, around)
    except (RuntimeError, ValueError, LookupError, TypeError, OSError, AttributeError):
        return None
