"""The truth about a model, by brute force: random sizes and values, eager against the trace, and nothing cleverer.

Shares no code with the proof that it checks: draws, comparison and the list of what may be wrong are its own.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from corpus import Model

STYLES = ("normal", "normal", "small", "large", "constant", "zero", "positive", "sorted", "ends")


def draw(model: Model, rng: random.Random) -> tuple[dict[str, int], list[Tensor]]:
    """Return random sizes, and random inputs of those sizes inside the declared ranges."""
    version = model.version
    sizes = {}
    for name, axis in version.all_axes.items():
        steps = range(-(-axis.min // axis.multiple_of), axis.max // axis.multiple_of + 1)
        sizes[name] = rng.choice((steps[0], steps[-1], rng.choice(steps), rng.choice(steps))) * axis.multiple_of
    style = rng.choice(STYLES)
    torch.manual_seed(rng.randrange(2**31))
    inputs = []
    for declared in version.inputs.values():
        shape = [sizes[size] if isinstance(size, str) else size for size in declared.shape]
        dtype = getattr(torch, declared.dtype)
        if dtype == torch.bool:
            inputs.append(torch.rand(shape) < rng.choice((0.0, 0.5, 0.5, 1.0)))
        elif not dtype.is_floating_point:
            low, high = (int(end) for end in declared.range or (0, 1))
            whole = torch.randint(low, high + 1, shape)
            inputs.append((torch.full(shape, rng.choice((low, high))) if style == "ends" else whole).to(dtype))
        else:
            inputs.append(_floats(shape, style, declared.range).to(dtype))
    return sizes, inputs


def _floats(shape: list[int], style: str, bounds: tuple[float, float] | None) -> Tensor:
    x = torch.randn(shape)
    x = {
        "small": x * 1e-2,
        "large": x * 50,
        "constant": torch.full(shape, float(torch.randn(()))),
        "zero": torch.zeros(shape),
        "positive": x.abs(),
        "sorted": x.sort(-1).values,
    }.get(style, x)
    if bounds is None:
        return x
    low, high = bounds
    if style == "ends":
        return torch.full(shape, float(random.choice(bounds)))
    return (low + (high - low) * torch.rand(shape) if style == "normal" else low + (high - low) * x.sigmoid()).clamp(
        low, high
    )


def equal(one: Any, two: Any) -> bool:
    """Return whether two results are the same but for rounding."""
    if isinstance(one, Exception) or isinstance(two, Exception) or len(one) != len(two):
        return False
    for a, b in zip(one, two, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not a.dtype.is_floating_point:
            if not torch.equal(a, b):
                return False
            continue
        loose = 2e-2 if a.dtype in (torch.float16, torch.bfloat16) else 1e-3
        scale = a[torch.isfinite(a)].abs().max().item() if torch.isfinite(a).any() else 0.0
        if not torch.allclose(a, b, rtol=loose, atol=max(scale, 1e-30) * loose, equal_nan=True):
            return False
    return True


def call(module: Callable[..., Any], inputs: Sequence[Tensor], seed: int = 11) -> Any:
    """Return the outputs, or the exception."""
    torch.default_generator.manual_seed(seed)
    numpy.random.seed(seed)
    random.seed(seed)
    try:
        with torch.no_grad():
            outputs = module(*inputs)
    except Exception as error:  # noqa: BLE001 (a model may raise anything)
        return error
    return tuple(x.clone() for x in ((outputs,) if isinstance(outputs, Tensor) else outputs))


def wrongs(
    model: Model, build: Callable[[], nn.Module], load: Callable[[], Any], draws: int = 24, *, rows: bool = True
) -> set[str]:
    """Return what is wrong with a model, as far as that many random draws show it; stops at the first."""
    rng = random.Random(model.name)
    used, candidate = build(), load()
    kinds: set[Any] = set()
    for _ in range(draws):
        sizes, inputs = draw(model, rng)
        clones = [x.clone() for x in inputs]
        eager = call(build(), clones)
        if any(not _same_bits(x, y) for x, y in zip(inputs, clones, strict=True)):
            return {"it changes its inputs"}
        if isinstance(eager, Exception):
            if _special(inputs, model):
                continue
            return {f"eager raises: {eager}"}
        kinds.add((len(eager), tuple((x.dim(), x.dtype) for x in eager)))
        if len(kinds) > 1:
            return {"its outputs have other ranks or dtypes"}
        for text, other in (
            ("a second fresh copy differs", call(build(), [x.clone() for x in inputs], seed=12)),
            ("a copy that has run before differs", call(used, [x.clone() for x in inputs])),
            ("the trace differs", call(candidate, [x.clone() for x in inputs])),
            ("the trace differs when it is called again", call(candidate, [x.clone() for x in inputs])),
        ):
            if not equal(eager, other):
                return {text}
        if "batch" in sizes:
            if any(not x.dim() or x.shape[0] != sizes["batch"] for x in eager):
                return {"axis 0 is not the batch"}
            if rows and sizes["batch"] > 1 and not _special(inputs, model):
                row = rng.randrange(sizes["batch"])
                alone = call(build(), [x[row : row + 1].clone() for x in inputs])
                if not equal(tuple(x[row : row + 1] for x in eager), alone):
                    return {"a row alone differs"}
    return set()


def _special(inputs: Sequence[Tensor], model: Model) -> bool:
    """Return whether a model without ranges may refuse these values, or round them delicately."""
    floats = [x for x in inputs if x.is_floating_point()]
    unbounded = any(d.range is None for d in model.version.inputs.values() if d.dtype.startswith("float"))
    return unbounded and any(x.numel() and (x.double().std() < 0.5 or x.abs().max() > 20) for x in floats)


def _same_bits(one: Tensor, two: Tensor) -> bool:
    return torch.equal(one, two) or bool(((one == two) | ((one != one) & (two != two))).all())


class Run:
    """Shows what plain calls hardly show: on the example's inputs, with fresh copies."""

    def __init__(self, build: Callable[[], nn.Module], inputs: Sequence[Tensor]) -> None:
        self.build, self.inputs = build, inputs

    def differs_when(self, owner: Any, name: str, replaced: Callable[..., Any]) -> bool:
        """Return whether the output changes when a function is replaced."""
        before = call(self.build(), self.inputs)
        with mock.patch.object(owner, name, replaced):
            return not equal(before, call(self.build(), self.inputs))

    def differs_after(self, calls: int) -> bool:
        """Return whether the output changes after that many calls."""
        module = self.build()
        first = call(module, self.inputs)
        for _ in range(calls):
            last = call(module, self.inputs)
        return not equal(first, last)

    def differs_after_other(self, two: Sequence[Sequence[Tensor]]) -> bool:
        """Return whether the second inputs get another answer from a module that has run on the first."""
        module = self.build()
        call(module, two[0])
        return not equal(call(module, two[1]), call(self.build(), two[1]))

    def differs_among_seeds(self, seeds: int) -> bool:
        """Return whether the output changes with the seed of the global generators."""
        module = self.build()
        first = call(module, self.inputs, seed=0)
        return any(not equal(first, call(module, self.inputs, seed=seed)) for seed in range(1, seeds))

    def differs_at(self, value: float) -> bool:
        """Return whether the output changes with the seed where every element is the value."""
        inputs = [torch.full_like(x, value) for x in self.inputs]
        return not equal(call(self.build(), inputs, seed=0), call(self.build(), inputs, seed=1))

    def rows_differ(self, one: Sequence[Tensor], two: Sequence[Tensor], row: int = 0) -> bool:
        """Return whether the first rows (or others), which are given equal, get other answers in the two batches."""
        answers = [call(self.build(), inputs) for inputs in (one, two)]
        return not equal(*(tuple(x[row].reshape(-1) if x.dim() else x for x in answer) for answer in answers))

    def rows_differ_at(self, *sizes: int) -> bool:
        """Return whether the first row of random inputs of these first sizes gets another answer alone."""
        inputs = [torch.randn(*sizes, *x.shape[len(sizes) :]) for x in self.inputs]
        return self.rows_differ(inputs, [x[:1] for x in inputs])
