"""Decides when outputs are equal: tolerances by dtype, magnitude and depth; integers, bools, NaN, infinity exact.

A tolerance is relative to the element and, because sums of terms that cancel keep the rounding of the terms, to the
largest element of the same row. It grows with the square root of the number of matrix products and convolutions that
one call runs. The figures are argued in docs/hazards.md, "Tolerances".

Source: measurements on the torchvision models, docs/hazards.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# A size in a trace is a float32 number as soon as it is divided or rooted: float64 is held to some float32 rounding.
_RTOL_EPS = {torch.float64: 2**32, torch.float32: 2**8, torch.float16: 2**4, torch.bfloat16: 2**3}
_ATOL_EPS = {torch.float64: 2**30, torch.float32: 2**4, torch.float16: 2**2, torch.bfloat16: 2**1}
_TF32_EPS = 2.0**-11


@dataclass(frozen=True)
class Tolerance:
    """How far one element of an output may be from eager's: `rtol * |eager| + scaled * largest of the row + atol`."""

    rtol: float
    scaled: float
    atol: float = 0.0


@dataclass(frozen=True)
class Difference:
    """How an output differs from eager's.

    Attributes:
        kind: `count`, `rank`, `shape`, `dtype`, `not-finite` or `values`.
        text: What was found and what was expected.
        error: Largest absolute error of finite elements, where shapes agree.
        excess: Largest error as a multiple of what is allowed.
    """

    kind: str
    text: str
    error: float = math.nan
    excess: float = math.inf


def tolerance(dtype: torch.dtype, depth: int, rtol: float | None, atol: float | None) -> Tolerance:
    """Return the tolerance for outputs of a model.

    Args:
        dtype: The coarsest floating dtype that the model computes in.
        depth: Matrix products and convolutions of one call.
        rtol: The declared relative tolerance, which replaces the derived one.
        atol: The declared absolute tolerance, which replaces the derived one, magnitude included.
    """
    eps = torch.finfo(dtype).eps
    derived = Tolerance(
        rtol=_RTOL_EPS.get(dtype, 2**4) * eps,
        scaled=_ATOL_EPS.get(dtype, 2**2) * eps * math.sqrt(depth + 1),
    )
    if rtol is None and atol is None:
        return derived
    return Tolerance(
        rtol=derived.rtol if rtol is None else rtol,
        scaled=derived.scaled if atol is None else 0.0,
        atol=atol or 0.0,
    )


def served(allowed: Tolerance, largest: float, *, tf32: bool) -> dict[str, float]:
    """Return the tolerance of a served answer, for a comparison element by element.

    Args:
        allowed: The tolerance of the proof.
        largest: The largest magnitude that the output had in the kept cases.
        tf32: Whether the server may use TensorFloat-32, which the proof does not: cuDNN's convolutions on a GPU do.
    """
    rounding = 4 * _TF32_EPS if tf32 else 0.0
    return {
        "rtol": float(f"{max(allowed.rtol, rounding):.3g}"),
        "atol": float(f"{max(allowed.scaled, rounding) * largest + allowed.atol:.3g}"),
    }


def difference(expected: Tensor, got: Tensor, allowed: Tolerance) -> Difference | None:
    """Return how one output differs from eager's, or None."""
    if expected.dim() != got.dim():
        return Difference("rank", f"found shape {_shape(got)}, expected {_shape(expected)}")
    if expected.shape != got.shape:
        return Difference("shape", f"found shape {_shape(got)}, expected {_shape(expected)}")
    if expected.dtype != got.dtype:
        return Difference("dtype", f"found {_name(got.dtype)}, expected {_name(expected.dtype)}")
    if torch.equal(expected, got):
        return None
    if not expected.dtype.is_floating_point:
        return _exact(expected, got)
    wide = torch.float64 if expected.device.type == "cpu" or expected.dtype == torch.float64 else torch.float32
    e, g = expected.to(wide), got.to(wide)
    finite = torch.isfinite(e)
    special = ~finite | ~torch.isfinite(g)
    same = (e == g) | (torch.isnan(e) & torch.isnan(g))
    wrong = special & ~same
    error = torch.where(special, 0.0, (e - g).abs())
    if wrong.any():
        first = wrong.flatten().nonzero()[0]
        return Difference(
            "not-finite",
            f"found {g.flatten()[first].item():g}, expected {e.flatten()[first].item():g}, "
            f"at {int(wrong.sum())} of {wrong.numel()} elements",
            error.max().item(),
        )
    magnitude = torch.where(finite, e.abs(), 0.0)
    rows = magnitude.flatten(1).amax(1) if magnitude.dim() > 1 else magnitude.amax()[None]
    limit = allowed.rtol * magnitude + allowed.atol
    limit = limit + (allowed.scaled * rows).reshape(-1, *[1] * (limit.dim() - 1)) if limit.dim() else limit
    # The largest finite float has no neighbour above: a limit of zero allows equality only.
    excess = torch.where(error > limit, error / limit.clamp(min=torch.finfo(wide).tiny), 0.0)
    worst = excess.max().item()
    if worst == 0:
        return None
    at = int(excess.flatten().argmax())
    return Difference(
        "values",
        f"max abs error {error.max().item():.3g}, at the worst element found {g.flatten()[at].item():.6g}, "
        f"expected {e.flatten()[at].item():.6g} within {limit.flatten()[at].item():.2g}",
        error.max().item(),
        worst,
    )


def largest_error(expected: Tensor, got: Tensor) -> float:
    """Return the largest absolute error of two outputs, over elements that are finite in both; 0 for other shapes."""
    error = _errors(expected, got)
    return 0.0 if error is None else error.max().item()


def mean_error(expected: Tensor, got: Tensor) -> float:
    """Return the mean absolute error of two outputs, over elements that are finite in both; 0 for other shapes."""
    error = _errors(expected, got)
    return 0.0 if error is None else error.mean().item()


def _errors(expected: Tensor, got: Tensor) -> Tensor | None:
    if expected.shape != got.shape or not expected.numel() or torch.equal(expected, got):
        return None
    error = (expected.to(torch.float64) - got.to(torch.float64)).abs()
    return torch.where(torch.isfinite(error), error, 0.0)


def largest(output: Tensor) -> float:
    """Return the largest finite magnitude of an output; 0 for none."""
    if not output.numel() or not output.dtype.is_floating_point:
        return 0.0
    return torch.where(torch.isfinite(output), output.abs(), torch.zeros_like(output)).max().item()


def _exact(expected: Tensor, got: Tensor) -> Difference:
    wrong = expected != got
    first = wrong.flatten().nonzero()[0]
    error = (expected.to(torch.float64) - got.to(torch.float64)).abs().max().item()
    return Difference(
        "values",
        f"{int(wrong.sum())} of {wrong.numel()} elements differ, the first: "
        f"found {got.flatten()[first].item()}, expected {expected.flatten()[first].item()} ({_name(expected.dtype)})",
        error,
    )


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
