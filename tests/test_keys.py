"""Action keys: what counts, what does not, how a difference is named; and what makes a task run again."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from tritonbuild import actions, keys, outlines, parts, rules, serving, spec, yamlfile
from tritonbuild.state import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Project

    from tritonbuild.spec import ModelVersion

OURS = Path(actions.__file__).parent

YAML = """\
triton: "26.07"
models:
  m:
    entry_point: nets:Net
    kwargs: {width: 3, sizes: {first: 1, second: 2}}
    max_batch_size: 4
    axes:
      height: {example: 8, min: 4, max: 16}
    inputs:
      a: {dtype: float32, shape: [batch, height]}
      b: {dtype: float32, shape: [batch, 4], range: [0, 1]}
"""


def version(tmp_path: Path, text: str) -> ModelVersion:
    """Return the only version that the text declares."""
    path = tmp_path / "pipeline.yaml"
    path.write_text(text)
    return next(spec.load(path).all_versions())


def key(tmp_path: Path, text: str = YAML) -> str:
    return keys.action_key(parts.trace(version(tmp_path, text)))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("width: 3", "width: 4"),
        ("max_batch_size: 4", "max_batch_size: 5"),
        ("max: 16", "max: 17"),
        ("range: [0, 1]", "range: [0, 2]"),
        ("nets:Net", "nets:Other"),
        ('"26.07"', '"26.06"'),
        ("    inputs:", "    outputs: [y]\n    inputs:"),
        ("    inputs:", "    seed: 1\n    inputs:"),
        ("    inputs:", "    trace: {cases: 7}\n    inputs:"),
        ("    inputs:", "    weights: {path: w.pt}\n    inputs:"),
    ],
)
def test_what_the_trace_depends_on_changes_its_key(tmp_path: Path, before: str, after: str) -> None:
    assert before in YAML
    assert key(tmp_path) != key(tmp_path, YAML.replace(before, after))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("  m:", "  # a comment\n  m:"),
        ("  m:", "  another_name:"),
        ("width: 3", "width:     3"),
        ("    inputs:", "    versions: {7: {}}\n    inputs:"),
        ("    inputs:", "    config: {dynamic_batching: {}}\n    inputs:"),
        ('"26.07"', '"26.07"\nstore: s3://elsewhere'),
        ('"26.07"', '"26.07"\nimage: {name: other}'),
        ('"26.07"', '"26.07"\ndevice: cpu'),
    ],
)
def test_what_the_trace_does_not_depend_on_leaves_its_key(
    tmp_path: Path, before: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "device_kind", lambda: "cpu")
    assert before in YAML
    assert key(tmp_path) == key(tmp_path, YAML.replace(before, after))


def test_the_order_of_inputs_counts_because_they_bind_by_order(tmp_path: Path) -> None:
    first, second = YAML.splitlines(keepends=True)[-2:]
    assert key(tmp_path) != key(tmp_path, YAML.replace(first + second, second + first))


def test_the_order_inside_kwargs_counts_because_a_model_may_walk_it(tmp_path: Path) -> None:
    assert key(tmp_path) != key(tmp_path, YAML.replace("first: 1, second: 2", "second: 2, first: 1"))


def test_the_key_is_the_same_in_every_folder_and_process(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from tritonbuild import keys, parts, spec\n"
        "version = next(spec.load(pathlib.Path(sys.argv[1])).all_versions())\n"
        "print(keys.action_key(parts.trace(version)))\n"
    )
    found = set()
    for folder in ("here", "there"):
        path = tmp_path / folder / "pipeline.yaml"
        path.parent.mkdir()
        path.write_text(YAML)
        environment = {**os.environ, "PYTHONHASHSEED": str(len(folder))}
        command = [sys.executable, "-c", program, path]
        found.add(subprocess.run(command, capture_output=True, check=True, env=environment).stdout)
    assert len(found) == 1


# ------------------------------------------------------------------------------------------------------- recipes


def _imports(module: str) -> set[str]:
    """Return our modules that this one imports, anywhere in its text."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((OURS / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "tritonbuild":
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tritonbuild."):
            found.add(node.module.removeprefix("tritonbuild."))
        elif isinstance(node, ast.Import):
            found |= {name.name.removeprefix("tritonbuild.") for name in node.names}
    return {name for name in found if (OURS / f"{name}.py").exists()}


def _reach(module: str) -> set[str]:
    reached, left = set(), {module}
    while left:
        name = left.pop()
        reached.add(name)
        left |= _imports(name) - reached
    return {f"{name}.py" for name in reached}


# Texts of errors, and the reading of pipeline.yaml, whose result is in the key.
_IN_NO_RECIPE = {"errors.py", "hazards.py", "rules.py", "spec.py", "yamlfile.py"}


@pytest.mark.parametrize(
    ("module", "recipe"),
    [
        ("trace", parts.TRACE_RECIPE),
        ("config", parts.CONFIG_RECIPE),
        ("smoke", serving._SMOKE_RECIPE),
    ],
)
def test_a_recipe_holds_every_module_that_makes_the_result(module: str, recipe: tuple[str, ...]) -> None:
    assert _reach(module) - _IN_NO_RECIPE - set(recipe) == set()
    assert [name for name in recipe if not (OURS / name).exists()] == []


def test_what_is_remembered_as_valid_is_so_for_the_code_that_found_it_valid() -> None:
    decides = {Path(path).name for path in (spec.__file__, yamlfile.__file__, rules.__file__, *rules.TABLES)}
    assert decides == _reach("spec") - {"errors.py"}


# ------------------------------------------------------------------------------------------------- up to date or not


class _Task:
    """What an up-to-date check sees of doit's task."""

    def __init__(self, name: str, values: dict[str, Any]) -> None:
        self.name = name
        self.values = values
        self.value_savers: list[Callable[[], dict[str, Any]]] = []


class Checked:
    """A task with one target, checked and finished as doit does it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.parts: dict[str, Any] = {"declaration": {"seed": 0}}
        self.memory = State(str(root / ".build" / "state.sqlite"))
        self.values: dict[str, Any] = {}
        (root / "net.py").write_text("x = 1\n")
        (root / "target").write_text("made")

    def check(self, same_while: str | None = None) -> keys.UpToDate:
        return keys.UpToDate(self.root, lambda: self.parts, ["target"], same_while)

    def finish(self, found: dict[str, Any], same_while: str | None = None) -> None:
        task = _Task("t", found)
        self.check(same_while)(task, self.values)  # type: ignore[arg-type]
        for saver in task.value_savers:
            task.values.update(saver())
        self.memory.set("t", "_values_:", task.values)
        self.memory.set("t", "deps:", ())
        self.values = self.memory.get("t", "_values_:")

    def reasons(self, same_while: str | None = None) -> list[str]:
        return [reason.text for reason in self.check(same_while).reasons("t", self.values)]


@pytest.fixture
def checked(tmp_path: Path) -> Checked:
    return Checked(tmp_path)


def test_a_task_that_never_finished_must_run(checked: Checked) -> None:
    assert checked.reasons() == ["never finished here, or forgotten"]


def test_a_finished_task_names_what_differs(checked: Checked) -> None:
    checked.finish({"files": ["net.py"], "distributions": ["torch"], "stamps": {}})
    assert checked.reasons() == []
    checked.parts = {"declaration": {"seed": 1, "kwargs": {"width": 3}}}
    assert checked.reasons() == ["declaration: seed: 0 -> 1", 'declaration: kwargs: nothing -> {"width": 3}']
    checked.parts = {"declaration": {"seed": 0}}
    (checked.root / "net.py").write_text("x = 2\n")
    before, after = (keys.action_key(text) for text in ("x = 1\n", "x = 2\n"))  # type: ignore[arg-type]
    assert len(checked.reasons()) == 1
    assert checked.reasons()[0].startswith("files: net.py: ")
    assert before != after
    (checked.root / "net.py").unlink()
    assert checked.reasons()[0].endswith(" -> nothing")


def test_a_target_changed_by_hand_or_removed_is_made_again(checked: Checked) -> None:
    checked.finish({})
    (checked.root / "target").write_text("mine")
    assert checked.reasons() == ["target was changed by hand"]
    (checked.root / "target").unlink()
    assert checked.reasons() == ["target is missing"]


def test_another_order_of_the_same_parts_is_a_difference(checked: Checked) -> None:
    checked.parts = {"declaration": {"a": 1, "b": 2}}
    checked.finish({})
    checked.parts = {"declaration": {"b": 2, "a": 1}}
    assert checked.reasons() == ["the order of what is declared differs"]


def test_a_file_edited_after_the_task_read_it_runs_the_task_again(checked: Checked) -> None:
    stamp = keys.stamp(checked.root / "net.py")
    (checked.root / "net.py").write_text("x = 2\n")
    checked.finish({"files": ["net.py"], "stamps": {"net.py": stamp}})
    assert checked.reasons()[0].startswith("files: net.py: edited while the task ran -> ")


def test_a_file_from_the_future_is_not_taken_for_edited(checked: Checked) -> None:
    later = time.time() + 86400
    os.utime(checked.root / "net.py", (later, later))
    checked.finish({"files": ["net.py"], "stamps": {"net.py": keys.stamp(checked.root / "net.py")}})
    assert checked.reasons() == []


def test_parts_are_not_made_while_all_they_are_made_from_is_the_same(checked: Checked) -> None:
    checked.finish({}, "same")
    checked.parts = {"declaration": {"seed": "not looked at"}}
    assert checked.reasons("same") == []
    assert checked.reasons("other") == ["declaration: seed: 0 -> not looked at"]
    checked.parts = {"declaration": {"seed": 0}}
    assert checked.reasons("other") == []
    checked.parts = {"declaration": {"seed": "not looked at"}}
    assert checked.reasons("other") == []  # it was refreshed


def test_a_dependency_edited_while_its_task_ran_is_not_taken_for_read(tmp_path: Path) -> None:
    memory = State(str(tmp_path / ".build" / "state.sqlite"))
    labels = tmp_path / "labels.txt"
    labels.write_text("cat\n")
    checker = keys.FileChecker()
    before = checker.info(str(labels))
    memory.files.something_runs()
    labels.write_text("dog\n")
    remembered = checker.get_state(str(labels), None)
    assert remembered == "edited while the task ran"
    now = keys.FileChecker().info(str(labels))
    assert checker.check_modified(str(labels), now, remembered)
    assert now != before


# ---------------------------------------------------------------------------------------- what a child is seen to read


def test_first_party_modules_are_recorded_wherever_they_lie(project: Callable[..., Project]) -> None:
    made = project(
        {
            "pipeline.yaml": (
                'triton: "26.07"\nmodels:\n  m:\n    entry_point: nets:Net\n    inputs:\n'
                "      x: {dtype: float32, shape: [4]}\n    trace: {cases: 2, budget_s: 1}\n"
            ),
            "src/nets.py": (
                "import json, os, pathlib\nimport safetensors.torch\nimport torch\nfrom models.layer import Layer\n"
                "HERE = pathlib.Path(__file__).parent\nSIZE = json.loads((HERE / 'data' / 'size.json').read_text())\n"
                "safetensors.torch.load_file(HERE / 'data' / 'scale.safetensors')\n"
                "FACTOR = float((HERE / 'data' / 'factor').read_text())\n"
                "try:\n    SIZE += len((HERE / 'data' / 'more').read_text())\nexcept FileNotFoundError:\n    pass\n"
                "class Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
                "        self.layer = Layer(SIZE)\n    def forward(self, x):\n        return self.layer(x)\n"
            ),
            "src/models/__init__.py": "",
            "src/models/layer.py": "import torch\nclass Layer(torch.nn.Linear):\n"
            "    def __init__(self, size):\n        super().__init__(4, size)\n",
            "src/data/size.json": "3",
        }
    )
    empty = (2).to_bytes(8, "little") + b"{}"
    (made.root / "src/data/scale.safetensors").write_bytes(empty)
    made.write({"../elsewhere/factor": "2"})
    (made.root / "src/data/factor").symlink_to(made.root.parent / "elsewhere" / "factor")
    ran = made.doit("trace")
    assert ran.code == 0, ran.out
    for path, content in [
        (
            "src/models/layer.py",
            "import torch\nclass Layer(torch.nn.Linear):\n    pass\nLayer = lambda n: torch.nn.Linear(4, n)\n",
        ),
        ("src/data/size.json", "5"),
        ("src/data/scale.safetensors", (8).to_bytes(8, "little").decode() + "{}      "),
        ("src/data/more", "found"),
        ("../elsewhere/factor", "3"),
    ]:
        made.write({path: content})
        assert made.doit("trace").tasks == ["trace:m/1"], path
        assert made.doit("trace").up_to_date == ["trace:m/1"], path


def test_modules_beside_the_project_count_by_content(project: Callable[..., Project]) -> None:
    """Those of a package that is installed to be edited, or of a folder on PYTHONPATH; others find the result, too."""
    yaml = (
        'triton: "26.07"\ndevice: cpu\nstore: ../shared\nmodels:\n  m:\n    entry_point: common.nets:net\n'
        "    inputs:\n      x: {dtype: float32, shape: [4]}\n    trace: {cases: 2, budget_s: 1}\n"
    )
    net = "import torch\nfrom common.sizes import SIZE\ndef net():\n    return torch.nn.Linear(4, SIZE)\n"
    made = project({"pipeline.yaml": yaml, "../lib/common/nets.py": net, "../lib/common/sizes.py": "SIZE = 3\n"})
    path = os.pathsep.join([str(made.root.parent / "lib"), *filter(None, [os.environ.get("PYTHONPATH")])])
    assert made.doit("trace", PYTHONPATH=path).tasks == ["trace:m/1"]
    assert made.doit("trace", PYTHONPATH=path).up_to_date == ["trace:m/1"]
    made.write({"../lib/common/sizes.py": "SIZE = 5\n"})
    why = made.doit("why", "trace:m/1", PYTHONPATH=path).out
    assert why.endswith(" s\n    ../lib/common/sizes.py: the statements outside of functions\n"), why
    assert made.doit("trace", PYTHONPATH=path).tasks == ["trace:m/1"]
    assert made.doit("trace", PYTHONPATH=path).up_to_date == ["trace:m/1"]

    clone = project({"../clone/pipeline.yaml": yaml, "../clone/dodo.py": "from tritonbuild.graph import *\n"})
    clone = type(clone)(made.root.parent / "clone")
    assert "   trace m/1: from the shared store, made in " in clone.doit("trace", PYTHONPATH=path).out


def test_files_of_the_project_count_also_where_generated_ones_lie(project: Callable[..., Project]) -> None:
    yaml = (
        'triton: "26.07"\ndevice: cpu\nmodels:\n  m:\n    entry_point: models.nets:Net\n'
        "    weights: {path: venv/w.safetensors}\n    inputs:\n      x: {dtype: float32, shape: [4]}\n"
        "    trace: {cases: 2, budget_s: 1}\n"
    )
    net = (
        "import pathlib\nimport torch\nclass Net(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.scale = torch.nn.Parameter(torch.ones(1))\n"
        "        self.shift = float(pathlib.Path('models/shift').read_text())\n"
        "    def forward(self, x):\n        return x * self.scale + self.shift\n"
    )
    made = project({"pipeline.yaml": yaml, "models/nets.py": net, "models/shift": "1", "venv/README": ""})

    def write_weights(value: float) -> None:
        save_file({"scale": torch.full((1,), value)}, made.root / "venv/w.safetensors")

    write_weights(1.0)
    assert made.doit("trace").code == 0
    for what, edit in {
        "declared weights": lambda: write_weights(2.0),
        "a module": lambda: made.write({"models/nets.py": net.replace("x * self.scale", "x / self.scale")}),
        "a file that it opens": lambda: made.write({"models/shift": "2"}),
    }.items():
        edit()
        ran = made.doit("trace")
        assert (ran.tasks, "from the store" in ran.out) == (["trace:m/1"], False), what
        assert made.doit("trace").up_to_date == ["trace:m/1"], what


# --------------------------------------------------------------------------------------------------------- outlines


SOURCE = '''\
"""A module."""
import torch

class Net(torch.nn.Module):
    """A network."""

    def __init__(self, width=3):
        super().__init__()

    def forward(self, x):
        # nothing
        return x

def build():
    return Net()
'''


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("# nothing", "# something else", "comments, docstrings or formatting only"),
        ('"""A network."""', '"""A neural network."""', "comments, docstrings or formatting only"),
        ("return x", "return x + 1", "Net.forward"),
        ("width=3", "width=4", "Net.__init__"),
        ("torch.nn.Module", "torch.nn.Identity", "Net"),
        ("import torch", "import torch, math", "the statements outside of functions"),
        ("def build", "def make", "build, make"),
        ("def build", "def build(", None),
        ("return x", "return " + "x + " * 1500 + "x", None),
    ],
)
def test_the_functions_that_changed_are_named(tmp_path: Path, before: str, after: str, words: str | None) -> None:
    path = tmp_path / "net.py"
    path.write_text(SOURCE)
    State(str(tmp_path / ".build" / "state.sqlite"))
    digests = [keys.file_digests(tmp_path, ["net.py"])["net.py"]]
    outlines.keep(tmp_path, {"net.py": digests[0]})
    assert before in SOURCE
    path.write_text(SOURCE.replace(before, after))
    digests.append(keys.file_digests(tmp_path, ["net.py"])["net.py"])
    assert outlines.changed(tmp_path, "net.py", *digests) == words
