"""doit is killed at random moments of cold builds, edits and store writes; what is on the disk is right all the same.

`TRITONBUILD_KILLS=200 pytest tests/test_chaos.py` kills that often. A seed fixes the moments; which line of code they
hit depends on the machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from conftest import DODO, Project

from tritonbuild.results import parse_result

if TYPE_CHECKING:
    from pathlib import Path

KILLS = int(os.environ.get("TRITONBUILD_KILLS", "6"))
SEED = int(os.environ.get("TRITONBUILD_SEED", "7"))
BUILD = ("check", "trace", "config", "repository")

NETS = """\
import torch


class Net(torch.nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.layer = torch.nn.Linear(4, width)

    def forward(self, x):
        return self.layer(x) * FACTOR


FACTOR = 1.0
"""
YAML = """\
triton: "26.07"
device: cpu
store: ../shared
models:
  one: &one
    entry_point: nets:Net
    max_batch_size: 4
    inputs:
      x: {dtype: float32, shape: [batch, 4]}
    trace: {cases: 2, budget_s: 1}
  two:
    <<: *one
    kwargs: {width: 5}
    versions: {1: {}, 2: {seed: 1}}
  three:
    entry_point: torch.nn:ReLU
    inputs:
      x: {dtype: float32, shape: [4]}
    trace: {cases: 2, budget_s: 1}
"""

# Each is one state of the project's sources; the chaos goes from any to any other.
VARIANTS: list[dict[str, str]] = [
    {"nets.py": NETS, "pipeline.yaml": YAML},
    {"nets.py": NETS.replace("1.0", "2.0"), "pipeline.yaml": YAML},
    {"nets.py": NETS + "# a comment\n", "pipeline.yaml": YAML.replace("max_batch_size: 4", "max_batch_size: 5")},
    {"nets.py": NETS, "pipeline.yaml": YAML.replace("    versions: {1: {}, 2: {seed: 1}}\n", "")},
]


def files(folder: Path) -> dict[str, str]:
    """Return path -> digest of what Triton would read."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".tritonbuild") for part in path.relative_to(folder).parts)
    }


class Chaos:
    """A project, what it must become in each variant, and what may lie about after a kill."""

    def __init__(self, root: Path) -> None:
        self.random = random.Random(SEED)
        self.project = Project(root / "project").write({"dodo.py": DODO, **VARIANTS[0]})
        self.shared = root / "shared"
        self.wanted = []
        self.seconds = 0.0
        reference = Project(root / "reference").write({"dodo.py": DODO})
        for variant in VARIANTS:
            started = time.monotonic()
            ran = reference.write(variant).doit(*BUILD, TRITONBUILD_STORE="off")
            self.seconds = max(self.seconds, time.monotonic() - started)
            assert ran.code == 0, ran.out
            self.wanted.append(files(reference.root / "models"))
        self.known = {path: {wanted.get(path) for wanted in self.wanted} for wanted in self.wanted for path in wanted}
        self.kills = 0
        self.variant = 0

    def edit(self) -> str:
        """Change something; return what."""
        what = self.random.choice(["variant", "variant", "cold", "no state", "target", "blob"])
        root = self.project.root
        if what == "variant":
            self.variant = self.random.randrange(len(VARIANTS))
            self.project.write(VARIANTS[self.variant])
        elif what == "cold":
            for folder in (root / ".build", root / "models", self.shared):
                shutil.rmtree(folder, ignore_errors=True)
        elif what == "no state":
            (root / ".build" / "state.sqlite").unlink(missing_ok=True)
        else:
            pattern = "models/*/*/model.pt" if what == "target" else ".build/store/blobs/*/*"
            found = sorted(root.glob(pattern))
            if found:
                path = self.random.choice(found)
                path.chmod(0o644)
                path.write_bytes(path.read_bytes()[:-1] + b"?")
        return what

    def killed_run(self) -> set[str]:
        """Start doit, kill it, and look at what it left; return the tasks that it had finished."""
        process = self.project.start(*BUILD)
        # Half of the moments are early: a run that takes its results from the store is over soon.
        time.sleep(self.random.uniform(0.05, self.random.choice([0.2, 0.4, 0.9]) * self.seconds))
        whole_group = self.random.random() < 0.5
        if process.poll() is None:
            self.kills += 1
            (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        out, _ = process.communicate(timeout=120)
        self.look()
        started = [line[3:].strip() for line in out.splitlines() if re.match(r"(\.  |-- )\w", line)]
        assert "Traceback" not in out
        return set(started[:-1]) if process.returncode else set(started)

    def look(self) -> None:
        """Hold what is on the disk after a kill to what may be there."""
        for path, digest in files(self.project.root / "models").items():
            damaged = "?" if (self.project.root / "models" / path).read_bytes().endswith(b"?") else None
            assert path in self.known, f"{path} is no file of ours"
            assert digest in self.known[path] or damaged, f"{path} is not whole"
        for store in (self.project.root / ".build" / "store", self.shared):
            for path in (store / "results").glob("*/[0-9a-f]*.json"):
                result = parse_result(path.stem, path.read_bytes())
                assert result is not None, f"{path} is half a description"
                for digest, size in result.files.values():
                    blob = store / "blobs" / digest[:2] / digest
                    if blob.exists() and store == self.shared:
                        assert hashlib.sha256(blob.read_bytes()).hexdigest() == digest, f"{blob} is not whole"
                    assert blob.exists() or store != self.shared, f"{path} came before its blob"
                    assert not blob.exists() or blob.stat().st_size == size

    def complete_run(self, finished: set[str]) -> None:
        """Let doit end, and hold its result to the reference and to what was finished before."""
        ran = self.project.doit(*BUILD)
        assert ran.code == 0, ran.out
        assert files(self.project.root / "models") == self.wanted[self.variant], ran.out
        from_store = set(re.findall(r"^   trace (\S+): from the", ran.out, re.MULTILINE))
        again = {task for task in ran.tasks if task.startswith("trace:")} & finished
        assert {task.removeprefix("trace:") for task in again} <= from_store, f"{again} was made again\n{ran.out}"


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_nothing_wrong(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path)
    runs = 0
    while chaos.kills < KILLS:
        edit = chaos.edit()
        finished: set[str] = set()
        for _ in range(chaos.random.choice([1, 2, 3])):
            runs += 1
            finished |= chaos.killed_run()
        try:
            chaos.complete_run(finished if edit == "variant" else set())
        except AssertionError as error:
            raise AssertionError(f"after {chaos.kills} kills, the last edit was: {edit}; {error}") from error
        assert chaos.project.doit(*BUILD).tasks == []
    ran = chaos.project.doit()
    assert ran.code == 0, ran.out
    assert ran.out.count("embedded") == sum(path.endswith("model.pt") for path in chaos.wanted[chaos.variant])
    print(f"{chaos.kills} kills in {runs} runs, seed {SEED}")


@pytest.mark.parametrize("free", [0, 180_000])
def test_a_full_disk_says_so_and_the_next_run_is_right(tmp_path: Path, free: int) -> None:
    """A file system of 2 MB with so many bytes left; needs the right to mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        text = YAML.replace("store: ../shared\n", "")
        project = Project(place).write({"dodo.py": DODO, "nets.py": NETS, "pipeline.yaml": text})
        with (place / "filler").open("wb", buffering=0) as filler:
            with contextlib.suppress(OSError):
                while True:
                    filler.write(b"0" * 4096)
            filler.truncate(filler.tell() - free)
        ran = project.doit(*BUILD)
        assert ran.code == (1 if free else 3), ran.out
        assert "is full" in ran.out or "o space left on device" in ran.out
        assert "Traceback" not in ran.out
        (place / "filler").unlink()
        ran = project.doit(*BUILD)
        assert ran.code == 0, ran.out
        assert project.doit(*BUILD).tasks == []
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_a_killed_run_with_several_processes_does_not_hold_the_lock(tmp_path: Path) -> None:
    project = Project(tmp_path / "project").write({"dodo.py": DODO, **VARIANTS[0]})
    process = project.start("-n", "2", *BUILD)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGKILL)
    started = time.monotonic()
    ran = project.doit(*BUILD)
    process.stdout.close()  # type: ignore[union-attr]
    process.wait()
    assert ran.code == 0, ran.out
    assert "another doit" not in ran.out or time.monotonic() - started < 20
