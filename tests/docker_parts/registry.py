"""A Docker registry on loopback (Debian's docker-registry), and a count of the bytes that reach it.

The engine talks to a port of this process, which passes everything on to the registry and counts. Engines trust
plain HTTP on 127.0.0.0/8 without being told to.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_CONFIG = """\
version: 0.1
log: {{level: warn}}
storage: {{filesystem: {{rootdirectory: {folder}/data}}}}
http: {{addr: 127.0.0.1:{port}}}
"""
_LOGIN = "auth: {{htpasswd: {{realm: test, path: {folder}/htpasswd}}}}\n"


class Registry:
    """A running registry.

    Attributes:
        address: `127.0.0.1:port`, as it stands in an image's name.
        received: Bytes that were sent to it so far.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.received = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                registry = socket.create_connection(("127.0.0.1", self._port))
                threading.Thread(target=self._pass_on, args=(client, registry, True), daemon=True).start()
                threading.Thread(target=self._pass_on, args=(registry, client, False), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, count: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if count:
                    self.received += len(data)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def running(folder: Path, *, login: bool = False) -> Iterator[Registry]:
    """Run a registry that keeps its data in the folder; with a login, nobody knows the password."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (folder / "htpasswd").write_text("nobody:$2y$05$" + "x" * 53 + "\n")
    config = folder / "config.yml"
    config.write_text((_CONFIG + (_LOGIN if login else "")).format(folder=folder, port=port))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log)
    try:
        _await(port, process, folder / "log")
        registry = Registry(port)
        yield registry
        registry.close()
    finally:
        process.kill()
        process.wait()


def _await(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", "/v2/")
            connection.getresponse()
            return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"docker-registry does not answer: {log.read_text()}")
