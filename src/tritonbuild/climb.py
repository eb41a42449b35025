"""Decides which values to try where Python's way depends on a number that a model computes.

A branch may be taken only far out: a score above 0.9, a norm above 50. Random draws do not get there; the gradient
does. Every value that left torch for Python is driven up and down by changing the inputs along its gradient, inside
the declared ranges, and inputs on the way become cases. What cannot be differentiated is left to the draws.

Source: torch.autograd; DESIGN's note that some wrong models show only at rare legal values.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tritonbuild import cases

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

    from tritonbuild.cases import Case
    from tritonbuild.reference import Reference

_STEPS = 12
_TRIED = (2, 5, 8, 12)
"""Steps after which the inputs become a case."""

_PATHS = 8
"""Inputs from which values are driven that left torch only there: `a > 0.9 and b < 0.1` looks at b once a is large."""

_GOALS = 4
"""Values that leave torch, in the order of the call, that are driven."""

_ABOVE = frozenset({"gt", "ge", "__gt__", "__ge__", "greater", "greater_equal"})
_BELOW = frozenset({"lt", "le", "__lt__", "__le__", "less", "less_equal"})
_EQUAL = frozenset({"eq", "__eq__", "equal", "allclose", "isclose"})
_UNEQUAL = frozenset({"ne", "__ne__", "not_equal"})
_LEAVES = frozenset({"__bool__", "__float__", "__int__", "item", "is_nonzero", "equal", "allclose", "tolist", "numpy"})


class _Goals(TorchFunctionMode):
    """Collects what leaves torch as differentiable numbers: of a comparison, how far it is from turning."""

    def __init__(self) -> None:
        super().__init__()
        self.goals: list[Tensor] = []
        self._margins: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        with contextlib.suppress(RuntimeError, TypeError, IndexError):
            margin = self._margin(name, args)
            if margin is not None and isinstance(result, Tensor):
                self._margins[id(result)] = (result, margin)  # the result is held: its id must stay its own
            if name in _LEAVES:
                goal = margin if margin is not None else self._of(args[0])
                if goal.is_floating_point() and goal.requires_grad and len(self.goals) < _GOALS:
                    self.goals.append(goal.sum())
        return result

    def _of(self, tensor: Tensor) -> Tensor:
        held = self._margins.get(id(tensor))
        return held[1] if held else tensor

    def _margin(self, name: str, args: Sequence[Any]) -> Tensor | None:
        if name in _ABOVE:
            return torch.as_tensor(args[0] - args[1])
        if name in _BELOW:
            return torch.as_tensor(args[1] - args[0])
        if name in _EQUAL:
            return -torch.as_tensor(args[0] - args[1]).abs().amax().reshape(())
        if name in _UNEQUAL:
            return torch.as_tensor(args[0] - args[1]).abs()
        if not args or not isinstance(args[0], Tensor) or id(args[0]) not in self._margins:
            return None
        margin = self._of(args[0])
        if name in ("any", "max", "amax", "sum", "count_nonzero"):
            return margin.amax()
        if name in ("all", "min", "amin"):
            return margin.amin()
        if name in ("logical_not", "__invert__", "bitwise_not"):
            return -margin
        if name in ("__and__", "logical_and", "bitwise_and"):
            return torch.minimum(margin, self._of(args[1]))
        if name in ("__or__", "logical_or", "bitwise_or"):
            return torch.maximum(margin, self._of(args[1]))
        return None


def found(reference: Reference, sizes: Mapping[str, int]) -> Iterator[Case]:
    """Yield cases of these sizes at which values that leave torch are as large and as small as the gradient gets them.

    Their inputs are no draw: they are left in `reference.found`, from which `reference.inputs` takes them.
    """
    if not any(getattr(torch, declared.dtype).is_floating_point for declared in reference.version.inputs.values()):
        return
    starts: list[tuple[list[Tensor], int, str]] = [(list(reference.inputs(cases.case(sizes))), 0, "")]
    for at in range(_PATHS):
        if at == len(starts):
            return
        inputs, known, path = starts[at]
        goals = len(_goals(reference, [x.clone() for x in inputs]))
        for goal in range(known, goals):
            for sign, way in ((1.0, "up"), (-1.0, "down")):
                draw = f"{path}{way}={goal}"
                moved = yield from _driven(reference, sizes, inputs, goal, sign, draw)
                if len(_goals(reference, [x.clone() for x in moved])) > goals:
                    starts.append((moved, goals, f"{draw},"))


def _driven(
    reference: Reference, sizes: Mapping[str, int], inputs: list[Tensor], goal: int, sign: float, draw: str
) -> Generator[Case, None, list[Tensor]]:
    bounds = list(reference.source.bounds.values())
    for step in range(1, _STEPS + 1):
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        goals = _goals(reference, leaves)
        if goal >= len(goals):
            return inputs
        moving = [x for x in leaves if x.requires_grad]
        slopes = iter(torch.autograd.grad(goals[goal], moving, allow_unused=True))
        inputs = [
            _stepped(x, next(slopes), sign, step, limits) if x.requires_grad else x
            for x, limits in zip(leaves, bounds, strict=True)
        ]
        if step in _TRIED:
            case = cases.case(sizes, draw, step)
            reference.found[case] = tuple(x.detach().clone() for x in inputs)
            yield case
    return inputs


def _stepped(x: Tensor, slope: Tensor | None, sign: float, step: int, bounds: tuple[float, float] | None) -> Tensor:
    x = x.detach()
    if slope is None or not torch.isfinite(slope).all():
        return x
    if bounds is None:  # steps double: far out within a few of them
        return x + sign * 0.02 * 2.0**step * slope / (slope.abs().max() + 1e-30)
    low, high = bounds
    return (x + sign * (high - low) / 6 * slope.sign()).clamp(low, high)


def _goals(reference: Reference, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Run eager with gradients; return what leaves torch, as far as it depends on the inputs."""
    mode = _Goals()
    for leaf in leaves:
        if leaf.is_floating_point():
            leaf.requires_grad_(True)
    with contextlib.suppress(Exception), torch.enable_grad(), mode:
        reference.usable()(*[leaf.clone() for leaf in leaves])
    return mode.goals
