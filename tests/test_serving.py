"""Which Triton answers, and that none is left behind, however doit ends while a model is being served."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import uuid
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import psutil
import pytest
from test_worker import MARK, living, wait_for

from tritonbuild import serving, spec
from tritonbuild.reporter import Reporter

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
    out, _ = process.communicate(timeout=60)

    wait_for(lambda: not living(mark), "every process to end", 60)
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


def test_a_server_that_is_not_triton(project: Callable[[dict[str, str]], Project]) -> None:
    """What it answers, a page of HTML, is not shown."""
    made = project({"pipeline.yaml": PIPELINE})
    web = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    try:
        url = f"127.0.0.1:{web.server_address[1]}"
        ran = made.doit(f"server={url}", "smoke:quick/2")
    finally:
        web.shutdown()
    assert ran.code == 1
    assert f"!! server {url}: /v2 was answered 404: is this a Triton server?\n" in ran.out
    assert "<" not in ran.out


def test_image_without_an_engine_is_left_out_in_one_line(project: Callable[[dict[str, str]], Project]) -> None:
    made = project({"pipeline.yaml": "image: {name: vision}\n" + PIPELINE})
    ran = made.doit("image", DOCKER_HOST="unix:///nowhere/docker.sock")
    assert ran.code == 0, ran.out
    assert "-- image\n" in ran.out
    (line,) = [line for line in ran.out.splitlines() if "left out" in line]
    assert line.startswith("   left out: image: no Docker engine")


MANY = 'triton: "26.07"\ndevice: cpu\nmodels:\n' + "".join(
    f"  {name}:\n    entry_point: nets:{name.title()}\n    max_batch_size: 4\n"
    "    inputs: {x: {dtype: float32, shape: [batch, 4]}}\n    trace: {cases: 4, budget_s: 2}\n"
    for name in ("a", "b", "c")
)
NETS = (
    "import torch\n\n\nclass A(torch.nn.Tanh): ...\n\n\nclass B(torch.nn.ReLU): ...\n\n\nclass C(torch.nn.GELU): ...\n"
)


def loaded(made: Project) -> list[str]:
    """Return what the server of the last run was told to load."""
    log = max((made.root / ".build" / "log").glob("server-*.log"), key=lambda path: path.stat().st_mtime)
    return re.findall(r"successfully loaded '(\w+)'", log.read_text())


def test_models_are_loaded_side_by_side_each_once_and_only_those_that_are_asked(
    project: Callable[[dict[str, str]], Project],
) -> None:
    made = project({"pipeline.yaml": MANY, "nets.py": NETS})
    assert made.doit().code == 0
    assert sorted(loaded(made)) == ["a", "b", "c"]

    for name in ("a", "c"):
        (made.root / f".build/smoke/{name}/1.json").unlink()
    again = made.doit(TRITONBUILD_STORE="off")
    assert again.tasks == ["smoke:a/1", "smoke:c/1"]
    assert loaded(made) == ["a", "c"]

    (made.root / ".build/smoke/a/1.json").unlink()
    (made.root / ".build/smoke/b/1.json").unlink()
    assert made.doit("smoke:a/1", TRITONBUILD_STORE="off").tasks == ["smoke:a/1"]
    assert loaded(made) == ["a"]


@pytest.mark.parametrize("kind", ["process", "thread"])
def test_smoke_tests_side_by_side(kind: str, project: Callable[[dict[str, str]], Project]) -> None:
    made = project({"pipeline.yaml": MANY, "nets.py": NETS})
    ran = made.doit("-n", "2", "-P", kind)
    assert ran.code == 0, ran.out
    assert ran.out.endswith("   11 done, 0 up to date\n")
    verdicts = {name: json.loads((made.root / f".build/smoke/{name}/1.json").read_text())["verdict"] for name in "abc"}
    assert verdicts == {"a": "passed", "b": "passed", "c": "passed"}


def test_a_model_that_does_not_load_fails_its_own_test_alone(project: Callable[[dict[str, str]], Project]) -> None:
    """Also where it was to be loaded with the one before it. Its warm-up asks for a row that is not there."""
    table = MANY.replace("nets:B", "nets:Table").replace(
        "  c:\n",
        "    config:\n      model_warmup:\n        - name: all\n          batch_size: 1\n"
        "          inputs: {x: {data_type: TYPE_INT64, dims: [4], input_data_file: ids}}\n  c:\n",
    )
    b = "nets:Table\n    max_batch_size: 4\n    inputs: {x: {dtype: "
    table = table.replace(f"{b}float32, shape: [batch, 4]}}}}", f"{b}int64, shape: [batch, 4], range: [0, 4]}}}}")
    nets = f"{NETS}\n\nclass Table(torch.nn.Embedding):\n    def __init__(self):\n        super().__init__(5, 2)\n"
    made = project({"pipeline.yaml": table, "nets.py": nets})
    (made.root / "ids").write_bytes((99).to_bytes(8, "little") * 4)
    ran = made.doit()
    assert ran.code == 1, ran.out
    # A warm-up that fails sometimes ends tritonserver: then the others get a new one.
    (line,) = [line for line in ran.out.splitlines() if line.startswith("!! ")]
    ended = "!! load b: tritonserver itself ended while it loaded the model; the last lines of its log follow"
    told = "!! load b/1: failed to run warmup sample 'all': PyTorch execute failure: The following operation failed in "
    assert line in {ended, f"{told}the TorchScript interpreter."}
    verdicts = {name: json.loads((made.root / f".build/smoke/{name}/1.json").read_text())["verdict"] for name in "abc"}
    assert verdicts == {"a": "passed", "b": "failed", "c": "passed"}
    for row, code in ((4, 0), (98, 1)):  # only the warm-up changes, and the verdict with it
        (made.root / "ids").write_bytes(row.to_bytes(8, "little") * 4)
        ran = made.doit()
        assert (ran.code, ran.tasks) == (code, ["config:b", "smoke:b/1"]), ran.out


def test_a_model_whose_turn_is_over_is_let_go(
    project: Callable[[dict[str, str]], Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = project({"pipeline.yaml": MANY, "nets.py": NETS})
    assert made.doit("config").code == 0
    monkeypatch.setattr(Reporter, "everything", False)  # each is loaded by itself, however many cores there are
    choice = serving.ServerChoice(spec.load(made.root / "pipeline.yaml"), "embedded", docker=False)
    try:
        for model in "abc":
            running = choice.ready(model)
            assert [name for name in "abc" if running.versions(name)] == [model]
    finally:
        choice.stop()


def test_a_server_that_ended_by_itself_is_started_again(project: Callable[[dict[str, str]], Project]) -> None:
    made = project({"pipeline.yaml": PIPELINE})
    assert made.doit("config").code == 0
    choice = serving.ServerChoice(spec.load(made.root / "pipeline.yaml"), "embedded", docker=False)
    try:
        first = choice.get()
        assert choice.get() is first
        (process,) = [
            found for found in psutil.process_iter() if f"--http-port={first.url.split(':')[1]}" in line(found)
        ]
        process.kill()
        second = choice.get()
        assert second is not first
        second.load("quick")
    finally:
        choice.stop()


def line(process: psutil.Process) -> list[str]:
    """Return the command line of tritonserver; nothing for another program, its guard among them."""
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        return words if words and words[0].endswith("tritonserver") else []
    return []
