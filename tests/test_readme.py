"""The README's words hold: its commands run, in order, in a copy of the project, and do what it says.

Two of them are run elsewhere, for they set up an environment of their own: `.ci/run` calls the one that tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import pytest
from conftest import ROOT, Project, Ran

if TYPE_CHECKING:
    from pathlib import Path

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^\$ (.*)$", README, re.MULTILINE)
SET_UP = "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e"


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project's files without what is generated, with the running environment as its .venv."""
    root = tmp_path_factory.mktemp("readme") / "project"
    generated = shutil.ignore_patterns(".git", ".venv", ".build", "models", "weights", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, root, ignore=generated)
    (root / ".venv").symlink_to(sys.prefix)
    return Project(root)


def run(project: Project, command: str, **environment: str) -> Ran:
    assert command in COMMANDS
    program, *arguments = command.split()
    assert program == ".venv/bin/doit"
    return project.doit(*arguments, PYTHONPATH=str(project.root / "src"), OMP_NUM_THREADS="2", **environment)


def test_two_commands_set_up_all_that_they_need() -> None:
    both = [command for command in COMMANDS if "venv " in command]
    assert both == [f"{SET_UP} . && .venv/bin/doit", f"{SET_UP} '.[test]' && .venv/bin/pytest"]


@pytest.mark.slow
def test_the_commands_do_what_it_says(copy: Project) -> None:
    first = run(copy, ".venv/bin/doit", DOCKER_HOST="unix:///nowhere/docker.sock")
    assert first.code == 0, first.out
    smoked = [name.removeprefix("smoke:") for name in first.tasks if name.startswith("smoke:")]
    assert len(smoked) == 9
    results = {name: json.loads((copy.root / f".build/smoke/{name}.json").read_text()) for name in smoked}
    assert {name: (result["verdict"], result["server"]["kind"]) for name, result in results.items()} == dict.fromkeys(
        smoked, ("passed", "embedded")
    )

    copy.write({"src/zoo/tiny.py": block("python")})
    pipeline = copy.root / "pipeline.yaml"
    pipeline.write_text(pipeline.read_text().rstrip("\n") + "\n\n" + block("yaml"))
    planned = run(copy, ".venv/bin/doit plan", DOCKER_HOST="unix:///nowhere/docker.sock")
    assert (planned.code, "trace:tiny/1" in planned.out) == (0, True), planned.out
    second = run(copy, ".venv/bin/doit", DOCKER_HOST="unix:///nowhere/docker.sock")
    assert second.code == 0, second.out
    assert set(second.tasks) == {"check", "trace:tiny/1", "config:tiny", "repository", "smoke:tiny/1"}
    assert run(copy, ".venv/bin/doit why trace:tiny/1").code == 0
    listed = run(copy, ".venv/bin/doit list")
    assert (listed.code, "smoke" in listed.out) == (0, True)


@pytest.mark.docker
@pytest.mark.slow
def test_the_image_is_built_and_served(
    copy: Project, triton_cpu: str, compose_tool: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = run(copy, ".venv/bin/doit image compose", TRITON_IMAGE=triton_cpu)
    assert built.code == 0, built.out
    (command,) = [command for command in COMMANDS if command.startswith("docker compose")]
    up = [*compose_tool, *command.split()[2:]]
    monkeypatch.setenv(
        "COMPOSE_PROJECT_NAME", f"tritonbuild-test-{os.getpid()}"
    )  # not to touch who is `docker` already
    with (tmp_path / "log").open("w+") as log:
        serving = subprocess.Popen(up, cwd=copy.root, stdout=log, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + 180
            while not _ready():
                assert serving.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < end, (tmp_path / "log").read_text()
                time.sleep(1)
        finally:
            serving.terminate()
            serving.wait(60)
            subprocess.run([*up[:-1], "down", "--timeout", "5"], cwd=copy.root, check=True, capture_output=True)


def _ready() -> bool:
    try:
        with urllib.request.urlopen("http://127.0.0.1:8000/v2/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
