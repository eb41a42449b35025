"""Decides how a container of the image runs for the smoke test.

It runs as it should in production: read-only root, no capabilities, no new privileges, memory and shared memory
bounded, a port on loopback. Hides that it is removed however this process ends: a watchdog in a session of its own
reads from a pipe, and removes the container when the other end closes, be it by SIGKILL.

Source: Triton's docs/customization_guide/deploy.md; docs.docker.com/reference/cli/docker/container/run.
"""

from __future__ import annotations

import http.client
import os
import re
import subprocess
import time
import uuid
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from tritonbuild import docker, image, keys
from tritonbuild.errors import BuildError, ImageError, ServerError
from tritonbuild.server import Server, slow

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tritonbuild.spec import Pipeline

LABEL = "tritonbuild.smoke"
_START_S = 300.0  # the server of a large repository reads gigabytes before it is ready
_POLL_S = 0.1


class _Container(Server):
    """A server that runs in a container. All models are loaded from the start; model control is off in the image."""

    def __init__(self, where: str, url: str, log: Path, process: subprocess.Popen[bytes]) -> None:
        super().__init__(url, "docker", log)
        self._where = where
        self._process = process

    def load(self, *models: str) -> None:
        """Make sure that the models are ready.

        Raises:
            ServerError: With the model's own reason, or with how the container ended.
        """
        try:
            super().load(*models)
        except ServerError:
            # Connections break a moment before the container is seen to have ended.
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
                raise _ended(self._where, self._process.returncode, self.log) from None
            raise


def _await_ready(where: str, container: str, log: Path, process: subprocess.Popen[bytes]) -> _Container:
    until = time.monotonic() + _START_S
    url = ""
    with slow(f"starting the {where}"):
        while time.monotonic() < until:
            if process.poll() is not None:
                raise _ended(where, process.returncode, log)
            url = url or _published(container)
            if url and _is_ready(url):
                return _Container(where, url, log, process)
            time.sleep(_POLL_S)
    raise ServerError(where, f"not ready after {_START_S:.0f} s", f"log: {log}")


def _published(container: str) -> str:
    addresses = docker.ask("port", container, "8000/tcp").printed.split()
    return f"{docker.host()}:{addresses[0].rpartition(':')[2]}" if addresses else ""


def _is_ready(url: str) -> bool:
    connection = http.client.HTTPConnection(url, timeout=10)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _ended(where: str, code: int, log: Path | None) -> BuildError:
    text = log.read_text(errors="replace") if log else ""
    if code in {125, 126, 127}:  # docker run's own failure, or the command cannot be run
        return docker.complaint(where, text, ServerError)
    # Triton's table of what did not load: | name | version | UNAVAILABLE: reason |
    failed = re.findall(r"^\| (\S+) +\| (\d+) +\| UNAVAILABLE: (.*?) +\|$", text, re.MULTILINE)
    reason = "; ".join(f"{model}/{version} did not load: {why}" for model, version, why in failed)
    tail = [] if reason or code == 137 else [line for line in text.splitlines() if line.strip() and line[0] not in "|+"]
    return ServerError(where, reason or _end_of(code), *tail[-6:], f"log: {log}")


def _end_of(code: int) -> str:
    if code == 137:
        return f"was killed, from outside or for using more than {_memory_bytes() / 2**30:.0f} GiB of memory"
    how = "crashed with a segmentation fault" if code == 139 else f"ended with exit code {code}"
    return f"the server {how}; the last lines of its log follow"


@contextmanager
def server(pipeline: Pipeline) -> Iterator[Server]:
    """Serve the image that the pipeline has built, until the end of the block.

    Raises:
        ImageError: No image was built.
        ServerError: The container does not become ready; with the reason and the place of its log.
    """
    built = image.record(pipeline)
    if built is None:
        raise ImageError("docker server", "no image was built", "`doit image` builds it")
    gpu = pipeline.device == "cuda" or (pipeline.device == "auto" and keys.device_kind() == "cuda")
    with run(built["image"], pipeline.root / ".build" / "log", name=built["tags"][0], gpu=gpu) as running:
        yield running


@contextmanager
def run(image: str, logs: Path, *, name: str, gpu: bool = False, port: int = 0) -> Iterator[Server]:
    """Run a container of a Triton image until the end of the block.

    Args:
        image: The image's id or name; it must be in the engine.
        logs: Folder for the server's log.
        name: What messages call the image.
        gpu: Pass all GPUs.
        port: The port on loopback for HTTP; 0: one that is free.

    Raises:
        ServerError: See `server`.
    """
    container = f"tritonbuild-{uuid.uuid4().hex[:12]}"
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"server-docker-{os.getpid()}.log"
    watchdog = _watchdog(container)
    try:
        with log.open("wb") as file:
            # In a session of its own: a Ctrl-C is for this process, which then ends the container in its own way.
            process = subprocess.Popen(
                ["docker", "run", "--rm", f"--name={container}", *_flags(gpu, port), image],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        try:
            yield _await_ready(f"container of {name}", container, log, process)
        finally:
            _remove(container, process)
    finally:
        _WATCHDOGS.discard(watchdog)
        watchdog.kill()
        watchdog.communicate()


def _flags(gpu: bool, port: int) -> list[str]:
    gpus = ["--device=nvidia.com/gpu=all" if docker.is_podman() else "--gpus=all"] if gpu else []
    # The loopback of an engine elsewhere, such as docker:dind in CI, cannot be reached from here.
    address = "127.0.0.1" if docker.host() in {"127.0.0.1", "localhost"} else "0.0.0.0"  # noqa: S104
    return [
        f"--label={LABEL}={os.getpid()}",
        "--pull=never",
        "--read-only",
        "--tmpfs=/tmp:rw,exec,nosuid,nodev,mode=1777",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--shm-size=1g",
        f"--memory={_memory_bytes()}",
        "--pids-limit=4096",
        f"--publish={address}:{port or ''}:8000",
        *gpus,
    ]


def _memory_bytes() -> int:
    """Three quarters of this machine's memory: a server that runs away must not take the machine with it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4


_WATCHDOGS: set[subprocess.Popen[bytes]] = set()


def _let_go() -> None:
    """In a forked child: close the pipes, which would otherwise keep the containers when the parent is killed."""
    for watchdog in _WATCHDOGS:
        assert watchdog.stdin is not None
        watchdog.stdin.close()


os.register_at_fork(after_in_child=_let_go)


def _watchdog(container: str) -> subprocess.Popen[bytes]:
    """Start a shell that removes the container when this process has ended, however it ended.

    It tries for some seconds, because the container may be in the making at that moment.
    """
    script = 'read -r _; for pause in 0 1 2 4; do sleep $pause; docker rm --force --volumes "$0"; done'
    watchdog = subprocess.Popen(
        ["sh", "-c", script, container],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    _WATCHDOGS.add(watchdog)
    return watchdog


def _remove(container: str, process: subprocess.Popen[bytes]) -> None:
    """Remove the container and wait until the command that runs it has seen that."""
    for _ in range(50):
        docker.ask("rm", "--force", "--volumes", container)
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
            return
    process.kill()
    process.wait()
