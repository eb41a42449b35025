"""Decides which Triton servers there are to ask, and what is said when one does not serve a model.

Hides the control protocol: loading as much at a time as cores and memory allow, and where the reason of a failed
load is found (the repository index; for a config.pbtxt that was not accepted, the log alone). How the embedded server
runs is hidden in `embedded`.

Source: triton-inference-server/server, docs/protocol/extension_model_repository.md.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import secrets
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonbuild.errors import ServerError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Sequence

_START_TIMEOUT_S = 60
_LOAD_TIMEOUT_S = 900
_LOGS_KEPT = 20
_INSTANCE_BYTES = 350 * 2**20  # what a model instance has of its own after `import torch` (2.14 with CUDA: 290 MiB)

# No proxy from the environment: the inference client does not use one either.
_HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """A running Triton server.

    Attributes:
        url: `host:port` of its HTTP endpoint.
        kind: `embedded`, `docker` or `url`.
        version: Version of tritonserver.
        log: The file of its output, where it is known.
    """

    def __init__(self, url: str, kind: str, log: Path | None = None) -> None:
        self.url = url
        self.kind = kind
        self.log = log
        self.version = str(self.get("/v2")["version"])

    def get(self, path: str) -> Any:
        """Return the JSON that the server answers to a GET; None for an empty answer."""
        return _ask(self.url, path)

    def versions(self, model: str) -> list[str]:
        """Return the versions of a model that are ready, in order."""
        rows = [row for row in _ask(self.url, "/v2/repository/index", {}) if row["name"] == model]
        return sorted((row["version"] for row in rows if row.get("state") == "READY"), key=int)

    def load(self, *models: str) -> None:
        """Make sure that models are ready. A server that is not ours is not told to load anything.

        Raises:
            ServerError: With the model's own reason.
        """
        index = _ask(self.url, "/v2/repository/index", {})
        for model in models:
            rows = [row for row in index if row["name"] == model]
            if any(row.get("state") == "READY" for row in rows):
                continue
            for row in _failed(rows):
                raise ServerError(f"load {model}/{row['version']}", _reason(row["reason"]))
            known = ", ".join(sorted({row["name"] for row in index})) or "none"
            found = "it has the model, but has not loaded it" if rows else f"its models are: {known}"
            raise ServerError(f"load {model}", f"the server at {self.url} does not serve this model; {found}")

    def has_ended(self) -> bool:
        """Return whether the server was ours and ended by itself."""
        return False

    def keep(self, *models: str) -> None:
        """Let go of all other models, without waiting for it. A server that is not ours keeps what it has."""

    def log_tail(self, lines: int = 12) -> str:
        """Return the last lines of the server's log, without its tables; empty where there is no log."""
        return "" if self.log is None else "\n".join(_lines(self.log)[-lines:])


class _Embedded(Server):
    def __init__(self, url: str, log: Path, repository: Path, process: subprocess.Popen[bytes]) -> None:
        super().__init__(url, "embedded", log)
        self._process = process
        self._path = log
        self._repository = repository
        self._loaded: list[str] = []
        self._leaving: set[str] = set()
        self._failures: dict[str, ServerError] = {}

    def load(self, *models: str) -> None:
        for model in models:
            if model in self._failures:  # to load it again may end the server: a warm-up that failed does
                raise self._failures[model]
        pending = [model for model in dict.fromkeys(models) if model not in self._loaded]
        if not self._leaving.isdisjoint(pending):  # tritonserver can end if it loads what has not ended yet
            self._until_gone()
        while pending:
            wave = self._next_wave(pending, keep=models)
            pending = pending[len(wave) :]
            threads = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
            try:
                with slow(f"loading {', '.join(wave)}"):
                    outcomes = dict(zip(wave, threads.map(self._load_one, wave), strict=True))
            finally:
                threads.shutdown(wait=False, cancel_futures=True)  # a Ctrl-C does not wait for what is loading
            self._failures |= {model: failure for model, failure in outcomes.items() if failure}
            for model in wave:
                if model in self._failures:
                    raise self._failures[model]

    def has_ended(self) -> bool:
        with contextlib.suppress(ServerError):
            self.get("/v2/health/live")
            return False
        deadline = time.monotonic() + 5
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self._process.poll() is not None

    def keep(self, *models: str) -> None:
        for model in [model for model in self._loaded if model not in models]:
            # Answered at once; the model's process takes a second or two to end.
            _ask(self.url, f"/v2/repository/models/{model}/unload", {})
            self._loaded.remove(model)
            self._leaving.add(model)

    def _until_gone(self) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and any(
            row.get("state") == "UNLOADING" for row in _ask(self.url, "/v2/repository/index", {})
        ):
            time.sleep(0.02)
        self._leaving.clear()

    def _next_wave(self, pending: Sequence[str], keep: Sequence[str]) -> list[str]:
        """Return the first models that fit into memory together; make room when there is none for the first."""
        free = _free_memory()
        if self._needs(pending[0]) > free:
            self.keep(*keep)
            self._until_gone()
            free = _free_memory()
        wave = [pending[0]]
        for model in pending[1:]:
            if sum(map(self._needs, [*wave, model])) > free:
                break
            wave.append(model)
        return wave

    def _needs(self, model: str) -> int:
        """Return the bytes that a model's instances will take: each imports torch and reads the weights."""
        folder = self._repository / model
        try:
            counts = re.findall(r"\bcount\s*:\s*(\d+)", (folder / "config.pbtxt").read_text())
        except OSError:
            return 0
        files = [path.stat().st_size for path in folder.glob("*/*") if path.is_file()]
        return max(sum(map(int, counts)), 1) * (_INSTANCE_BYTES * max(len(files), 1) + 2 * sum(files))

    def _load_one(self, model: str) -> ServerError | None:
        logged = self._path.stat().st_size
        try:
            _ask(self.url, f"/v2/repository/models/{model}/load", {}, _LOAD_TIMEOUT_S)
        except ServerError as error:
            if self.has_ended():
                what = "tritonserver itself ended while it loaded the model; the last lines of its log follow"
                lines = [line for line in _lines(self._path, logged) if not re.match(r"\s*\d+# ", line)]
                return ServerError(f"load {model}", what, *lines[-6:], f"log: {shown(self._path)}")
            rows = [row for row in _ask(self.url, "/v2/repository/index", {}) if row["name"] == model]
            for row in _failed(rows):
                return self._failure(f"load {model}/{row['version']}", _reason(row["reason"]))
            with self._path.open(errors="replace") as log:
                log.seek(logged)
                return self._failure(f"load {model}", _poll_failure(model, log.read()) or error.what)
        self._loaded.append(model)
        return None

    def _failure(self, where: str, reason: str) -> ServerError:
        tail = []
        if reason.startswith("Stub process"):
            reason = f"the model's process died while it loaded ({reason}); the last lines of the log follow"
            tail = self.log_tail(6).splitlines()
        return ServerError(where, reason, *tail, f"log: {shown(self._path)}")


@contextmanager
def embedded(repository: Path, build_dir: Path) -> Iterator[Server]:
    """Run the tritonserver of the nvidia-pytriton wheel on a model repository, on loopback and a free port.

    No model is loaded until `load` is called. The server ends with the context, and also when this process ends in
    any other way.

    Args:
        repository: The model repository.
        build_dir: Where the backend directory (`server/<digest>/`) and the log (`log/server-<pid>.log`) are kept.

    Raises:
        ServerError: If this machine cannot run it, or it does not come up.
    """
    from tritonbuild.embedded import tritonserver

    log = _new_log(build_dir / "log")
    for _ in range(5):
        name, url = f"tritonbuild-{secrets.token_hex(4)}", f"127.0.0.1:{_free_port()}"
        logged = log.stat().st_size
        with tritonserver(repository, build_dir, name, int(url.split(":")[1]), log) as process:
            if _came_up(process, name, url, log, logged):
                yield _Embedded(url, log, repository, process)
                return
    raise ServerError("server", "five free ports in a row were taken by others before the server had them")


@contextmanager
def at(url: str) -> Iterator[Server]:
    """Use a server that runs already.

    Args:
        url: `host:port` or `http://host:port` of its HTTP endpoint.

    Raises:
        ServerError: If it is not reachable.
    """
    address = re.fullmatch(r"(?:http://)?([^/:\s]+:\d+)/?", url)
    if address is None:
        raise ServerError(f"server {url}", "not an address of a server; expected host:port or http://host:port")
    yield Server(address[1], "url")


@contextmanager
def slow(what: str) -> Iterator[None]:
    """Say what is being done, once it has taken two seconds."""
    timer = threading.Timer(2.0, lambda: print(f"   {what} ...", flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _ask(url: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = 30) -> Any:
    """Return the JSON that a server answers to a GET, or to a POST of body."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with _HTTP.open(urllib.request.Request(f"http://{url}{path}", data), timeout=timeout_s) as answer:
            text = answer.read()
        return json.loads(text) if text else None
    except urllib.error.HTTPError as error:
        said = "is this a Triton server?"
        with contextlib.suppress(ValueError, KeyError, TypeError):
            said = str(json.loads(error.read())["error"]).strip()
        raise ServerError(f"server {url}", f"{path} was answered {error.code}: {said}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ServerError(
            f"server {url}", f"cannot be reached: {getattr(reason, 'strerror', None) or reason}"
        ) from None
    except ValueError:
        raise ServerError(f"server {url}", f"{path} was not answered in JSON; is this a Triton server?") from None


def _came_up(process: subprocess.Popen[bytes], name: str, url: str, log: Path, logged: int) -> bool:
    """Wait until the server answers; False if somebody else has its port."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    with slow("starting tritonserver"):
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(ServerError, KeyError, TypeError):
                if _ask(url, "/v2", timeout_s=1)["name"] == name:
                    return True
            time.sleep(0.01)
    if process.poll() is not None and "already in use" in "".join(_lines(log, logged)):
        return False
    what = f"is not live after {_START_TIMEOUT_S} s" if process.poll() is None else "ended before it was live"
    tail = _lines(log, logged)[-6:]
    raise ServerError("server", f"tritonserver {what}; the last lines of its log follow", *tail, f"log: {shown(log)}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _new_log(folder: Path) -> Path:
    """Return the path of this run's log; the oldest logs are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    times: dict[Path, float] = {}
    for path in folder.glob("server-*.log"):
        with contextlib.suppress(FileNotFoundError):  # another process of `doit -n` was quicker to remove it
            times[path] = path.stat().st_mtime
    for path in sorted(times, key=times.__getitem__)[: 1 - _LOGS_KEPT]:
        path.unlink(missing_ok=True)
    log = folder / f"server-{os.getpid()}.log"
    log.touch()
    return log


def _lines(log: Path, offset: int = 0) -> list[str]:
    """Return the lines of a log without Triton's tables."""
    with log.open("rb") as file:
        file.seek(offset)
        text = file.read().decode(errors="replace")
    return [line for line in text.splitlines() if line.strip() and line[0] not in "+|"]


def _failed(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Return the rows of a repository index that say why a version is not ready."""
    return [row for row in rows if row.get("state") == "UNAVAILABLE" and row.get("reason", "unloaded") != "unloaded"]


def _reason(text: str) -> str:
    """Return a reason of the repository index without the codes and the frames of the backends."""
    text = text.split("\n\nAt:\n")[0].strip()
    text = re.sub(r"^(Internal|Invalid argument|Unavailable|Unsupported|Not found|Unknown): ", "", text)
    return text.removeprefix("TritonModelException: ")


def _poll_failure(model: str, log: str) -> str:
    """Return why a config.pbtxt was not accepted: the server says it to its log alone."""
    where = rf"(?:Poll failed for model directory|failed to poll model) '{re.escape(model)}': (.*?)\"?$"
    found = re.search(where, log, re.MULTILINE)
    if found is None:
        return ""
    syntax = re.findall(r"Error parsing text-format inference.ModelConfig: (.*)", log)
    return f"config.pbtxt:{syntax[-1]}" if syntax and "text proto" in found[1] else found[1]


def shown(path: Path) -> str:
    """Return a path as a person in the project's folder would write it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _free_memory() -> int:
    """Return the bytes that new processes may take: of the machine, and of the control group that limits us."""
    free = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    bounds = [int(free[1]) * 1024] if free else []
    with contextlib.suppress(OSError, ValueError):  # no control group, or one without a limit ("max")
        group = Path("/sys/fs/cgroup")
        bounds.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return int(0.9 * min(bounds, default=2**62))
