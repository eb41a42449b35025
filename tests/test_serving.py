"""Which Triton answers, and that none is left behind, however doit ends while a model is being served."""

from __future__ import annotations

import os
import signal
import uuid
from typing import TYPE_CHECKING

import pytest
from test_worker import MARK, living, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Project

PIPELINE = """\
triton: "26.07"
device: cpu
models:
  quick:
    entry_point: torch.nn:Tanh
    max_batch_size: 4
    inputs: {x: {dtype: float32, shape: [batch, 4]}}
    versions: {1: {}, 2: {}, 3: {}}
    config: {version_policy: {latest: {num_versions: 2}}}
"""


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGKILL", "SIGTERM"])
def test_no_server_outlives_a_doit_that_is_stopped_while_serving(
    how: str, project: Callable[[dict[str, str]], Project]
) -> None:
    made = project({"pipeline.yaml": PIPELINE})
    assert made.doit("config").code == 0
    mark = uuid.uuid4().hex
    process = made.start("smoke", **{MARK: mark})
    wait_for(lambda: any("tritonserver" in line for line in living(mark)), "the server to run")
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGKILL if how == "SIGKILL" else signal.SIGTERM)
    out, _ = process.communicate(timeout=30)

    wait_for(lambda: not living(mark), "every process to end", 20)
    assert process.returncode != 0
    assert "Traceback" not in out
    assert not list((made.root / ".build").glob("smoke/**/*.tmp"))
    again = made.doit()
    assert again.code == 0, again.out
    assert [name for name in again.tasks if name.startswith("trace")] == []


def test_only_versions_that_the_policy_serves_are_asked(project: Callable[[dict[str, str]], Project]) -> None:
    made = project({"pipeline.yaml": PIPELINE})
    listed = made.doit("list", "--all", "--quiet").out.split()
    assert [name for name in listed if name.startswith("smoke:")] == ["smoke:quick/2", "smoke:quick/3"]
    assert [name for name in listed if name.startswith("trace:")] == ["trace:quick/1", "trace:quick/2", "trace:quick/3"]


def test_a_server_at_an_address_that_does_not_answer(project: Callable[[dict[str, str]], Project]) -> None:
    made = project({"pipeline.yaml": PIPELINE})
    ran = made.doit("server=127.0.0.1:1", "smoke:quick/2")
    assert ran.code == 1
    assert "Traceback" not in ran.out
    assert "127.0.0.1:1" in ran.out


def test_image_without_an_engine_is_left_out_in_one_line(project: Callable[[dict[str, str]], Project]) -> None:
    made = project({"pipeline.yaml": "image: {name: vision}\n" + PIPELINE})
    ran = made.doit("image", DOCKER_HOST="unix:///nowhere/docker.sock")
    assert ran.code == 0, ran.out
    assert "-- image\n" in ran.out
    (line,) = [line for line in ran.out.splitlines() if "left out" in line]
    assert line.startswith("   left out: image: no Docker engine")
