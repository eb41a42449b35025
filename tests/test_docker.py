"""What is said when an engine cannot be used, and what its complaints are turned into."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tritonbuild import docker
from tritonbuild.errors import ImageError, ServerError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that everybody may enter, with a path short enough for a socket, and a docker command."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    (folder / "bin").mkdir()
    (folder / "bin" / "docker").write_text("#!/bin/sh\nexit 1\n")
    (folder / "bin" / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("DOCKER_CONFIG", str(folder / "config"))
    monkeypatch.delenv("DOCKER_CONTEXT", raising=False)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{folder}/engine")
    yield folder
    shutil.rmtree(folder)


def _answer(path: Path, answer: bytes) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return listener


class TestReachable:
    def test_an_engine_that_answers(self, folder: Path) -> None:
        with _answer(folder / "engine", b"HTTP/1.0 200 OK\r\n\r\nOK"):
            assert docker.reachable() is None

    def test_no_command(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(folder))
        assert docker.reachable() == 'no Docker engine: there is no "docker" command on PATH'
        assert docker.ask("ps") == docker.Done(127, "", 'there is no "docker" command on PATH')
        with pytest.raises(ImageError) as raised:
            docker.run("image vision", ["build"], folder / "log")
        assert str(raised.value) == (
            'image vision: there is no "docker" command on PATH\n    install Docker, or podman with podman-docker'
        )

    def test_no_socket(self, folder: Path) -> None:
        assert docker.reachable() == f"no Docker engine: {folder}/engine does not exist"

    def test_a_socket_that_a_dead_engine_left(self, folder: Path) -> None:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(f"{folder}/engine")
        assert docker.reachable() == f"no Docker engine: {folder}/engine: connection refused"

    def test_something_else_on_the_socket(self, folder: Path) -> None:
        with _answer(folder / "engine", b"HTTP/1.1 404 Not Found\r\n\r\n"):
            assert (
                docker.reachable() == rf"no Docker engine: {folder}/engine answered b'HTTP/1.1 404 Not Found\r\n\r\n'"
            )

    def test_no_right_to_use_the_socket(self, folder: Path) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{folder}/engine")
            listener.listen()
            (folder / "engine").chmod(0)
            user = os.geteuid()
            try:
                if user == 0:
                    os.seteuid(65534)
                assert docker.reachable() == (
                    f"no Docker engine: this user may not use {folder}/engine; join its group, usually docker"
                )
            finally:
                os.seteuid(user)

    def test_a_context_is_left_to_the_command(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("DOCKER_HOST")
        (folder / "config").mkdir()
        (folder / "config" / "config.json").write_text('{"currentContext": "far"}')
        (folder / "bin" / "docker").write_text(
            "#!/bin/sh\necho 'error during connect: lost' >&2; echo \"See 'docker --help'\" >&2; exit 1\n"
        )
        assert docker.reachable() == "no Docker engine: error during connect: lost"
        (folder / "bin" / "docker").write_text("#!/bin/sh\nexit 0\n")
        assert docker.reachable() is None

    def test_a_user_without_a_home(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("DOCKER_HOST", "DOCKER_CONFIG", "DOCKER_CONTEXT", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # as for a number that no user has, in a container
        assert docker._endpoint() == "unix:///var/run/docker.sock"

    def test_podman_has_no_socket(self, folder: Path) -> None:
        (folder / "bin" / "docker").write_text('#!/bin/sh\n[ ps = "$1" ] || exec podman "$@"\n')
        assert docker.is_podman()
        assert docker.reachable() is None

    def test_published_ports_are_where_the_engine_is(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert docker.host() == "127.0.0.1"
        monkeypatch.setenv("DOCKER_HOST", "tcp://docker:2375")
        assert docker.host() == "docker"


# Words of engines, builders and registries that cannot be provoked here; the others are met with real parts in
# test_image.py and test_container.py.
@pytest.mark.parametrize(
    ("said", "what", "advice"),
    [
        (
            "permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock",
            "this user may not use the Docker engine",
            "join the group of its socket, usually docker",
        ),
        (
            'could not select device driver "" with capabilities: [[gpu]]',
            "the Docker engine has no access to the GPU",
            "install NVIDIA's container toolkit, or say `device: cpu` in pipeline.yaml",
        ),
        (
            'Get "https://10.0.0.9:5000/v2/": http: server gave HTTP response to HTTPS client',
            "the registry does not speak HTTPS",
            "give it a certificate, or add it to the engine's insecure-registries",
        ),
        (
            "BuildKit is enabled but the buildx component is missing or broken",
            "DOCKER_BUILDKIT asks for BuildKit, and docker has no buildx",
            "install buildx, or unset DOCKER_BUILDKIT",
        ),
        (
            "max depth exceeded",
            "the image would have more layers than the engine allows",
            "take a base image with fewer layers",
        ),
    ],
)
@pytest.mark.parametrize("prefix", ["", "ERROR: ", "docker: Error response from daemon: "])
def test_complaints_in_our_words(said: str, what: str, advice: str, prefix: str) -> None:
    printed = f"Step 2/9 : ADD versions/a/1.tar /\n{prefix}{said}.\nSee 'docker run --help'.\n"
    assert str(docker.complaint("there", printed, ServerError)) == f"there: {what}: {said}\n    {advice}"


def test_a_complaint_that_is_not_known_is_its_last_line() -> None:
    assert str(docker.complaint("there", "a\nERROR: b.\nSee 'docker run --help'.\n", ServerError)) == "there: b"
    assert str(docker.complaint("there", "", ServerError)) == "there: docker failed and said nothing"
