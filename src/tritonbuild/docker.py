"""Decides whether a Docker engine can be used, and what its complaints mean.

Hides the `docker` command: where it connects, its long-running commands and their log, and that it may be podman's.
An error is one line in our words with the engine's own line behind it, whichever builder or registry said it.

Source: docs.docker.com/reference/cli/docker; podman-run(1) and podman-build(1), read, not run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlparse

from tritonbuild.errors import BuildError, ImageError

if TYPE_CHECKING:
    from collections.abc import Sequence

_SOCKET = "unix:///var/run/docker.sock"
_NO_COMMAND = 'there is no "docker" command on PATH'


class Done(NamedTuple):
    """A docker command that has ended."""

    code: int
    printed: str
    complaint: str


def reachable() -> str | None:
    """Return why no Docker engine can be used, in one line, or None when one answers.

    Costs a millisecond where the engine has a local socket. Other ways (ssh, a docker context, podman) are left to
    the docker command, for ten seconds at most.
    """
    if shutil.which("docker") is None:
        return f"no Docker engine: {_NO_COMMAND}"
    endpoint = _endpoint()
    if endpoint.startswith("unix://") and not is_podman():
        return _ping(endpoint.removeprefix("unix://"))
    try:
        done = ask("ps", "--quiet", timeout_s=10)
    except subprocess.TimeoutExpired:
        return f"no Docker engine: {endpoint} did not answer for 10 s"
    return None if done.code == 0 else f"no Docker engine: {_last_line(done.complaint)}"


def is_podman() -> bool:
    """Return whether `docker` is podman: Debian's podman-docker is a short shell script, others link the program."""
    program = Path(shutil.which("docker") or "docker")
    with suppress(OSError):
        if program.resolve().name.startswith("podman"):
            return True
        return program.stat().st_size < 4096 and b"podman" in program.read_bytes()
    return False


def host() -> str:
    """Return the host that published ports are on: this one, unless the engine is reached over TCP."""
    endpoint = urlparse(_endpoint())
    return (endpoint.scheme == "tcp" and endpoint.hostname) or "127.0.0.1"


def ask(*arguments: str, timeout_s: float | None = None) -> Done:
    """Run a docker command that may fail."""
    try:
        done = subprocess.run(
            ["docker", *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
        )
    except FileNotFoundError:
        return Done(127, "", _NO_COMMAND)
    return Done(done.returncode, done.stdout, done.stderr)


def run(where: str, arguments: Sequence[str], log: Path) -> str:
    """Run a docker command that takes its time, and return what it printed.

    Args:
        where: The place that an error names.
        arguments: The command's words, without `docker`.
        log: Where everything that it prints is appended while it runs.

    Raises:
        ImageError: The command failed; with the complaint in our words.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with log.open("a+b") as file:
            file.write(f"$ docker {' '.join(arguments)}\n".encode())
            file.flush()
            start = file.tell()
            done = subprocess.run(
                ["docker", *arguments], stdout=file, stderr=file, check=False, stdin=subprocess.DEVNULL
            )
            file.seek(start)
            printed = file.read().decode(errors="replace")
    except FileNotFoundError:
        raise ImageError(where, _NO_COMMAND, "install Docker, or podman with podman-docker") from None
    if done.returncode:
        raise complaint(where, printed, ImageError)
    return printed


def _endpoint() -> str:
    """Return where the docker command connects to: a URL, or `context NAME` for a docker context."""
    host = os.environ.get("DOCKER_HOST")
    if host:
        return host
    context = os.environ.get("DOCKER_CONTEXT")
    if not context:
        with suppress(OSError, ValueError, AttributeError, RuntimeError):  # the last: this user has no home
            folder = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
            context = json.loads((folder / "config.json").read_text()).get("currentContext")
    return f"context {context}" if context and context != "default" else _SOCKET


def _ping(path: str) -> str | None:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(5)
    try:
        with connection:
            connection.connect(path)
            connection.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
            answer = connection.recv(64)
    except FileNotFoundError:
        return f"no Docker engine: {path} does not exist"
    except PermissionError:
        return f"no Docker engine: this user may not use {path}; join its group, usually docker"
    except TimeoutError:
        return f"no Docker engine: {path} did not answer for 5 s"
    except OSError as error:
        return f"no Docker engine: {path}: {(error.strerror or str(error)).lower()}"
    return None if answer.split()[1:2] == [b"200"] else f"no Docker engine: {path} answered {answer[:40]!r}"


# ------------------------------------------------------------------------------------------------- complaints


class _Complaint(NamedTuple):
    what: str
    advice: str
    patterns: tuple[str, ...]


# The engine, its registry client and both builders word one failure differently. The first match wins.
_COMPLAINTS = (
    _Complaint(
        "the disk of the Docker engine is full",
        "`docker system df` shows what takes the room, `docker system prune` frees some",
        ("no space left on device",),
    ),
    _Complaint(
        "this user may not use the Docker engine",
        "join the group of its socket, usually docker",
        ("permission denied while trying to connect",),
    ),
    _Complaint(
        "the Docker engine does not answer",
        "start it, or point DOCKER_HOST at one that runs",
        ("cannot connect to the docker daemon", "error during connect", "connection reset by peer", "unexpected EOF"),
    ),
    _Complaint(
        "DOCKER_BUILDKIT asks for BuildKit, and docker has no buildx",
        "install buildx, or unset DOCKER_BUILDKIT",
        ("buildx component is missing",),
    ),
    _Complaint(
        "the image would have more layers than the engine allows",
        "take a base image with fewer layers",
        ("max depth exceeded",),
    ),
    _Complaint(
        "the Docker engine has no access to the GPU",
        "install NVIDIA's container toolkit, or say `device: cpu` in pipeline.yaml",
        ("could not select device driver", "unknown or invalid runtime name: nvidia", "unresolvable CDI devices"),
    ),
    _Complaint(
        "the port is taken by another program",
        "stop that program, or choose another port",
        ("port is already allocated", "address already in use"),
    ),
    _Complaint(
        "the image has no such program",
        "take a Triton image as the base",
        ("executable file not found",),
    ),
    _Complaint(
        "the registry does not speak HTTPS",
        "give it a certificate, or add it to the engine's insecure-registries",
        ("server gave HTTP response to HTTPS client",),
    ),
    _Complaint(
        "the registry cannot be reached",
        "check its name, the network and the engine's proxy",
        (
            "no such host|server misbehaving|network is unreachable|connection refused",
            "i/o timeout|TLS handshake timeout|request canceled|deadline exceeded",
            "certificate",
        ),
    ),
    _Complaint(
        "there is no such image, or the registry does not show it to this user",
        "check its name and tag; `docker login` if it is private",
        (
            "manifest unknown|manifest for .* not found|name unknown|: not found|No such image",
            "repository does not exist|repository .* not found|pull access denied|invalid reference format",
        ),
    ),
    _Complaint(
        "the registry refuses this user",
        "`docker login` there first",
        (
            "unauthorized|authentication required|no basic auth credentials|insufficient_scope",
            "access to the resource is denied|403 Forbidden|^denied",
        ),
    ),
)


def complaint(where: str, printed: str, error: type[BuildError]) -> BuildError:
    """Return the error for what a failed docker command printed."""
    for known in _COMPLAINTS:
        for line in printed.splitlines():
            if any(re.search(pattern, line, re.IGNORECASE) for pattern in known.patterns):
                return error(where, f"{known.what}: {_bare(line)}", known.advice)
    return error(where, _last_line(printed))


def _last_line(printed: str) -> str:
    lines = [line for line in printed.splitlines() if line.strip() and "--help" not in line]
    return _bare(lines[-1]) if lines else "docker failed and said nothing"


def _bare(line: str) -> str:
    """Return the line without the command's own prefixes."""
    prefixes = r"^(docker: |ERROR: |Error response from daemon: |error: )+"
    return re.sub(prefixes, "", line.strip(), flags=re.IGNORECASE).rstrip(".")
