"""Projects to test with: a folder with a pipeline.yaml, and doit run in it as a person would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tritonbuild import compose, docker

if TYPE_CHECKING:
    from collections.abc import Callable

# A runner that starts the tests in the background has SIGINT ignored, and every program they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
CASES = Path(__file__).parent / "cases"
DODO = "from tritonbuild.graph import *\n"


ALONE = ("test_proof.py", "test_trace.py")
"""Files that need a process of their own, as each model has in a build: PyTorch keeps every class that was ever
compiled in one table, and watches differently what has run before. tests/test_alone.py runs them."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the files of ALONE to tests/test_alone.py, unless one is asked for by name."""
    if collection_path.name in ALONE and not any(collection_path.name in argument for argument in config.args):
        return True
    return None


@dataclass(frozen=True)
class Ran:
    """One finished run of doit."""

    code: int
    out: str
    """Standard output, then standard error."""

    @property
    def tasks(self) -> list[str]:
        """The tasks that ran, in order."""
        return [line[3:] for line in self.out.splitlines() if line.startswith(".  ")]

    @property
    def up_to_date(self) -> list[str]:
        """The tasks that had nothing to do."""
        return [line[3:] for line in self.out.splitlines() if line.startswith("-- ")]


@dataclass(frozen=True)
class Project:
    """A project folder of a test."""

    root: Path

    def write(self, files: dict[str, str]) -> Project:
        """Write files, relative to the project."""
        for name, text in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return self

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start doit in a process group of its own, with both of its outputs in one pipe."""
        return subprocess.Popen(
            [sys.executable, "-m", "doit", *arguments],
            cwd=self.root,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def doit(self, *arguments: str, **environment: str) -> Ran:
        """Run doit to its end."""
        with self.start(*arguments, **environment) as process:
            out, _ = process.communicate(timeout=300)
        return Ran(process.returncode, out)


@pytest.fixture
def project(tmp_path: Path) -> Callable[[dict[str, str]], Project]:
    """Make a project of the given files, with a dodo.py."""

    def make(files: dict[str, str]) -> Project:
        return Project(tmp_path / "project").write({"dodo.py": DODO, **files})

    return make


# ---------------------------------------------------------------------------------------------------- docker tests


def need(missing: str | None) -> None:
    """Skip a test for what this machine lacks. In CI, where .ci/docker has made everything, that is a failure."""
    if missing:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)


@pytest.fixture(scope="session")
def engine() -> None:
    """A Docker engine that answers."""
    need(docker.reachable())


@pytest.fixture(scope="session")
def triton_cpu(engine: None) -> str:
    """The base image with the real tritonserver, from docker/Dockerfile.cpu."""
    name = "tritonbuild-test/triton-cpu"
    need((docker.ask("image", "inspect", name).code and f"no image {name}: .ci/docker makes it") or None)
    return name


@pytest.fixture(scope="session")
def compose_tool() -> list[str]:
    """The command of the compose tool."""
    need(None if compose.compose_tool() else "neither docker compose nor docker-compose is here")
    return compose.compose_tool() or []
