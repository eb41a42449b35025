"""One small project per failure: tests/cases/<name> with its whole expected output in expected.txt.

`UPDATE_CASES=1 pytest tests/test_cases.py` writes expected.txt anew; read the difference before you commit it.
"""

from __future__ import annotations

import os
import re
import shutil
from typing import TYPE_CHECKING

import pytest
from conftest import CASES, DODO, Project

if TYPE_CHECKING:
    from pathlib import Path


def steady(out: str) -> str:
    """Return the output without what depends on the speed of the machine: lines of progress, latencies."""
    lines = [line for line in out.splitlines() if not re.match("   (trace|loading|smoke) ", line)]
    return re.sub(" +[0-9.]+ ms", "  _ ms", "\n".join(lines).replace("     latency", "   latency")) + "\n"


@pytest.mark.parametrize("name", sorted(path.name for path in CASES.iterdir()))
def test_the_whole_message(name: str, tmp_path: Path) -> None:
    shutil.copytree(CASES / name, tmp_path / name)
    project = Project(tmp_path / name)
    expected = project.root / "expected.txt"
    wanted = expected.read_text() if expected.exists() else ""
    if not (project.root / "dodo.py").exists():
        project.write({"dodo.py": DODO})
    keep = {path.relative_to(project.root) for path in project.root.rglob("*")}

    ran = project.doit()

    found = f"exit {ran.code}\n{steady(ran.out)}"
    if os.environ.get("UPDATE_CASES"):
        (CASES / name / "expected.txt").write_text(found)
        wanted = found
    assert found == wanted
    assert "Traceback" not in ran.out
    # Nothing is half-written: an invalid declaration writes nothing, a failed task leaves no temporary file.
    new = {path.relative_to(project.root) for path in project.root.rglob("*") if path.is_file()} - keep
    assert not [path for path in new if "tmp" in path.parts or ".tritonbuild-" in path.as_posix()]
    assert ran.code == 1 or not [path for path in new if path.parts[0] != ".build"]
