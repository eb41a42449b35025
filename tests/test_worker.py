"""Children of the fork server: they die with their parent, whatever happens, and leave nothing half-made."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from types import ModuleType
from typing import TYPE_CHECKING

import psutil
import pytest

from tritonbuild import spec, worker
from tritonbuild.errors import TraceError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Project

PIPELINE = """\
triton: "26.07"
device: cpu
models:
  quick:
    entry_point: torch.nn:Tanh
    inputs: {x: {dtype: float32, shape: [4]}}
  slow:
    entry_point: slow:Slow
    inputs: {x: {dtype: float32, shape: [4]}}
"""
SLOW = """\
import pathlib
import time

import torch


class Slow(torch.nn.Module):
    def forward(self, x):
        pathlib.Path("started").touch()
        time.sleep(600)
        return x
"""
MARK = "TRITONBUILD_TEST_MARK"


def living(mark: str) -> list[str]:
    """Return the processes that carry the mark in their environment: doit, its fork server, children, servers."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Wait until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGKILL", "SIGTERM"])
def test_no_child_outlives_a_doit_that_is_stopped_while_tracing(
    how: str, processes: str, project: Callable[[dict[str, str]], Project]
) -> None:
    made = project({"pipeline.yaml": PIPELINE, "slow.py": SLOW})
    mark = uuid.uuid4().hex
    assert made.doit("trace:quick/1").code == 0
    process = made.start(*(["-n", processes] if processes != "1" else []), "trace", **{MARK: mark})
    wait_for((made.root / "started").exists, "the child to trace")
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGKILL if how == "SIGKILL" else signal.SIGTERM)
    out, _ = process.communicate(timeout=60)

    wait_for(lambda: not living(mark), "every process to end", 60)
    assert process.returncode != 0
    assert "Traceback" not in out
    assert not (made.root / "models/slow").exists()
    assert (made.root / "models/quick/1/model.pt").exists()
    # What was finished before is not done again; what was not is.
    made.write({"slow.py": SLOW.replace("time.sleep(600)", "pass")})
    ran = made.doit("trace")
    assert (ran.code, ran.tasks, ran.up_to_date) == (0, ["trace:slow/1"], ["trace:quick/1"]), ran.out
    assert not list((made.root / ".build/tmp").iterdir())


def version(tmp_path: Path, entry_point: str) -> spec.ModelVersion:
    path = tmp_path / "pipeline.yaml"
    path.write_text(PIPELINE.replace("slow:Slow", entry_point))
    return spec.load(path).versions["slow"][1]


def test_an_import_that_hangs_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text("import time\n\ntime.sleep(600)\n")
    (tmp_path / "out").mkdir()
    with pytest.raises(TraceError) as raised:
        worker.run(version(tmp_path, "hangs:Net"), tmp_path, tmp_path / "out", tmp_path / "log", import_limit_s=1)
    assert str(raised.value) == (
        "trace slow/1: the entry point's module was not imported within 1 s\n"
        "    does it wait for a network, a lock or an input while it is imported?"
    )


def test_what_a_child_prints_goes_to_the_log_and_what_it_reads_is_found(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "src/net").mkdir(parents=True)
    (tmp_path / "src/net/__init__.py").write_text("")
    (tmp_path / "src/net/model.py").write_text(
        "import json\nimport torch\nimport torchvision\nfrom net import parts\n\n\ndef build():\n"
        "    print('hello from the model')\n    with open('data/width.json') as file:\n"
        "        width = json.load(file)\n    return torch.nn.Linear(4, width)\n"
    )
    (tmp_path / "src/net/parts.py").write_text("")
    (tmp_path / "src/net/unused.py").write_text("")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/width.json").write_text("3")
    (tmp_path / "out").mkdir()
    found = worker.run(version(tmp_path, "net.model:build"), tmp_path, tmp_path / "out", tmp_path / "log")
    assert found.files == ("data/width.json", "src/net/__init__.py", "src/net/model.py", "src/net/parts.py")
    assert found.distributions == ("torch", "torchvision")
    assert found.device == "cpu"
    assert "hello from the model" in (tmp_path / "log").read_text()
    assert "hello" not in capfd.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "cases.safetensors",
        "model.pt",
        "proof.json",
        "signature.json",
    ]


def test_texts_that_an_encoding_lacks(project: Callable[[dict[str, str]], Project]) -> None:
    """The name of a file that is no UTF-8; and anything beyond ASCII, where that is all that the terminal has."""
    slow = "def build():\n    print('caf\\udce9')\n    open('brûlé/caf\\udce9')\n"
    made = project({"pipeline.yaml": PIPELINE.replace("slow:Slow", "slow:build"), "slow.py": slow})
    for encoding, name in (("utf-8", r"brûlé/caf\udce9"), ("ascii", r"br\xfbl\xe9/caf\udce9")):
        ran = made.doit("trace:slow/1", PYTHONIOENCODING=encoding)
        assert ran.code == 1
        assert re.sub("^   trace .*\n", "", ran.out, flags=re.MULTILINE) == (  # a line of progress, where it is slow
            ".  trace:slow/1\n"
            f'!! trace slow/1: entry point "slow:build" raises FileNotFoundError: [Errno 2] No such file or directory: '
            f"'{name}' (slow.py:3)\n"
            "   0 done, 0 up to date, 1 failed (trace:slow/1)\n"
        )
    assert r"caf\udce9" in (made.root / ".build/log/trace-slow-1.log").read_text()


def test_modules_of_the_fork_server_are_looked_at_only_where_they_may_be_the_projects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def module(name: str) -> None:
        made = ModuleType(name)
        made.__file__ = str(tmp_path / f"{name}.py")
        monkeypatch.setitem(sys.modules, name, made)

    monkeypatch.setattr(worker, "_preloaded", [])
    monkeypatch.setattr(worker, "_last_preloaded", "")
    assert set(worker._imported()) == set(sys.modules)
    module("early")
    module("last")
    worker.remember_modules()
    assert {"early", "last"} <= set(worker._imported())
    assert not {"torch", "pytest", "json", "tritonbuild.worker"} & set(worker._imported())
    for number in range(400):
        module(f"late{number}")
    late = {f"late{number}" for number in range(400)}
    assert set(worker._imported()) >= {"early", *late}
    assert "torch" not in worker._imported()
    del sys.modules["last"]
    assert set(worker._imported()) == set(sys.modules)


_PRELOADED = """\
import os, random, sys, numpy, torch

def seen():
    return {
        "cuda": torch.cuda.is_initialized(),
        "threads": len(os.listdir("/proc/self/task")),
        "torch's threads": torch.get_num_threads(),
        "random": (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()),
        "settings": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }

import tritonbuild.trace
before = seen()
import tritonbuild.preload
after = seen()
sys.stdout.write(repr([name for name in before if before[name] != after[name]]))
"""


def test_what_the_fork_server_does_for_all_children_leaves_nothing_behind() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    ran = subprocess.run(
        [sys.executable, "-c", _PRELOADED], capture_output=True, text=True, check=False, env=environment
    )
    assert (ran.stdout, ran.stderr) == ("[]", "")
