"""The plan of cases and what the search adds; what is kept of them for the smoke test."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from tritonbuild import cases
from tritonbuild.cases import all_sizes, case, legal, more_sizes, more_values, plan, value_sizes
from tritonbuild.draws import CORNERS, PLAIN
from tritonbuild.reference import Reference
from tritonbuild.spec import Axis, Input, ModelVersion, Trace

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def version(batch: int = 8, trace: dict[str, Any] | None = None, **axes: Axis) -> ModelVersion:
    shape = (*(["batch"] if batch else []), *axes, 8)
    return ModelVersion.model_construct(
        model="m",
        version=1,
        entry_point="m:M",
        kwargs={},
        seed=0,
        weights=None,
        device="cpu",
        triton="26.08",
        max_batch_size=batch,
        axes=axes,
        inputs={"x": Input(dtype="float32", shape=shape)},
        outputs=(),
        trace=Trace(**(trace or {})),
    )


@st.composite
def axes(draw: st.DrawFn) -> Axis:
    step = draw(st.integers(1, 8))
    low, more, at = draw(st.integers(1, 20)), draw(st.integers(0, 40)), draw(st.integers(0, 40))
    return Axis(example=(low + min(at, more)) * step, min=low * step, max=(low + more) * step, multiple_of=step)


@settings(max_examples=80, deadline=None, database=None)
@given(batch=st.sampled_from([0, 1, 2, 3, 8, 64]), declared=st.lists(axes(), max_size=3))
def test_planned_and_further_cases_are_legal_and_both_ends_of_every_axis_are_planned(
    batch: int, declared: list[Axis]
) -> None:
    model = version(batch, **{f"a{i}": axis for i, axis in enumerate(declared)})
    planned = plan(model)
    further = [
        *itertools.islice(more_sizes(model, {5, 16}), 200),
        *itertools.islice(more_values({0.5, 7}, {"x": None}, value_sizes(model)), 200),
    ]
    for found in (*planned, *further):
        assert list(found.sizes) == list(model.all_axes)
        assert all(legal(axis, found.sizes[name]) for name, axis in model.all_axes.items())
    assert planned[0].sizes == {name: axis.example for name, axis in model.all_axes.items()}
    assert planned[0].draw == PLAIN
    assert len(set(planned)) == len(planned)
    for name, axis in model.all_axes.items():
        sizes = {found.sizes[name] for found in planned}
        assert {axis.min, axis.max} <= sizes
    assert set(CORNERS) <= {found.draw for found in planned}


def test_the_plan_of_one_model_to_the_letter() -> None:
    model = version(4, tokens=Axis(example=6, min=2, max=12, multiple_of=2))
    assert [str(found) for found in plan(model)[:12]] == [
        "batch=2 tokens=6 draw=plain seed=0",
        "batch=1 tokens=6 draw=plain seed=100",
        "batch=2 tokens=2 draw=plain seed=101",
        "batch=1 tokens=6 draw=plain seed=2",
        "batch=4 tokens=6 draw=plain seed=102",
        "batch=2 tokens=12 draw=plain seed=103",
        "batch=2 tokens=6 draw=plain seed=1",
        "batch=3 tokens=6 draw=plain seed=104",
        "batch=2 tokens=10 draw=plain seed=105",
        "batch=2 tokens=6 draw=zeros seed=3",
        "batch=1 tokens=2 draw=plain seed=106",
        "batch=4 tokens=12 draw=plain seed=107",
    ]


def test_the_first_cases_hold_the_ends_of_every_axis_and_joint_sizes() -> None:
    model = version(16, h=Axis(example=64, min=12, max=512), w=Axis(example=48, min=12, max=512))
    kept = plan(model)[: model.trace.cases]
    sizes = [tuple(found.sizes.values()) for found in kept]
    for telling in ((1, 64, 48), (16, 64, 48), (2, 12, 48), (2, 512, 48), (2, 64, 12), (2, 64, 512), (1, 12, 12)):
        assert telling in sizes
    assert (16, 512, 512) in sizes
    assert {found.draw for found in kept} > {PLAIN, "zeros", "large", "negated"}


def test_a_model_without_axes_varies_its_values_only() -> None:
    planned = plan(version(0))
    assert {found.axes for found in planned} == {()}
    assert str(planned[0]) == "draw=plain seed=0"
    assert len(planned) == 2 + len(CORNERS) + 1


def test_numbers_of_the_code_come_first_in_the_search() -> None:
    model = version(8, t=Axis(example=5, min=1, max=300))
    found = [tuple(further.sizes.values()) for further in itertools.islice(more_sizes(model, {77, 1000}), 9)]
    assert found[:3] == [(2, 77), (2, 78), (2, 76)]
    assert (1, 77) in found
    assert all(1 <= size <= 300 for _, size in found)


def test_every_size_is_reached() -> None:
    model = version(4, t=Axis(example=5, min=1, max=50))
    found = {further.sizes["t"] for further in itertools.islice(more_sizes(model, ()), 400)}
    assert found == set(all_sizes(model.axes["t"]))


def test_numbers_of_the_code_become_values_and_ranges_are_respected_by_the_draws() -> None:
    model = version(0)
    unbounded = [further.draw for further in itertools.islice(more_values({0.37}, {"x": None}, value_sizes(model)), 60)]
    assert {"fill=0.37", "spike=0.37", "scale=1000", "nan", "inf"} <= set(unbounded)
    bounded = [further.draw for further in itertools.islice(more_values({0.37}, {"x": (0, 1)}, value_sizes(model)), 60)]
    assert "fill=0.37" in bounded
    assert not {"nan", "inf", "scale=1000"} & set(bounded)


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, x.argmax(-1)


def kept(model: ModelVersion, path: Path) -> tuple[int, list[dict[str, Any]], dict[str, str], dict[str, torch.Tensor]]:
    reference = Reference(model, Doubled, "cpu", path.parent)
    count = cases.save(reference, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        return count, json.loads(metadata["cases"]), metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_what_is_kept(tmp_path: Path) -> None:
    model = version(4, {"cases": 5}, t=Axis(example=6, min=2, max=12))
    count, listed, metadata, tensors = kept(model, tmp_path / "c.safetensors")
    assert count == 5
    assert [row["case"] for row in listed] == [str(found) for found in plan(model)[:5]]
    assert listed[1]["sizes"] == {"batch": 1, "t": 6}
    for i in range(5):
        x = tensors[f"{i}/input/x"]
        assert torch.equal(tensors[f"{i}/output/OUTPUT__0"], x * 2)
        assert tensors[f"{i}/output/OUTPUT__1"].dtype == torch.int64
    assert metadata["compare"] == "values"
    tolerance = json.loads(metadata["tolerance"])
    assert set(tolerance) == {"OUTPUT__0", "OUTPUT__1"}
    assert 1e-5 < tolerance["OUTPUT__0"]["rtol"] < 1e-4
    assert tolerance["OUTPUT__1"]["atol"] == 0.0


def test_no_more_is_kept_than_fits_but_the_first_always(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "KEPT_BYTES", 2000)
    model = version(4, t=Axis(example=6, min=2, max=12))
    count, listed, _, _ = kept(model, tmp_path / "c.safetensors")
    assert 1 < count < 24
    assert listed[0]["case"] == str(plan(model)[0])
    monkeypatch.setattr(cases, "KEPT_BYTES", 1)
    assert kept(model, tmp_path / "d.safetensors")[0] == 1


def test_a_case_is_text_that_names_all_it_is() -> None:
    assert str(case({"batch": 3, "height": 12}, "zeros", 5)) == "batch=3 height=12 draw=zeros seed=5"
    assert case({"batch": 3}).sizes == {"batch": 3}
