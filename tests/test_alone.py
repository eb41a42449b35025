"""The test files that need a process of their own (see ALONE in conftest.py)."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ALONE, ROOT


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("name", ALONE)
def test_it_passes_in_a_process_of_its_own(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{name}"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-20_000:] + ran.stderr[-2_000:]
    assert " passed" in ran.stdout
