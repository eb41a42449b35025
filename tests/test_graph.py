"""What runs after which edit, and what a doit with nothing to do may import."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from conftest import ROOT, Project

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PIPELINE = """\
triton: "26.07"
models:
  one:
    entry_point: nets.first:First
    kwargs: {width: 3}
    max_batch_size: 5
    inputs:
      x: {dtype: float32, shape: [batch, 4]}
    outputs: [y]
  two:
    entry_point: nets.second:Second
    max_batch_size: 4
    weights: {path: two.safetensors}
    inputs:
      x: {dtype: float32, shape: [batch, 4]}
    versions:
      1: {}
      3: {seed: 7}
  three:
    entry_point: torch.nn:Softmax
    kwargs: {dim: -1}
    max_batch_size: 4
    inputs:
      x: {dtype: float32, shape: [batch, 4]}
"""
FILES = {
    "pipeline.yaml": PIPELINE,
    "nets/__init__.py": "",
    "nets/layers.py": (
        "import torch\n\n\ndef layer(width: int) -> torch.nn.Module:\n    return torch.nn.Linear(4, width)\n"
    ),
    "nets/first.py": (
        "import torch\n\nfrom nets.layers import layer\n\n\nclass First(torch.nn.Sequential):\n"
        "    def __init__(self, width: int) -> None:\n        super().__init__(layer(width), torch.nn.ReLU())\n"
    ),
    "nets/second.py": (
        "import torch\n\nfrom nets.layers import layer\n\n\nclass Second(torch.nn.Sequential):\n"
        "    def __init__(self) -> None:\n        super().__init__(layer(2))\n"
    ),
    "make_weights.py": (
        "import sys\n\nimport torch\nfrom safetensors.torch import save_file\n\n"
        "save_file({'0.weight': torch.full((2, 4), float(sys.argv[1])), '0.bias': torch.zeros(2)}, 'two.safetensors')\n"
    ),
}
ONE = ["trace:one/1", "config:one", "smoke:one/1"]
TWO = ["trace:two/1", "trace:two/3", "config:two", "smoke:two/1", "smoke:two/3"]
THREE = ["trace:three/1", "config:three", "smoke:three/1"]
EVERY = {"check", *ONE, *TWO, *THREE, "repository"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that is built and has nothing to do; tests leave it so."""
    project = Project(tmp_path_factory.mktemp("graph")).write({"dodo.py": "from tritonbuild.graph import *\n", **FILES})
    _make_weights(project, 1)
    ran = project.doit()
    assert ran.code == 0, ran.out
    assert set(ran.tasks) >= EVERY
    return project


def _make_weights(project: Project, value: float) -> None:
    subprocess.run([sys.executable, "make_weights.py", str(value)], cwd=project.root, check=True)


def _replace(name: str, old: str, new: str) -> Callable[[Project], None]:
    def edit(project: Project) -> None:
        text = (project.root / name).read_text()
        assert old in text
        project.write({name: text.replace(old, new)})

    return edit


def _append(name: str, text: str) -> Callable[[Project], None]:
    def edit(project: Project) -> None:
        project.write({name: (project.root / name).read_text() + text})

    return edit


def _delete(name: str) -> Callable[[Project], None]:
    return lambda project: (project.root / name).unlink()


NEW_MODEL = """\
  four:
    entry_point: torch.nn:Tanh
    inputs:
      x: {dtype: float32, shape: [4]}
"""


# Each edit stands on the ones before it. "smoke" of an edit that leaves model.pt, config and cases alone must not run.
EDITS: list[tuple[str, Callable[[Project], None], set[str]]] = [
    ("nothing", lambda project: None, set()),
    ("a comment in pipeline.yaml", _append("pipeline.yaml", "# a comment\n"), set()),
    (
        "max_batch_size of one model",
        _replace("pipeline.yaml", "max_batch_size: 5", "max_batch_size: 6"),
        {"check", *ONE},
    ),
    ("kwargs of one model", _replace("pipeline.yaml", "width: 3", "width: 5"), {"check", *ONE}),
    (
        "a comment in a module that two models import",
        _append("nets/layers.py", "# a comment\n"),
        {"trace:one/1", "trace:two/1", "trace:two/3"},
    ),
    (
        "a line in a module that two models import",
        _replace("nets/layers.py", "Linear(4, width)", "Linear(4, width).double().float()"),
        {"trace:one/1", "trace:two/1", "trace:two/3"},
    ),
    (
        "a layer in a module of one model",
        _replace("nets/first.py", "torch.nn.ReLU", "torch.nn.Tanh"),
        {"trace:one/1", "smoke:one/1"},
    ),
    (
        "a weights file",
        lambda project: _make_weights(project, 2),
        {"trace:two/1", "trace:two/3", "smoke:two/1", "smoke:two/3"},
    ),
    ("a touched weights file", lambda project: (project.root / "two.safetensors").touch(), set()),
    (
        "a model added",
        _append("pipeline.yaml", NEW_MODEL),
        {"check", "trace:four/1", "config:four", "repository", "smoke:four/1"},
    ),
    ("a model removed", _replace("pipeline.yaml", NEW_MODEL, ""), {"check", "repository"}),
    (
        "a version removed",
        _replace("pipeline.yaml", "      3: {seed: 7}\n", ""),
        {"check", "config:two", "repository", "smoke:two/1"},
    ),
    ("a hand-edited config.pbtxt", _append("models/one/config.pbtxt", "# mine\n"), {"config:one"}),
    ("a deleted model.pt", _delete("models/three/1/model.pt"), {"trace:three/1"}),
    (
        "a config field",
        _replace("pipeline.yaml", "    outputs: [y]\n", "    outputs: [y]\n    config: {dynamic_batching: {}}\n"),
        {"check", "config:one", "smoke:one/1"},
    ),
    ("a deleted proof", _delete(".build/proof/three/1.json"), {"trace:three/1"}),
]


@pytest.mark.slow
def test_each_edit_runs_exactly_its_tasks(built: Project) -> None:
    wrong = []
    for what, edit, expected in EDITS:
        edit(built)
        ran = built.doit()
        if ran.code or set(ran.tasks) != expected:
            wrong.append(f"{what}: exit {ran.code}, ran {sorted(ran.tasks)}, expected {sorted(expected)}\n{ran.out}")
    assert not wrong, "\n\n".join(wrong)
    assert built.doit().tasks == []
    assert sorted(path.name for path in (built.root / "models").iterdir()) == ["one", "three", "two"]
    assert sorted(path.name for path in (built.root / "models/two").iterdir()) == [".tritonbuild", "1", "config.pbtxt"]


def test_a_failed_task_fixed_runs_what_waited_for_it(project: Callable[[dict[str, str]], Project]) -> None:
    made = project({**FILES, "nets/first.py": "raise RuntimeError('not yet')\n"})
    _make_weights(made, 1)
    failed = made.doit("trace:one/1", "trace:three/1")
    assert failed.code == 1
    assert "trace one/1" in failed.out
    assert "Traceback" not in failed.out
    assert not (made.root / "models/one/1").exists()

    made.write({"nets/first.py": FILES["nets/first.py"]})
    fixed = made.doit("trace:one/1", "trace:three/1")
    assert (fixed.code, fixed.tasks, fixed.up_to_date) == (0, ["trace:one/1"], ["trace:three/1"])


def test_a_doit_with_nothing_to_do_imports_nothing_heavy(built: Project) -> None:
    code = (
        "import sys\nfrom doit.doit_cmd import DoitMain\ncode = DoitMain().run([])\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}))\nsys.exit(code)\n"
    )
    built.doit()
    ran = subprocess.run([sys.executable, "-c", code], cwd=built.root, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "\n.  " not in ran.stdout
    imported = set(ran.stdout.splitlines()[-1].strip("[]").replace("'", "").split(", "))
    assert not imported & {"torch", "numpy", "tritonclient", "torchvision", "safetensors", "google", "rich", "fsspec"}


def test_removed_and_added_tasks_of_one_model_only(built: Project) -> None:
    built.doit()
    listed = built.doit("list", "--all", "--quiet")
    names = listed.out.split()
    assert "smoke:one/1" in names
    info = built.doit("info", "config:one")
    assert "models/one/config.pbtxt" in info.out
    assert info.code == 0


def test_clean_removes_targets_and_forget_runs_again(project: Callable[[dict[str, str]], Project]) -> None:
    made = project({"pipeline.yaml": 'triton: "26.07"\nmodels:\n' + NEW_MODEL})
    assert made.doit().code == 0
    assert made.doit("forget", "trace:four/1").code == 0
    assert made.doit().tasks == ["trace:four/1"]
    cleaned = made.doit("clean")
    assert cleaned.code == 0
    assert not (made.root / "models/four").exists()
    assert not (made.root / ".build/cases/four").exists()
    assert set(made.doit().tasks) >= {"trace:four/1", "config:four", "smoke:four/1"}


def test_two_processes_of_doit_build_the_same(built: Project, project: Callable[[dict[str, str]], Project]) -> None:
    made = project(FILES)
    _make_weights(made, 2)
    parallel = made.doit("-n", "2")
    assert parallel.code == 0, parallel.out
    assert set(parallel.tasks) >= EVERY
    assert made.doit("-n", "2").tasks == []


def test_names_that_are_not_utf_8_and_a_terminal_without_their_letters(
    project: Callable[[dict[str, str]], Project],
) -> None:
    name = os.fsdecode(b"gr\xf6\xdfe")
    net = f"import torch\nopen({name!r})\nGröße = torch.nn.Tanh\n"
    made = project({"pipeline.yaml": 'triton: "26.07"\nmodels:\n' + NEW_MODEL.replace("torch.nn:Tanh", "nets:Größe")})
    made.write({"nets.py": net.replace("Größe", "Länge"), name: ""})
    failed = made.doit("trace", PYTHONIOENCODING="ascii")
    assert failed.out == (
        ".  trace:four/1\n"
        '!! trace four/1: entry point "nets:Gr\\xf6\\xdfe": nets has no "Gr\\xf6\\xdfe"\n'
        "    its file is nets.py\n"
        "   0 done, 0 up to date, 1 failed (trace:four/1)\n"
    )
    made.write({"nets.py": net})
    assert made.doit("trace", PYTHONIOENCODING="ascii").tasks == ["trace:four/1"]
    assert made.doit("trace").up_to_date == ["trace:four/1"]
    assert "    gr\\udcf6\\udcdfe  e3b0c44298fc\n" in made.doit("why", "trace:four/1").out
    made.write({name: "changed"})
    assert made.doit("trace").tasks == ["trace:four/1"]


def test_a_task_of_the_user_makes_the_weights_first_however_their_path_is_spelt(
    project: Callable[[dict[str, str]], Project],
) -> None:
    model = "torch.nn:Linear\n    kwargs: {in_features: 4, out_features: 1}\n    weights: {path: .//made/w.pt}"
    dodo = (
        "import sys\nfrom tritonbuild.graph import *\n\ndef task_weights():\n    return {"
        "'actions': ['mkdir -p made', [sys.executable, 'make.py']], 'targets': ['made/w.pt']}\n"
    )
    make = "import torch\ntorch.save(torch.nn.Linear(4, 1).state_dict(), 'made/w.pt')\n"
    text = 'triton: "26.07"\nmodels:\n' + NEW_MODEL.replace("torch.nn:Tanh", model)
    ran = project({"dodo.py": dodo, "make.py": make, "pipeline.yaml": text}).doit("trace")
    assert (ran.code, ran.tasks) == (0, ["weights", "trace:four/1"]), ran.out


def test_another_declaration_lies_beside_dodo_py(project: Callable[[dict[str, str]], Project]) -> None:
    yaml = 'triton: "26.07"\nmodels:\n' + NEW_MODEL
    made = project({"other.yaml": yaml, "folder/other.yaml": yaml})
    said = "   other.yaml: 1 model, 1 version, for Triton 26.07\n"
    for path in ("other.yaml", "./other.yaml", str(made.root / "other.yaml")):
        assert said in made.doit("-a", f"pipeline={path}", "check").out
    ran = made.doit("pipeline=folder/other.yaml")
    assert ran.code == 3
    assert ran.out == (
        "ERROR: pipeline=folder/other.yaml: found a file in another folder, expected one beside dodo.py\n"
        "    what is built lies beside the two: put a dodo.py there, and run doit there\n"
    )


def test_schema_is_current() -> None:
    from tritonbuild import schema

    assert (ROOT / "docs/pipeline.schema.json").read_text() == schema.text()


def test_graph_loads_without_torch(tmp_path: Path) -> None:
    code = "import sys, tritonbuild.graph\nassert not {'torch', 'numpy', 'tritonclient', 'google'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_a_trace_that_passed_says_what_was_not_looked_at(tmp_path: Path) -> None:
    """Once when it is made, and again when it comes from the store."""
    pipeline = """\
triton: "26.07"
models:
  long:
    entry_point: torch.nn:Softmax
    kwargs: {dim: -1}
    max_batch_size: 2
    axes: {t: {example: 4, min: 1, max: 1000000000000}}
    inputs:
      x: {dtype: float32, shape: [batch, t]}
"""
    project = Project(tmp_path).write({"dodo.py": "from tritonbuild.graph import *\n", "pipeline.yaml": pipeline})
    said = (
        "   trace long/1 passed, but: case batch=2 t=1000000000000 draw=plain seed=102 was left out: "
        "it may not fit into memory (and 6 more, in .build/proof/long/1.json)\n"
    )
    ran = project.doit("trace")
    assert said in ran.out
    (tmp_path / ".build/proof/long/1.json").unlink()
    again = project.doit("trace")
    assert "trace long/1: from the store" in again.out
    assert said in again.out
