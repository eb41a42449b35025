"""The image in a real engine: served as it should be in production, and gone afterwards, whatever happens."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from conftest import DODO, ROOT

from tritonbuild import compose, container, docker, image, smoke, spec, state
from tritonbuild.errors import ImageError, ServerError
from tritonbuild.server import at as server_at

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tritonbuild.server import Server
    from tritonbuild.spec import Pipeline

pytestmark = pytest.mark.docker

NAME = "tritonbuild-test-served"
NETS = """
import torch


class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x).relu()


class Pair(torch.nn.Module):
    def forward(self, left, right):
        return left + right, left * 2
"""
PIPELINE = f"""
triton: "26.07"
device: cpu
image: {{name: {NAME}}}
models:
  scale:
    entry_point: nets:Scale
    max_batch_size: 8
    inputs: {{x: {{dtype: float32, shape: [batch, 4]}}}}
    outputs: [y]
    trace: {{cases: 6}}
    versions: {{1: {{}}, 2: {{seed: 5}}}}
  pair:
    entry_point: nets:Pair
    axes: {{length: {{example: 3, min: 1, max: 9}}}}
    inputs:
      left: {{dtype: int64, shape: [length], range: [-5, 5]}}
      right: {{dtype: int64, shape: [length], range: [-5, 5]}}
    outputs: [sum, double]
    trace: {{cases: 6}}
  rnet:
    entry_point: zoo.mtcnn:RNet
    max_batch_size: 16
    inputs: {{crop: {{dtype: float32, shape: [batch, 3, 24, 24], range: [-1, 1]}}}}
    outputs: [probabilities, offsets]
    trace: {{cases: 6, budget_s: 1}}
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed."""
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def ours() -> list[str]:
    """Return the containers of smoke tests that are there, running or not."""
    return docker.ask("ps", "--all", "--quiet", f"--filter=label={container.LABEL}").printed.split()


def post(url: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
    """Return the status and the body of the answer to a POST of nothing."""
    request = urllib.request.Request(f"http://{url}{path}", b"{}", headers or {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture(scope="module")
def pipeline(triton_cpu: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """Three model versions, traced, proved, and built into an image on the CPU base."""
    root = tmp_path_factory.mktemp("served")
    for name, text in {"nets.py": NETS, "pipeline.yaml": PIPELINE, "dodo.py": DODO}.items():
        (root / name).write_text(text)
    command = [sys.executable, "-m", "doit", "repository"]
    subprocess.run(command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    pipeline = spec.load(root / "pipeline.yaml")
    state.State(str(root / ".build" / "state.sqlite"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_IMAGE", triton_cpu)
        image.build(pipeline)
        yield pipeline
    names = (image.record(pipeline) or {})["tags"]
    docker.ask("image", "rm", "--force", *names)


@pytest.fixture(scope="module")
def server(pipeline: Pipeline) -> Iterator[Server]:
    """The running container."""
    with container.server(pipeline) as running:
        yield running


class TestServed:
    def test_it_answers_as_eager_does(self, pipeline: Pipeline, server: Server) -> None:
        server.load("scale", "pair", "rnet")
        assert (server.kind, server.version) == ("docker", "2.51.0")
        for version in pipeline.all_versions():
            out = pipeline.root / f".build/smoke/{version.label}.json"
            smoke.run(
                server,
                version.model,
                version.version,
                cases=pipeline.root / f".build/cases/{version.label}.safetensors",
                config=pipeline.root / f"models/{version.model}/config.pbtxt",
                out=out,
            )
            result = json.loads(out.read_text())
            assert (result["verdict"], result["server"]["kind"], result["failures"]) == ("passed", "docker", [])

    def test_it_is_locked_down(self, server: Server) -> None:
        (name,) = ours()
        look = (
            "import os, pathlib; status = dict(line.split(':', 1) for line in open('/proc/1/status')); "
            "print(os.getuid(), os.getgid(), status['CapEff'].strip(), status['NoNewPrivs'].strip())\n"
            "for path in ('/x', '/models/x', '/opt/tritonserver/x'):\n"
            "    try: pathlib.Path(path).touch(); print('written', path)\n"
            "    except OSError as error: print(error.strerror)\n"
            "print(os.statvfs('/dev/shm').f_blocks * os.statvfs('/dev/shm').f_frsize)"
        )
        assert docker.ask("exec", name, "python3", "-c", look).printed.splitlines() == [
            "1000 1000 0000000000000000 1",
            *["Read-only file system"] * 3,
            str(2**30),
        ]
        host = json.loads(docker.ask("inspect", name).printed)[0]["HostConfig"]
        assert host["Memory"] == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4
        assert host["PidsLimit"] == 4096
        assert list(host["PortBindings"]) == ["8000/tcp"]
        assert host["PortBindings"]["8000/tcp"][0]["HostIp"] == "127.0.0.1"

    def test_model_control_is_off(self, server: Server) -> None:
        refused = (503, '{"error":"explicit model load / unload is not allowed if polling is enabled"}')
        for action in ("load", "unload"):
            assert post(server.url, f"/v2/repository/models/scale/{action}") == refused
        server.load("scale")

    def test_the_clients_of_the_manual(self, server: Server, tmp_path: Path) -> None:
        blocks = re.findall(r"```(sh|python)\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)
        programs = [
            (["sh", "-c"] if language == "sh" else [sys.executable, "-c"], text.replace("localhost:8000", server.url))
            for language, text in blocks
            if "localhost:8000" in text
        ]
        metadata, by_json, by_python = (
            run(*command, text, NO_PROXY="*", no_proxy="*").stdout for command, text in programs
        )
        assert json.loads(metadata)["inputs"] == [{"name": "crop", "datatype": "FP32", "shape": [-1, 3, 24, 24]}]
        shapes = {output["name"]: output["shape"] for output in json.loads(by_json)["outputs"]}
        assert shapes == {"probabilities": [1, 2], "offsets": [1, 4]}
        assert by_python == "(5, 2)\n"

    def test_the_way_in_of_known_attacks_is_locked(self, server: Server) -> None:
        for path in ("/v2/systemsharedmemory/region/a/register", "/v2/trace/setting", "/v2/logging"):
            assert post(server.url, path) == (403, '{"error":"This API is restricted, expecting header \'admin-key\'"}')

    def test_an_unknown_model(self, server: Server) -> None:
        with pytest.raises(ServerError) as raised:
            server.load("other")
        assert str(raised.value) == (
            f"load other: the server at {server.url} does not serve this model; its models are: pair, rnet, scale"
        )


class TestEnds:
    @pytest.mark.parametrize("ready", [True, False], ids=["when it is ready", "while it starts"])
    def test_it_is_removed_when_we_are_killed(self, pipeline: Pipeline, ready: bool) -> None:
        before = ours()
        program = (
            "import sys, time; from pathlib import Path; from tritonbuild import spec, container\n"
            "with container.server(spec.load(Path(sys.argv[1]))): print('ready', flush=True); time.sleep(60)\n"
        )
        command = [sys.executable, "-c", program, str(pipeline.path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout is not None
        if ready:
            assert "ready" in (process.stdout.readline() + process.stdout.readline())
            assert len(ours()) == len(before) + 1
        else:
            _until(lambda: ours() != before, 10)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        time.sleep(3)
        _until(lambda: ours() == before, 15)

    def test_it_ends_under_us(self, pipeline: Pipeline) -> None:
        before = set(ours())
        context = container.server(pipeline)
        running = context.__enter__()
        (name,) = set(ours()) - before
        docker.ask("kill", name)
        with pytest.raises(ServerError) as raised:
            running.load("scale")
        log = pipeline.root / f".build/log/server-docker-{os.getpid()}.log"
        gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 / 4 / 2**30
        assert str(raised.value) == (
            f"container of {(image.record(pipeline) or {})['tags'][0]}: was killed, from outside or for using more "
            f"than {gigabytes:.0f} GiB of memory\n    log: {log}"
        )
        assert not context.__exit__(ServerError, raised.value, None)
        assert set(ours()) == before

    def test_a_model_that_does_not_load(self, pipeline: Pipeline, tmp_path: Path) -> None:
        (tmp_path / "model.pt").write_bytes(b"not a zip")
        base = (image.record(pipeline) or {})["tags"][0]
        (tmp_path / "Dockerfile").write_text(f"FROM {base}\nCOPY --chown=1000 model.pt /models/scale/2/model.pt\n")
        run("docker", "build", "--tag=tritonbuild-test-broken", str(tmp_path))
        with pytest.raises(ServerError) as raised, container.run("tritonbuild-test-broken", tmp_path, name="vision:1"):
            pass
        what, log = str(raised.value).splitlines()
        assert what.startswith("container of vision:1: scale/2 did not load: Internal: ")
        assert "zip archive" in what
        assert log == f"    log: {tmp_path}/server-docker-{os.getpid()}.log"
        docker.ask("image", "rm", "--force", "tritonbuild-test-broken")

    def test_a_base_without_a_server(self, triton_cpu: str, tmp_path: Path) -> None:
        (tmp_path / "Dockerfile").write_text('FROM tritonbuild-test/python\nCMD ["tritonserver"]\n')
        run("docker", "build", "--tag=tritonbuild-test-bare", str(tmp_path))
        with pytest.raises(ServerError) as raised, container.run("tritonbuild-test-bare", tmp_path, name="vision:1"):
            pass
        what, advice = str(raised.value).splitlines()
        assert what.startswith("container of vision:1: the image has no such program: ")
        assert 'exec: "tritonserver": executable file not found in $PATH' in what
        assert advice == "    take a Triton image as the base"
        (tmp_path / "Dockerfile").write_text(
            'FROM tritonbuild-test/python\nCMD ["sh", "-c", "echo no licence; exit 3"]\n'
        )
        run("docker", "build", "--tag=tritonbuild-test-bare", str(tmp_path))
        with pytest.raises(ServerError) as raised, container.run("tritonbuild-test-bare", tmp_path, name="vision:1"):
            pass
        assert str(raised.value) == (
            "container of vision:1: the server ended with exit code 3; the last lines of its log follow\n"
            f"    no licence\n    log: {tmp_path}/server-docker-{os.getpid()}.log"
        )
        docker.ask("image", "rm", "--force", "tritonbuild-test-bare")

    def test_a_port_that_is_taken(self, pipeline: Pipeline, tmp_path: Path) -> None:
        built = image.record(pipeline) or {}
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with (
                pytest.raises(ServerError) as raised,
                container.run(built["image"], tmp_path, name="vision:1", port=port),
            ):
                pass
        what, advice = str(raised.value).splitlines()
        assert what.startswith("container of vision:1: the port is taken by another program: ")
        assert what.endswith(f"listen tcp4 127.0.0.1:{port}: bind: address already in use")
        assert advice == "    stop that program, or choose another port"

    def test_no_such_image(self, engine: None, tmp_path: Path) -> None:
        with pytest.raises(ServerError) as raised, container.run("tritonbuild-test/none", tmp_path, name="vision:1"):
            pass
        assert str(raised.value) == (
            "container of vision:1: there is no such image, or the registry does not show it to this user: "
            "No such image: tritonbuild-test/none:latest\n    check its name and tag; `docker login` if it is private"
        )

    def test_nothing_was_built(self, tmp_path: Path) -> None:
        (tmp_path / "pipeline.yaml").write_text(PIPELINE)
        with pytest.raises(ImageError) as raised, container.server(spec.load(tmp_path / "pipeline.yaml")):
            pass
        assert str(raised.value) == "docker server: no image was built\n    `doit image` builds it"


def _until(true: Any, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until:
        time.sleep(0.2)
    assert true()


class TestImageAlone:
    """The image as people run it, without our hands on it."""

    def test_a_killed_server_shows_in_health(self, pipeline: Pipeline) -> None:
        name = f"tritonbuild-test-{os.getpid()}"
        often = ("--health-interval=0.5s", "--health-timeout=2s", "--health-retries=1", "--health-start-period=0s")
        config = json.loads(docker.ask("image", "inspect", f"{NAME}:latest").printed)[0]["Config"]
        # A shell that stays keeps the container when the server is killed: what is left shows in its health.
        command = ["sh", "-c", '"$@" & echo $! >/tmp/server; wait; sleep 60', "sh", *config["Cmd"]]
        flags = ("--detach", "--rm", "--read-only", "--tmpfs=/tmp:exec", "--cap-drop=ALL", "--shm-size=1g", *often)
        try:
            run("docker", "run", *flags, f"--name={name}", f"{NAME}:latest", *command)
            _until(lambda: _health(name) == "healthy", 60)
            run("docker", "exec", name, "sh", "-c", "kill -9 $(cat /tmp/server)")
            _until(lambda: _health(name) == "unhealthy", 20)
        finally:
            docker.ask("rm", "--force", name)

    def test_compose_up_and_stop(self, pipeline: Pipeline, compose_tool: list[str]) -> None:
        compose.write(pipeline)
        ports = {f"TRITON_{kind}_PORT": str(_free_port()) for kind in ("HTTP", "GRPC", "METRICS")}
        file = f"--file={pipeline.root / compose.COMPOSE}"
        tool = (*compose_tool, file, f"--project-name=tritonbuild-test-{os.getpid()}")
        url = f"127.0.0.1:{ports['TRITON_HTTP_PORT']}"
        try:
            run(*tool, "up", "--detach", **ports)
            (name,) = run(*tool, "ps", "--quiet").stdout.split()
            _until(lambda: _is_ready(url), 60)
            with server_at(url) as running:
                running.load("scale", "pair", "rnet")
            metrics = f"http://127.0.0.1:{ports['TRITON_METRICS_PORT']}/metrics"
            with urllib.request.urlopen(metrics, timeout=10) as answer:
                assert b'nv_inference_request_success{model="scale",version="2"} 0' in answer.read()
            inspected = json.loads(docker.ask("inspect", name, f"{NAME}:latest").printed)
            host, config = inspected[0]["HostConfig"], inspected[0]["Config"]
            assert (host["ReadonlyRootfs"], host["CapDrop"], host["SecurityOpt"]) == (
                True,
                ["ALL"],
                ["no-new-privileges:true"],
            )
            assert {binding[0]["HostIp"] for binding in host["PortBindings"].values()} == {"127.0.0.1"}
            assert (host["RestartPolicy"]["Name"], host["ShmSize"], host["Memory"]) == ("unless-stopped", 2**30, 2**34)
            assert config["Healthcheck"] == inspected[1]["Config"]["Healthcheck"]  # the image's own, for podman
            run("docker", "stop", name)  # after 10 s SIGKILL, and then the code would be 137
            assert docker.ask("inspect", "--format={{.State.ExitCode}}", name).printed == "0\n"

            with socket.create_server(("127.0.0.1", int(ports["TRITON_HTTP_PORT"]))):
                again = subprocess.run(
                    [*tool, "up", "--detach"], env={**os.environ, **ports}, capture_output=True, text=True, check=False
                )
                assert again.returncode != 0
                assert "address already in use" in again.stderr
        finally:
            subprocess.run([*tool, "down"], env={**os.environ, **ports}, capture_output=True, check=False)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{url}/v2/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _health(name: str) -> str:
    return docker.ask("inspect", "--format={{.State.Health.Status}}", name).printed.strip()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
