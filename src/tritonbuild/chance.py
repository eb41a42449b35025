"""Decides whether chance reaches an output: random numbers, the clock, memory that nobody has filled.

That a model draws random numbers proves nothing: a layer may draw them and not use them, as LayerDrop does in eval
mode. That one run equals the next proves nothing either: the draw may matter once in a thousand calls. So chance is
steered: other seeds, then the ends of what a generator may return, other times, other garbage. If an output moves,
chance reaches it.

Source: distributions of torch's, numpy's and Python's generators.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tritonbuild.monitors import DROPOUT, UNFILLED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

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
_CLOCKS = ("time", "monotonic", "perf_counter", "process_time")


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
def _later(seconds: float) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in _CLOCKS:
            for function, scale in ((name, 1.0), (f"{name}_ns", 1e9)):
                now = getattr(time, function)
                # The shifted clock stands still: whatever moves between two runs is then not the clock's doing.
                stopped = type(now())(now() + seconds * scale)
                stack.enter_context(mock.patch.object(time, function, lambda stopped=stopped: stopped))
        yield


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


def clock_reaches(run: Callable[[int], Sequence[Tensor]], same: Callable[..., bool]) -> str | None:
    """Return how the time of day reaches the outputs of a model, or None."""
    with _later(0):
        first = run(0)
    for seconds in (0.37, 1, 61, 3601, 43201, 86400 * 40.5):
        with _later(seconds):
            if not same(first, run(0)):
                return f"outputs differ when the call is made {seconds:g} s later"
    return None


def _answer(run: Callable[[int], Sequence[Tensor]]) -> Sequence[Tensor] | None:
    """Return the result, or None when the model cannot take the steered numbers, which is an answer, too."""
    try:
        return run(0)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None
