"""The CI recipes of docs/ci.md, run step by step on fresh clones; installing is left out: the running Python serves."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from conftest import DODO, ROOT, Project

if TYPE_CHECKING:
    from pathlib import Path

PIPELINE = """\
triton: "26.07"
device: cpu
models:
  scale:
    entry_point: torch.nn:ReLU
    max_batch_size: 4
    inputs:
      x: {dtype: float32, shape: [batch, 4]}
    trace: {cases: 3, budget_s: 1}
"""


def recipes() -> dict[str, dict[str, Any]]:
    """Return heading -> what its YAML says."""
    text = (ROOT / "docs" / "ci.md").read_text()
    found = re.findall(r"^## (\w+.*?)\n.*?^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return {heading: yaml.safe_load(code) for heading, code in found if "store in" in heading}


def steps(recipe: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the commands of a recipe, and the folders that its cache keeps."""
    if "jobs" not in recipe:
        (job,) = recipe.values()
        return job["script"], job.get("cache", {}).get("paths", [])
    (job,) = recipe["jobs"].values()
    kept = [step["with"]["path"] for step in job["steps"] if step.get("uses", "").startswith("actions/cache@")]
    return [step["run"] for step in job["steps"] if "run" in step], kept


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a small model, whose store is where a variable of the test says."""
    folder = tmp_path_factory.mktemp("origin")
    Project(folder).write({"dodo.py": DODO, "pipeline.yaml": PIPELINE, ".gitignore": "/.build/\n/models/\n"})
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "A model"]):
        subprocess.run([*git, *arguments], cwd=folder, check=True)
    return folder


def ci(origin: Path, recipe: dict[str, Any], place: Path, store: str = "") -> tuple[str, Path]:
    """Run a recipe as its CI would: a fresh clone, the cache put back, the steps, the cache kept."""
    commands, kept = steps(recipe)
    cache, clone = place / "cache", place / "work"
    shutil.rmtree(clone, ignore_errors=True)
    subprocess.run(["git", "clone", "-q", origin, clone], check=True)
    if store:
        with (clone / "pipeline.yaml").open("a") as declaration:
            declaration.write(f"store: {store}\n")
    for path in kept:
        if (cache / path).exists():
            shutil.copytree(cache / path, clone / path)
    out = ""
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    for command in commands:
        if command.startswith("pip install "):
            assert "-c constraints.txt" in command
            continue
        command = re.sub(r"^doit\b", f"{sys.executable} -m doit", command)
        ran = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", command],
            cwd=clone,
            env={**os.environ, "PATH": path, "CI": "true", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        out += f"$ {command}\n{ran.stdout}"
        assert ran.returncode == 0, out
    for path in kept:
        shutil.rmtree(cache / path, ignore_errors=True)
        shutil.copytree(clone / path, cache / path)
    return out, clone


def test_there_are_recipes_for_both_and_for_both_stores() -> None:
    assert list(recipes()) == [
        "GitHub Actions, store in the cache",
        "GitLab, store in the cache",
        "GitHub Actions, store in a bucket",
        "GitLab, store in a bucket",
    ]
    for recipe in recipes().values():
        assert "doit" in steps(recipe)[0]


@pytest.mark.parametrize("store", ["cache", "bucket"])
def test_the_second_clone_takes_everything_from_the_store(origin: Path, tmp_path: Path, store: str) -> None:
    bucket = str(tmp_path / "bucket") if store == "bucket" else ""
    first, *others = [recipe for heading, recipe in recipes().items() if heading.endswith(store)]
    out, clone = ci(origin, first, tmp_path, bucket)
    assert "from the" not in out
    model = (clone / "models/scale/1/model.pt").read_bytes()
    for recipe in (first, *others):
        out, clone = ci(origin, recipe, tmp_path, bucket)
        shared = "shared " if bucket else ""
        assert f"   trace scale/1: from the {shared}store, made in " in out
        assert f"   smoke scale/1: from the {shared}store, made in " in out
        assert "trace:scale/1  fetch" in out
        assert (clone / "models/scale/1/model.pt").read_bytes() == model
        assert not (clone / ".build" / "log").exists()
