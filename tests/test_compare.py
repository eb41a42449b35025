"""When two outputs are equal."""

from __future__ import annotations

import math

import pytest
import torch

from tritonbuild.compare import Tolerance, difference, largest, largest_error, mean_error, served, tolerance

F32 = tolerance(torch.float32, 0, None, None)


def text(expected: torch.Tensor, got: torch.Tensor, allowed: Tolerance = F32) -> str | None:
    found = difference(expected, got, allowed)
    return f"{found.kind}: {found.text}" if found else None


def test_equal_is_equal_and_other_shapes_and_dtypes_are_not() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert text(x, x.clone()) is None
    assert text(torch.zeros(0, 3), torch.zeros(0, 3)) is None
    assert text(x, x[0]) == "rank: found shape [2], expected [2, 2]"
    assert text(x, x[:1]) == "shape: found shape [1, 2], expected [2, 2]"
    assert text(x, x.double()) == "dtype: found float64, expected float32"


def test_integers_and_bools_are_exact() -> None:
    assert text(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4])) == (
        "values: 1 of 3 elements differ, the first: found 4, expected 3 (int64)"
    )
    assert text(torch.tensor([True, False]), torch.tensor([True, True])) == (
        "values: 1 of 2 elements differ, the first: found True, expected False (bool)"
    )
    assert text(torch.tensor([2**62]), torch.tensor([2**62 + 1])) is not None


def test_nan_and_infinity_belong_where_eager_has_them() -> None:
    x = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    assert text(x, x.clone()) is None
    assert (
        text(x, torch.tensor([1.0, 2.0, math.inf, -math.inf]))
        == "not-finite: found 2, expected nan, at 1 of 4 elements"
    )
    assert text(x, -x) == "not-finite: found -inf, expected inf, at 2 of 4 elements"
    assert text(torch.ones(1), torch.tensor([math.nan])) == "not-finite: found nan, expected 1, at 1 of 1 elements"


def test_rounding_is_allowed_relative_to_the_element_and_to_the_largest_of_its_row() -> None:
    eps = torch.finfo(torch.float32).eps
    row = torch.tensor([[1000.0, 0.0], [1.0, 0.0]])
    assert text(row, row + torch.tensor([[0.0, 1000 * 8 * eps], [0.0, 8 * eps]])) is None
    # What is rounding beside a thousand is not beside a one.
    found = difference(row, row + torch.tensor([[0.0, 0.0], [0.0, 1000 * 8 * eps]]), F32)
    assert found
    assert found.kind == "values"
    assert found.error == pytest.approx(1000 * 8 * eps)
    assert found.excess == pytest.approx(500, rel=0.01)


def test_deep_models_and_coarse_dtypes_are_allowed_more() -> None:
    shallow, deep = (tolerance(torch.float32, depth, None, None) for depth in (0, 99))
    assert deep.scaled == pytest.approx(10 * shallow.scaled)
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    allowed = [tolerance(kind, 0, None, None) for kind in kinds]
    assert allowed == sorted(allowed, key=lambda found: found.scaled)


def test_declared_tolerances_replace_the_derived_ones() -> None:
    assert tolerance(torch.float32, 5, 0.1, 0.2) == Tolerance(rtol=0.1, scaled=0.0, atol=0.2)
    assert tolerance(torch.float32, 5, 0.1, None).scaled > 0
    assert text(torch.tensor([1.0]), torch.tensor([1.25]), tolerance(torch.float32, 0, 0.1, 0.2)) is None
    assert text(torch.tensor([1.0]), torch.tensor([1.4]), tolerance(torch.float32, 0, 0.1, 0.2)) is not None
    zero = tolerance(torch.float32, 0, 0.0, 0.0)
    assert text(torch.ones(1), torch.ones(1) + 1e-7, zero) is not None


def test_a_served_answer_is_held_to_the_largest_of_its_output_and_to_tensorfloat_where_it_is_used() -> None:
    assert served(Tolerance(1e-5, 1e-6), 50.0, tf32=False) == {"rtol": 1e-5, "atol": 5e-5}
    assert served(Tolerance(1e-5, 1e-6, 0.5), 50.0, tf32=True) == {"rtol": 0.00195, "atol": 0.598}


def test_errors_are_over_finite_elements() -> None:
    one, two = torch.tensor([1.0, math.nan, 3.0]), torch.tensor([1.5, 2.0, 3.0])
    assert largest_error(one, two) == 0.5
    assert mean_error(one, two) == pytest.approx(0.5 / 3)
    assert largest_error(one, two[:1]) == 0.0
    assert largest(torch.tensor([-3.0, math.inf, 2.0])) == 3.0
    assert largest(torch.tensor([], dtype=torch.float32)) == 0.0
    assert largest(torch.tensor([7])) == 0.0
