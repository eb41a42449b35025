"""The declaration: what is derived from it, and that no text whatever makes it fail other than by SpecError."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tritonbuild import spec
from tritonbuild.errors import SpecError

if TYPE_CHECKING:
    from pathlib import Path

VERSIONS = """\
triton: "26.07"
device: cpu
models:
  net:
    entry_point: net:Net
    kwargs: {width: 3}
    max_batch_size: 8
    axes: {length: {example: 32, min: 16, max: 512, multiple_of: 16}}
    trace: {rtol: 1e-4, cases: 5}
    inputs:
      ids: {dtype: int64, shape: [batch, length], range: [0, 100]}
    versions:
      1: {}
      4: {kwargs: {}, seed: 9, weights: {path: w.pt}, trace: {cases: 7}}
"""


def load(tmp_path: Path, text: str) -> spec.Pipeline:
    path = tmp_path / "pipeline.yaml"
    path.write_text(text)
    return spec.load(path)


def test_a_version_is_its_model_with_what_it_says_differently(tmp_path: Path) -> None:
    pipeline = load(tmp_path, VERSIONS)
    first, fourth = pipeline.versions["net"].values()
    assert (first.label, first.kwargs, first.seed, first.weights) == ("net/1", {"width": 3}, 0, None)
    assert (fourth.label, fourth.kwargs, fourth.seed) == ("net/4", {}, 9)
    assert fourth.weights == spec.Weights(path="w.pt")
    assert (first.trace.rtol, first.trace.cases) == (1e-4, 5)
    assert (fourth.trace.rtol, fourth.trace.cases) == (1e-4, 7)
    assert first.device == "cpu"
    assert first.inputs["ids"].shape == ("batch", "length")
    assert [version.label for version in pipeline.all_versions()] == ["net/1", "net/4"]
    assert pipeline.root == tmp_path


def test_batch_is_an_axis_from_one_to_the_maximum(tmp_path: Path) -> None:
    (version, _) = load(tmp_path, VERSIONS).all_versions()
    assert list(version.all_axes) == ["batch", "length"]
    assert version.all_axes["batch"] == spec.Axis(example=2, min=1, max=8)
    assert version.all_axes["length"] == spec.Axis(example=32, min=16, max=512, multiple_of=16)


def test_a_flat_version_goes_through_json_unchanged(tmp_path: Path) -> None:
    for version in load(tmp_path, VERSIONS).all_versions():
        assert spec.ModelVersion.model_validate_json(version.model_dump_json()) == version


def test_place_names_the_line(tmp_path: Path) -> None:
    path = load(tmp_path, VERSIONS).path
    assert spec.place(path, ("models", "net", "kwargs", "width")) == "pipeline.yaml:6: models.net.kwargs.width"
    assert spec.place(path, ("models", "net", "config", "x")) == "pipeline.yaml:4: models.net.config.x"


def test_what_a_mapping_merges_it_may_say_otherwise(tmp_path: Path) -> None:
    """Also where the merged mapping merges another one, and stands deeper in the file."""
    text = VERSIONS + "      5: {trace: &own {<<: &all {cases: 3, rtol: 1e-2}, cases: 4}}\n"
    text += "  other:\n    entry_point: net:Net\n    inputs: {x: {dtype: bool, shape: [2]}}\n"
    text += "    trace: {<<: *own, rtol: 0}\n"
    pipeline = load(tmp_path, text)
    assert pipeline.versions["net"][5].trace == spec.Trace(cases=4, rtol=1e-2)
    assert pipeline.models["other"].trace == spec.Trace(cases=4, rtol=0.0)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as raised:
        spec.load(tmp_path / "pipeline.yaml")
    assert str(raised.value) == f"pipeline.yaml: no such file in {tmp_path}"


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_bytes(b"triton: \xff\n")
    with pytest.raises(SpecError) as raised:
        spec.load(tmp_path / "pipeline.yaml")
    assert str(raised.value) == "pipeline.yaml: not UTF-8 text: byte 8 is invalid start byte"


sizes = st.integers(1, 64)
names = st.from_regex(r"[a-z][a-z0-9]{0,5}", fullmatch=True)


@st.composite
def declarations(draw: st.DrawFn) -> dict[str, Any]:
    """Valid declarations."""
    axes = {}
    for name in draw(st.lists(names.filter(lambda name: name != "batch"), unique=True, max_size=3)):
        step = draw(st.integers(1, 8))
        low, example, high = sorted(draw(st.lists(sizes, min_size=3, max_size=3)))
        axes[name] = {"example": example * step, "min": low * step, "max": high * step, "multiple_of": step}
    batched = draw(st.booleans())
    shape = (["batch"] if batched else []) + [*axes, draw(sizes)]
    inputs = {}
    for name in draw(st.lists(names, unique=True, min_size=1, max_size=3)):
        dtype = draw(st.sampled_from(["float32", "float16", "int64", "uint8", "bool"]))
        inputs[name] = {"dtype": dtype, "shape": shape}
        if dtype in {"int64", "uint8"}:
            inputs[name]["range"] = [0, draw(st.integers(0, 255))]
    model = {"entry_point": "net:Net", "axes": axes, "inputs": inputs, "seed": draw(st.integers(0, 2**32))}
    if batched:
        model["max_batch_size"] = draw(sizes)
    return {"triton": "26.07", "models": {draw(names): model}}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(declarations())
def test_every_valid_declaration_is_accepted(tmp_path: Path, declared: dict[str, Any]) -> None:
    pipeline = load(tmp_path, yaml.safe_dump(declared, sort_keys=False))
    (name, model), *_ = declared["models"].items()
    assert list(pipeline.models[name].inputs) == list(model["inputs"])


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
keys = (
    st.sampled_from(["models", "triton", "inputs", "axes", "x", "shape", "dtype", "trace", "versions", "config"])
    | names
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(keys | st.integers(-1, 3) | st.sampled_from([None, 1.5, "str", "int"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(declarations(), st.data())
def test_no_damage_to_a_declaration_makes_it_fail_otherwise(tmp_path: Path, declared: Any, data: st.DataObject) -> None:
    node = declared
    while data.draw(st.booleans()) and isinstance(node, dict) and node:
        key = data.draw(st.sampled_from(sorted(node, key=str)))
        if not isinstance(node[key], dict) or data.draw(st.booleans()):
            node[key] = data.draw(anything)
            break
        node = node[key]
    else:
        if isinstance(node, dict):
            node[data.draw(keys)] = data.draw(anything)
    problems: list[str] = []
    try:
        load(tmp_path, yaml.dump(declared, sort_keys=False))
    except SpecError as error:
        problems = error.problems
    assert all(problem.startswith("pipeline.yaml:") for problem in problems)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet="ab:{}[]-, \n\t\"'&*!|>%@`#1.\x00", max_size=40))
def test_no_text_makes_it_fail_otherwise(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpecError):
        load(tmp_path, text)
