"""doit plan, doit why and doit gc: what they foretell is what a run then does."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
from conftest import DODO, Project, Ran

from tritonbuild import commands

if TYPE_CHECKING:
    from pathlib import Path

NETS = '''\
import torch
from layers import Scale


class Net(torch.nn.Module):
    """A network."""

    def __init__(self, width=3):
        super().__init__()
        self.layer = torch.nn.Linear(4, width)
        self.scale = Scale()

    def forward(self, x):
        return self.scale(self.layer(x))
'''
LAYERS = """\
import torch


class Scale(torch.nn.Module):
    def forward(self, x):
        return x * 2
"""
YAML = """\
triton: "26.07"
device: cpu
models:
  one:
    entry_point: nets:Net
    max_batch_size: 4
    inputs:
      x: {dtype: float32, shape: [batch, 4]}
    trace: {cases: 3, budget_s: 1}
  two:
    entry_point: torch.nn:ReLU
    inputs:
      x: {dtype: float32, shape: [4]}
    trace: {cases: 3, budget_s: 1}
"""
BUILD = ("check", "trace", "config", "repository")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that is built but for smoke; tests leave it so, by undoing what they did."""
    project = Project(tmp_path_factory.mktemp("plan") / "project")
    project.write({"dodo.py": DODO, "nets.py": NETS, "layers.py": LAYERS, "pipeline.yaml": YAML})
    ran = project.doit("plan", *BUILD)
    assert ran.out == (
        "check  run\n"
        "    never finished here, or forgotten\n"
        "trace:one/1  run\n"
        "    never finished here, or forgotten\n"
        "trace:two/1  run\n"
        "    never finished here, or forgotten\n"
        "config:one  run\n"
        "    never finished here, or forgotten\n"
        "config:two  run\n"
        "    never finished here, or forgotten\n"
        "repository  run\n"
        "    never finished here, or forgotten\n"
        "6 would run, 0 fetched, 0 may follow, 0 up to date\n"
    )
    ran = project.doit(*BUILD)
    assert ran.code == 0, ran.out
    return project


def plan(project: Project, *arguments: str) -> Ran:
    """Run doit plan and leave out how long things took."""
    ran = project.doit("plan", *(arguments or BUILD))
    out = re.sub(r", (last time|made in) [\d.]+ s", "", ran.out)
    return Ran(ran.code, re.sub(r"; [\d.]+ s of work the last time", "", out))


def test_nothing_to_do(built: Project) -> None:
    assert plan(built) == Ran(0, "0 would run, 0 fetched, 0 may follow, 6 up to date\n")
    assert plan(built, "--exit-code", *BUILD).code == 0


def test_an_edit_of_a_function_is_named_and_what_may_follow_is_told(built: Project) -> None:
    built.write({"layers.py": LAYERS.replace("x * 2", "x * 3")})
    assert plan(built) == Ran(
        0,
        "trace:one/1  run\n"
        "    layers.py: Scale.forward\n"
        "config:one  may run\n"
        "    if trace:one/1 changes what it reads\n"
        "1 would run, 0 fetched, 1 may follow, 4 up to date\n",
    )
    assert plan(built, "--exit-code", *BUILD).code == 1
    ran = built.doit(*BUILD)
    assert ran.tasks == ["trace:one/1"]
    built.write({"layers.py": LAYERS})
    assert plan(built).out == (
        "trace:one/1  fetch\n    layers.py: Scale.forward\n0 would run, 1 fetched, 0 may follow, 5 up to date\n"
    )
    assert built.doit(*BUILD).tasks == ["trace:one/1"]
    assert plan(built).out == "0 would run, 0 fetched, 0 may follow, 6 up to date\n"


def test_comments_in_sources_and_in_the_declaration(built: Project) -> None:
    built.write(
        {"nets.py": NETS.replace('"""A network."""', '"""Another text."""'), "pipeline.yaml": "# text\n" + YAML}
    )
    assert plan(built).out.startswith("trace:one/1  run\n    nets.py: comments, docstrings or formatting only\n")
    built.write({"nets.py": NETS, "pipeline.yaml": YAML})


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (
            "max_batch_size: 4",
            "max_batch_size: 5",
            {
                "check": ["pipeline.yaml declares something else"],
                "trace:one/1": ["pipeline.yaml:6: models.one.max_batch_size: 4 -> 5"],
                "config:one": ["pipeline.yaml:6: models.one.max_batch_size: 4 -> 5"],
            },
        ),
        (
            "    entry_point: nets:Net\n",
            "    entry_point: nets:Net\n    kwargs: {width: 5}\n    seed: 3\n",
            {
                "check": ["pipeline.yaml declares something else"],
                "trace:one/1": [
                    "pipeline.yaml:6: models.one.kwargs.width: nothing -> 5",
                    "pipeline.yaml:7: models.one.seed: 0 -> 3",
                ],
                "config:one": [],
            },
        ),
        (
            "  two:\n    entry_point: torch.nn:ReLU\n",
            "  two:\n    entry_point: torch.nn:ReLU\n    versions:\n      1: {entry_point: 'torch.nn:GELU'}\n",
            {
                "check": ["pipeline.yaml declares something else"],
                "trace:two/1": ["pipeline.yaml:13: models.two.versions.1.entry_point: torch.nn:ReLU -> torch.nn:GELU"],
                "config:two": [],
            },
        ),
        (
            '"26.07"',
            '"26.06"',
            {
                "check": ["pipeline.yaml declares something else"],
                "trace:one/1": ["pipeline.yaml:1: triton: 26.07 -> 26.06"],
                "trace:two/1": ["pipeline.yaml:1: triton: 26.07 -> 26.06"],
                "config:one": [],
                "config:two": [],
            },
        ),
    ],
    ids=["max_batch_size", "added keys", "a version's own", "triton"],
)
def test_a_difference_in_the_declaration_has_its_place(
    built: Project, before: str, after: str, expected: dict[str, list[str]]
) -> None:
    assert before in YAML
    built.write({"pipeline.yaml": YAML.replace(before, after, 1)})
    found = json.loads(built.doit("plan", "--json", *BUILD).out)
    built.write({"pipeline.yaml": YAML})
    assert {step["task"]: step["reasons"] for step in found["tasks"]} == expected
    assert found["run"] + found["may_run"] == len(expected)
    assert found["up_to_date"] == 6 - len(expected)
    assert {step["action"] for step in found["tasks"] if not step["reasons"]} <= {"may_run"}


def test_targets(built: Project) -> None:
    config, model = built.root / "models/one/config.pbtxt", built.root / "models/one/1/model.pt"
    config.write_text(config.read_text() + "# mine\n")
    model.unlink()
    assert plan(built).out == (
        "trace:one/1  fetch\n"
        "    models/one/1/model.pt is missing\n"
        "config:one  run\n"
        "    models/one/config.pbtxt was changed by hand\n"
        "1 would run, 1 fetched, 0 may follow, 4 up to date\n"
    )
    ran = built.doit(*BUILD)
    assert ran.tasks == ["trace:one/1", "config:one"]
    assert "from the store" in ran.out


def test_a_file_that_is_not_ours_is_seen_wherever_it_lies(built: Project) -> None:
    stranger = built.root / "models/one/1/libtriton_pytorch.so"
    stranger.write_text("Triton would load this in the place of its own")
    assert plan(built).out.endswith("1 would run, 0 fetched, 0 may follow, 5 up to date\n")
    ran = built.doit(*BUILD)
    stranger.unlink()
    assert (ran.code, ran.tasks) == (1, ["repository"])
    assert ran.out.endswith(
        "!! models/one/1/libtriton_pytorch.so: not written by tritonbuild\n"
        "    models/ is generated, and Triton serves what it finds there: move it away\n"
        "   0 done, 5 up to date, 1 failed (repository)\n"
    )
    assert built.doit(*BUILD).tasks == ["repository"]
    assert plan(built).out.endswith("6 up to date\n")


def test_a_stored_result_that_lacks_a_file_is_none(built: Project) -> None:
    for path in (built.root / ".build/store/results").glob("*/*.json"):
        path.write_text(re.sub(r'"proof.json":{[^}]*},', "", path.read_text()))
    assert built.doit("forget", "trace:two/1").code == 0
    assert plan(built).out.startswith("trace:two/1  run\n    never finished here, or forgotten\n")
    ran = built.doit(*BUILD)
    assert (ran.code, ran.tasks) == (0, ["trace:two/1"])
    assert "from the store" not in ran.out


def test_a_failed_task_says_why(built: Project) -> None:
    built.write({"nets.py": NETS.replace("class Net", "class Other")})
    assert built.doit(*BUILD).code == 1
    assert (
        plan(built, "trace").out
        == (
            "trace:one/1  run\n"
            '    failed the last time: trace one/1: entry point nets:Net: nets.py has no attribute "Net"\n'
            "1 would run, 0 fetched, 0 may follow, 1 up to date\n"
        )
        or "failed the last time: trace one/1: " in plan(built, "trace").out
    )
    built.write({"nets.py": NETS})
    assert built.doit(*BUILD).code == 0


def test_why(built: Project) -> None:
    assert built.doit("why").code == 3
    ran = built.doit("why", "trace:one/1", "config:one")
    assert re.fullmatch(
        r"trace:one/1  up to date\n"
        r"    layers\.py  [0-9a-f]{12}\n"
        r"    nets\.py  [0-9a-f]{12}\n"
        r"    torch  \S+\n"
        r"    declaration: entry_point, kwargs, .*\n"
        r"    recipe: [0-9a-f]{16}\n"
        r"    files: layers\.py, nets\.py\n"
        r"    distributions: torch\n"
        r"config:one  up to date\n"
        r"    declaration: .*\n"
        r"    recipe: [0-9a-f]{16}\n",
        ran.out,
    ), ran.out
    assert built.doit("why", "trace:three/1").out.startswith("ERROR: ")


def test_plan_and_why_import_neither_torch_nor_numpy(built: Project, tmp_path: Path) -> None:
    project = Project(tmp_path).write({"dodo.py": DODO, "nets.py": NETS, "layers.py": LAYERS, "pipeline.yaml": YAML})
    for arguments in (["plan", *BUILD], ["why", "trace:one/1"], ["gc"]):
        ran = project.doit(*arguments, PYTHONPROFILEIMPORTTIME="1")
        assert ran.code == 0
        imported = {line.rpartition("|")[2].strip() for line in ran.out.splitlines() if line.startswith("import time:")}
        assert "tritonbuild.plan" in imported
        assert not imported & {"torch", "numpy", "tritonclient", "tritonbuild.trace"}
    assert not (project.root / "models").exists()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (999_499, "999 kB"), (999_500, "1 MB"), (10**12, "1 TB")],
)
def test_sizes(count: int, text: str) -> None:
    assert commands._size(count) == text


def test_gc_keeps_what_is_in_use(built: Project) -> None:
    text = YAML.replace("max_batch_size: 4", "max_batch_size: 3")
    built.write({"pipeline.yaml": text})
    assert built.doit(*BUILD).code == 0
    ran = built.doit("gc", "--limit", "0")
    assert re.fullmatch(r"[1-9]\d* results removed, [\d.]+ kB freed; [\d.]+ kB stay in \.build/store\n", ran.out), (
        ran.out
    )
    assert built.doit("gc", "--limit", "0").out.startswith("0 results removed, 0 bytes freed; ")
    for model in ("one", "two"):
        (built.root / f"models/{model}/1/model.pt").unlink()
    ran = built.doit(*BUILD)
    assert ran.out.count(": from the store, made in ") == 2
    assert built.doit("gc", "--limit", "some").out == (
        'ERROR: --limit: found "some", expected a size such as 500M or 5G\n'
    )
    built.write({"pipeline.yaml": YAML})
    assert built.doit(*BUILD).code == 0
