"""The embedded server as processes: it starts, loads, says why not, and never outlives whoever started it."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import torch
from torch import Tensor, nn

from tritonbuild import embedded, server
from tritonbuild.errors import ServerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")

CONFIG = """
name: "{name}"
backend: "pytorch"
platform: "pytorch_libtorch"
input {{ name: "x" data_type: TYPE_FP32 dims: [ 4 ] }}
output {{ name: "y" data_type: TYPE_FP32 dims: [ 4 ] }}
"""


class Echo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0


def add(models: Path, name: str, config: str = CONFIG) -> None:
    """Put a model into a repository."""
    (models / name / "1").mkdir(parents=True)
    torch.jit.script(Echo()).save(models / name / "1" / "model.pt")
    (models / name / "config.pbtxt").write_text(config.format(name=name))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    for name in ("a", "b", "c"):
        add(folder, name)
    return folder


def processes(folder: Path) -> list[tuple[psutil.Process, list[str]]]:
    """Return what runs with a path of the folder on its command line, and that line; what was killed does not run.

    The line is read once: that of a process which ends meanwhile is empty.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            if str(folder) in " ".join(line) and process.status() != psutil.STATUS_ZOMBIE:
                found.append((process, line))
    return [(process, line) for process, line in found if process.pid != os.getpid()]


def named(folder: Path, name: str) -> list[psutil.Process]:
    return [process for process, line in processes(folder) if name in line[0]]


def shared_memory(folder: Path) -> list[Path]:
    """Return the regions of the servers that run from a folder."""
    prefixes = {re.findall(r"tritonbuild-[0-9a-f]{16}-", " ".join(line))[0] for line in guards(folder)}
    return [path for prefix in prefixes for path in Path("/dev/shm").glob(f"{prefix}*")]


def guards(folder: Path) -> list[list[str]]:
    return [line for _, line in processes(folder) if "tritonbuild-guard" in line]


def eventually(true: Callable[[], bool], within_s: float = 30) -> bool:
    """Wait until something is true."""
    deadline = time.monotonic() + within_s
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    return true()


# ------------------------------------------------------------------------------------------------- start and stop


def test_a_server_lives_as_long_as_its_context(models: Path, tmp_path: Path) -> None:
    with server.embedded(models, tmp_path / "build") as running:
        assert (running.kind, running.version) == ("embedded", "2.51.0")
        assert running.url.startswith("127.0.0.1:")
        running.load("a", "b")
        assert running.get("/v2/models/a/ready") is None
        assert len(named(tmp_path, "triton_python_backend_stub")) == 2
        listening = [
            connection.laddr.ip
            for process in named(tmp_path, "tritonserver")
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert listening == ["127.0.0.1"], "no other port, no other address"
        regions = shared_memory(tmp_path)
        assert len(regions) == 2
        assert "successfully loaded 'b'\"" in running.log_tail() + "\n"

    assert processes(tmp_path) == []
    assert [path for path in regions if path.exists()] == []
    assert running.log == tmp_path / "build" / "log" / f"server-{os.getpid()}.log"
    assert running.log.read_text().endswith("tritonserver ended with status 137\n")


def test_a_server_ends_with_an_error_of_ours(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), server.embedded(models, tmp_path / "build"):
        raise ZeroDivisionError

    assert processes(tmp_path) == []


def test_two_servers_at_once_share_the_backend_directory(models: Path, tmp_path: Path) -> None:
    with server.embedded(models, tmp_path / "build") as one, server.embedded(models, tmp_path / "build") as other:
        assert one.url != other.url

    assert len(list((tmp_path / "build" / "server").iterdir())) == 1


@pytest.mark.parametrize("name", ["it's a $(project)", "10:30"])
def test_paths_with_characters_of_the_shell_and_of_lists_of_paths(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    add(folder / "models", "a")
    with server.embedded(folder / "models", folder / ".build") as running:
        running.load("a")
        (instance,) = [
            process
            for process in psutil.Process().children(recursive=True)
            if process.name().startswith("triton_python")
        ]
        # Another one, where the system has one, would be found in its place.
        assert str(embedded._libpython().resolve()) in {region.path for region in instance.memory_maps()}


PARENT = """
import sys, threading, time
from pathlib import Path
from tritonbuild import server

with server.embedded(Path(sys.argv[1]), Path(sys.argv[2])) as running:
    print(running.url, flush=True)
    {body}
"""


@contextlib.contextmanager
def parent(models: Path, body: str) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that has started a server."""
    command = [sys.executable, "-c", PARENT.format(body=body), str(models), str(models.parent / "build")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("127.0.0.1:")
        yield process
        process.kill()


LOADED = "running.load('a'); print('loaded', flush=True); time.sleep(60)"
LOADING = "print('loaded', flush=True); running.load('a', 'b', 'c'); time.sleep(60)"
FORKED = "import os; os.fork() or time.sleep(3600); running.load('a'); print('loaded', flush=True); time.sleep(60)"


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("body", [LOADED, LOADING], ids=["loaded", "loading"])
def test_a_server_does_not_outlive_its_parent(models: Path, tmp_path: Path, body: str, sent: int) -> None:
    with parent(models, body) as process:
        assert process.stdout is not None
        process.stdout.readline()
        if body == LOADING:  # in the middle of `import torch`, where Triton's own instances would stay for ever
            assert eventually(lambda: len(named(tmp_path, "triton_python_backend_stub")) > 0)
            time.sleep(0.3)
        regions = shared_memory(tmp_path)
        for instance in named(tmp_path, "triton_python_backend_stub"):
            instance.suspend()  # an instance that hangs does not end by itself
        process.send_signal(sent)
        process.wait(20)

        assert regions
        assert eventually(lambda: processes(tmp_path) == []), processes(tmp_path)
        assert eventually(lambda: not any(path.exists() for path in regions))


def test_a_child_that_we_forked_does_not_keep_the_server_alive(models: Path, tmp_path: Path) -> None:
    with parent(models, FORKED) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (child,) = [
            found for found in psutil.Process(process.pid).children() if "tritonbuild-guard" not in found.cmdline()
        ]
        try:
            process.kill()
            process.wait()

            assert eventually(lambda: named(tmp_path, "tritonserver") == [] and guards(tmp_path) == [])
            assert child.is_running()
        finally:
            child.kill()


# --------------------------------------------------------------------------------------- what keeps it from starting


def taken() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


def test_a_port_that_is_taken_meanwhile(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with taken() as listener:
        port, free = listener.getsockname()[1], server._free_port()
        ports = iter([port, port, free])
        monkeypatch.setattr(server, "_free_port", lambda: next(ports))
        with server.embedded(models, tmp_path / "build") as running:
            assert running.url == f"127.0.0.1:{free}"

        monkeypatch.setattr(server, "_free_port", lambda: port)
        with pytest.raises(ServerError) as caught, server.embedded(models, tmp_path / "build"):
            pass

    assert str(caught.value) == "server: five free ports in a row were taken by others before the server had them"
    assert processes(tmp_path) == []


def test_a_server_that_does_not_come_up(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = embedded._command
    monkeypatch.setattr(embedded, "_command", lambda *arguments: [*real(*arguments), "--http-thread-count=many"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ServerError) as caught, server.embedded(models, tmp_path / "build"):
        pass

    lines = str(caught.value).split("\n")
    assert lines[0] == "server: tritonserver ended before it was live; the last lines of its log follow"
    assert lines[-2:] == ["    tritonserver ended with status 1", f"    log: build/log/server-{os.getpid()}.log"]
    assert "Invalid option value. Got many" in str(caught.value)
    assert processes(tmp_path) == []


def test_a_server_that_hangs(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_command", lambda *_: ["sh", "-c", f"echo {tmp_path} waits; sleep 60"])
    monkeypatch.setattr(server, "_START_TIMEOUT_S", 0.3)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ServerError) as caught, server.embedded(models, tmp_path / "build"):
        pass

    assert str(caught.value) == (
        "server: tritonserver is not live after 0.3 s; the last lines of its log follow\n"
        f"    {tmp_path} waits\n"
        f"    log: build/log/server-{os.getpid()}.log"
    )
    assert processes(tmp_path) == []


def test_no_wheel(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ServerError) as caught, server.embedded(models, tmp_path / "build"):
        pass

    assert str(caught.value) == (
        "server: the nvidia-pytriton wheel, which carries tritonserver, is not installed\n"
        "    install it (Linux on x86-64 only), or smoke with server=docker or server=<host>:<port>"
    )


def test_no_shared_libpython(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded.sysconfig, "get_config_var", lambda _: str(tmp_path))
    monkeypatch.setattr(sys, "base_prefix", "/opt/python")
    with pytest.raises(ServerError) as caught, server.embedded(models, tmp_path / "build"):
        pass

    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}"
    assert str(caught.value) == (
        f"server: {name}.so.1.0, the shared library of /opt/python/bin/python3, not found; "
        "Triton's Python backend needs it\n"
        f"    Debian and Ubuntu: apt-get install {name}\n"
        "    pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install"
    )


def test_a_python_that_the_wheel_does_not_know(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Version(tuple):  # type: ignore[type-arg]
        major, minor = 3, 99

    monkeypatch.setattr(embedded, "_libpython", lambda: Path("/libpython3.99.so.1.0"))
    monkeypatch.setattr(sys, "version_info", Version((3, 99)))
    with pytest.raises(ServerError) as caught, server.embedded(models, tmp_path / "build"):
        pass

    assert str(caught.value) == (
        "server: nvidia-pytriton has no Python backend for Python 3.99, only for 3.8, 3.9, 3.10, 3.11, 3.12, 3.13"
    )


def test_no_bash(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerError) as caught, server.embedded(models, tmp_path / "build"):
        pass

    assert str(caught.value) == ("server: bash not found; Triton's Python backend needs it\n    apt-get install bash")


# ----------------------------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.Server]:
    """A server whose repository holds models that do not load."""
    folder = tmp_path_factory.mktemp("broken")
    models = folder / "models"
    add(models, "right")
    add(models, "unknown_field", CONFIG + "max_bach_size: 8\n")
    add(models, "platform", CONFIG.replace("pytorch_libtorch", "pytorch_torchscript"))
    add(models, "other_name", CONFIG.replace("{name}", "name"))
    add(models, "no_dims", CONFIG.replace("dims: [ 4 ]", ""))
    add(models, "no_file")
    (models / "no_file" / "1" / "model.pt").unlink()
    with server.embedded(models, folder / "build") as running:
        yield running


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("absent", "load absent: model not found in any model repository."),
        (
            "unknown_field",
            "load unknown_field: config.pbtxt:7:14: "  # noqa: ISC004
            'Message type "inference.ModelConfig" has no field named "max_bach_size".',
        ),
        (
            "platform",
            "load platform: unexpected 'platform' and 'backend' pair, got:pytorch_torchscript, pytorch",
        ),
        (
            "other_name",
            "load other_name: unexpected directory name 'other_name' for model 'name', "  # noqa: ISC004
            "directory name must equal model name",
        ),
        ("no_dims", "load no_dims: model input 'x' must specify 'dims' for no_dims"),
        (
            "no_file",
            "load no_file/1: unable to find '{models}/no_file/1/model.pt' for model instance 'no_file'",
        ),
    ],
)
def test_the_reason_of_a_failed_load(broken: server.Server, model: str, said: str) -> None:
    with pytest.raises(ServerError) as caught:
        broken.load("right", model)

    assert broken.log
    expected = said.format(models=broken.log.parents[2] / "models")
    assert str(caught.value) == f"{expected}\n    log: {broken.log}"


def test_a_url_server_says_why_it_does_not_serve_a_model(broken: server.Server) -> None:
    with contextlib.suppress(ServerError):
        broken.load("no_file")
    broken.load("right")
    with server.at(broken.url) as running:
        running.load("right")
        assert running.log_tail() == ""
        with pytest.raises(ServerError) as failed:
            running.load("no_file")
        with pytest.raises(ServerError) as not_loaded:
            running.load("platform")

    assert broken.log
    path = broken.log.parents[2] / "models" / "no_file" / "1" / "model.pt"
    assert str(failed.value) == f"load no_file/1: unable to find '{path}' for model instance 'no_file'"
    assert str(not_loaded.value) == (
        f"load platform: the server at {broken.url} does not serve this model; it has the model, but has not loaded it"
    )


def test_a_process_that_dies_while_it_loads(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def kill() -> None:
        assert eventually(lambda: len(named(tmp_path, "triton_python_backend_stub")) > 0)
        time.sleep(0.3)
        named(tmp_path, "triton_python_backend_stub")[0].kill()

    with server.embedded(models, tmp_path / "build") as running:
        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(ServerError) as caught:
            running.load("a")
        killer.join()

        lines = str(caught.value).split("\n")
        assert lines[0] == (
            "load a/1: the model's process died while it loaded (Stub process 'a_0' is not healthy.); "
            "the last lines of the log follow"
        )
        assert lines[-1] == f"    log: build/log/server-{os.getpid()}.log"
        # It is not loaded again by this server: after some failures, tritonserver would not survive that.
        with pytest.raises(ServerError) as again:
            running.load("a")
        assert again.value is caught.value
        running.load("b")


def test_a_server_that_ends_while_it_loads(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def kill() -> None:
        assert eventually(lambda: len(named(tmp_path, "triton_python_backend_stub")) > 0)
        next(process for process, line in processes(tmp_path) if line[0].endswith("tritonserver")).kill()

    with server.embedded(models, tmp_path / "build") as running:
        assert not running.has_ended()
        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(ServerError) as caught:
            running.load("a")
        killer.join()
        assert running.has_ended()

    lines = str(caught.value).split("\n")
    assert lines[0] == "load a: tritonserver itself ended while it loaded the model; the last lines of its log follow"
    assert "    tritonserver ended with status 137" in lines
    assert lines[-1] == f"    log: build/log/server-{os.getpid()}.log"


def test_models_that_do_not_fit_are_loaded_one_after_the_other(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server.embedded(models, tmp_path / "build") as running:
        assert isinstance(running, server._Embedded)
        assert running._next_wave(["a", "b", "c"], keep=()) == ["a", "b", "c"]
        monkeypatch.setattr(server, "_free_memory", lambda: running._needs("a") * 2)
        assert running._next_wave(["a", "b", "c"], keep=()) == ["a", "b"]

        running.load("a")
        monkeypatch.setattr(server, "_free_memory", lambda: 0)
        running.load("b", "c")

        assert held(models, tmp_path) == ["b", "c"]  # "a" was waited for


def test_a_model_that_was_let_go_is_loaded_again(models: Path, tmp_path: Path) -> None:
    with server.embedded(models, tmp_path / "build") as running:
        running.load("a", "b")
        running.load("c")
        assert held(models, tmp_path) == ["a", "b", "c"]
        running.keep("b")
        running.load("a")  # whose process is still ending: tritonserver would end with it
        assert [running.versions(name) for name in "abc"] == [["1"], ["1"], []]
        assert held(models, tmp_path) == ["a", "b"]


def held(models: Path, scratch: Path) -> list[str]:
    """Return the models that have a process."""
    lines = [process.cmdline()[1] for process in named(scratch, "triton_python_backend_stub")]
    return sorted(line.removeprefix(f"{models}/").removesuffix("/1/model.pt") for line in lines)


def test_what_a_model_needs(models: Path, tmp_path: Path) -> None:
    size = (models / "a" / "1" / "model.pt").stat().st_size
    add(models, "two", CONFIG + "instance_group {{ count: 2 }}")
    with server.embedded(models, tmp_path / "build") as running:
        assert isinstance(running, server._Embedded)
        assert running._needs("a") == 350 * 2**20 + 2 * size
        assert running._needs("two") == 2 * (350 * 2**20 + 2 * size)
        assert running._needs("absent") == 0


# --------------------------------------------------------------------------------------------------------------- URLs


def test_a_url_that_is_not_reachable() -> None:
    with taken() as listener:
        url = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(ServerError) as caught, server.at(f"http://{url}"):
        pass

    assert str(caught.value) == f"server {url}: cannot be reached: Connection refused"


@pytest.mark.parametrize("url", ["localhost", "https://localhost:8000", "http://localhost:8000/models", ""])
def test_what_is_not_an_address(url: str) -> None:
    with pytest.raises(ServerError) as caught, server.at(url):
        pass

    assert str(caught.value) == (f"server {url}: not an address of a server; expected host:port or http://host:port")


def test_a_url_of_something_else() -> None:
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Page) as page:
        threading.Thread(target=page.serve_forever, daemon=True).start()
        url = f"127.0.0.1:{page.server_port}"
        with pytest.raises(ServerError) as caught, server.at(url):
            pass
        page.shutdown()

    assert str(caught.value) == f"server {url}: /v2 was not answered in JSON; is this a Triton server?"


# -------------------------------------------------------------------------------------------------------------- others


def test_what_takes_two_seconds_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with server.slow("doing nothing"):
        pass
    with server.slow("waiting"):
        time.sleep(2.2)

    assert capsys.readouterr().out == "   waiting ...\n"


def test_the_oldest_logs_are_removed(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"server-{i}.log").touch()
        os.utime(tmp_path / f"server-{i}.log", (i, i))
    gone = tmp_path / "server-gone.log"  # listed, and not there: another process has removed it meanwhile
    gone.symlink_to("nowhere")

    assert server._new_log(tmp_path) == tmp_path / f"server-{os.getpid()}.log"
    gone.unlink()
    assert len(list(tmp_path.iterdir())) == 20
    assert (tmp_path / "server-29.log").exists()


def test_server_imports_neither_the_client_nor_torch() -> None:
    code = (
        "import sys; from tritonbuild import server, embedded; "
        "print({'numpy', 'torch', 'tritonclient', 'pytriton'} & {name.split('.')[0] for name in sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
