"""Decides how a store that is shared with other machines is asked: with time-outs, and never so that a build fails.

Any fsspec URL, or a folder. Every question runs in a thread of its own and is given up when it takes too long; after
the first fault the store is not asked again in this run, and one warning says why. An object appears whole: object
stores put it at once, elsewhere it is written under another name and moved. fsspec is imported when a question is
asked, which a run with nothing to do never does.

Source: https://filesystem-spec.readthedocs.io; docs/ci.md.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonbuild import state
from tritonbuild.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    # A question, given its own job, the file system and the path of the store in it.
    _Ask = Callable[["_Job", Any, str], Any]

TIME_OUT_S = 10.0
"""How long one answer may take: a list, a description, one piece of a blob."""
PIECE_BYTES = 4 << 20
_SPAN_BYTES = 16 << 20
_MOST_SPANS = 8
_SLOWEST_BYTES_PER_S = 1e6
_JUDGE_AFTER_S = 5.0

_WHOLE_BY_NATURE = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "memory"}
_INSTALL = {"s3": 's3fs: pip install "tritonbuild[s3]"', "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
# The SDK's own patience (five attempts of up to a minute each) is longer than a build.
_S3 = {"connect_timeout": 5, "read_timeout": TIME_OUT_S, "retries": {"max_attempts": 2}}


class _FaultError(Exception):
    """The shared store did not do what was asked of it."""


@dataclass
class _Job:
    """A question that runs in a thread of its own: the main thread must be able to walk away from it."""

    ask: _Ask
    store: Any
    base: str
    answer: Any = None
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)
    bytes: int = 0
    heard: float = field(default_factory=time.monotonic)
    limit_s: float = field(default_factory=lambda: TIME_OUT_S)

    def run(self) -> None:
        try:
            self.answer = self.ask(self, self.store, self.base)
        except BaseException as error:  # noqa: BLE001  whatever it is, it must reach the main thread
            self.error = error
        self.done.set()

    def progress(self, count: int) -> None:
        self.bytes += count
        self.heard = time.monotonic()


class Remote:
    """A store that other machines use too.

    Args:
        url: A folder, relative to the project unless absolute, or an fsspec URL.
        root: The project's folder.
    """

    def __init__(self, url: str, root: Path) -> None:
        self.url = url
        self.root = root
        self.where = f"store {re.sub('//[^/@]*@', '//', url)}"
        # All processes of one run of doit (-n 4) share the opinion that the store is down, and the warning.
        self._fault = root / ".build" / "tmp" / f"store-fault-{state.current().opened_by}"
        self._is_down = False
        self._may_write = True
        self._wrong: set[str] = set()
        self._opened: tuple[int, Any, str] | None = None

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder of the store; none when there is no such folder, or no answer."""

        def ask(_: _Job, store: Any, base: str) -> list[str]:
            with contextlib.suppress(FileNotFoundError):
                # Not `ls`: where there is no such folder, s3fs lists the one above it, which holds every result.
                found = store.find(f"{base}/{folder}", detail=False)
                names = sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)
                return [name for name in names if not name.startswith(".")]  # what a killed run has left half-written
            return []

        return self._one(ask) or []

    def read(self, path: str) -> bytes | None:
        """Return the content of a small file, or None when it is not there, or there is no answer."""

        def ask(_: _Job, store: Any, base: str) -> bytes | None:
            with contextlib.suppress(FileNotFoundError):
                return bytes(store.cat_file(f"{base}/{path}"))
            return None

        content: bytes | None = self._one(ask)
        return content

    def get(self, files: Mapping[str, tuple[Path, int]], limit_s: float) -> bool:
        """Copy files of the store to local paths.

        Args:
            files: Path in the store -> (local path, size in bytes).
            limit_s: What making them anew is thought to take: when the copy would take longer, it is given up.

        Returns:
            Whether all are there. Their content is the caller's to verify.
        """

        def copy(path: str, to: Path, span: range) -> _Ask:
            def ask(job: _Job, store: Any, base: str) -> None:
                with to.open("r+b") as out:
                    out.seek(span.start)
                    while (start := span.start + job.bytes) < span.stop:
                        piece = store.cat_file(f"{base}/{path}", start=start, end=min(span.stop, start + PIECE_BYTES))
                        if not piece:
                            return  # shorter than described: the digest will tell
                        out.write(piece)
                        job.progress(len(piece))

            return ask

        for to, _ in files.values():
            to.touch()
        asks = [copy(path, to, span) for path, (to, size) in files.items() for span in _spans(size)]
        return self._all(asks, sum(size for _, size in files.values()), limit_s) is not None

    def put(self, files: Mapping[str, Path]) -> bool:
        """Copy local files into the store, except those that it holds with that size; return whether all are there."""

        def copy(path: str, source: Path) -> _Ask:
            def ask(job: _Job, store: Any, base: str) -> None:
                job.limit_s += source.stat().st_size / _SLOWEST_BYTES_PER_S
                with contextlib.suppress(FileNotFoundError):
                    if path not in self._wrong and store.info(f"{base}/{path}")["size"] == source.stat().st_size:
                        return
                _whole(store, f"{base}/{path}", lambda to: store.put_file(str(source), to))

            return ask

        return self._put([copy(path, source) for path, source in files.items()])

    def write(self, path: str, content: bytes) -> bool:
        """Write a small file; return whether it is there."""

        def ask(_: _Job, store: Any, base: str) -> None:
            _whole(store, f"{base}/{path}", lambda to: store.pipe_file(to, content))

        return self._put([ask])

    def wrong(self, path: str, what: str) -> None:
        """Say that something in the store is not what it should be. It is replaced when it has been made anew."""
        self._wrong.add(path)
        self._warn(f"{path} {what}", "it is made here instead, and replaced where the store may be written")

    # -------------------------------------------------------------------------------------------------------------

    def _open(self) -> tuple[Any, str]:
        if self._opened is None or self._opened[0] != os.getpid():  # a forked child opens its own
            try:
                from fsspec.config import conf
                from fsspec.core import url_to_fs

                url = self.url
                if "://" not in url and "::" not in url:
                    url = str(self.root / Path(url).expanduser())
                protocol = url.partition("://")[0].rpartition("::")[2] if "://" in url else "file"
                options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
                if protocol in {"s3", "s3a"}:
                    options["config_kwargs"] = {**_S3, **conf.get("s3", {}).get("config_kwargs", {})}
                    options["max_concurrency"] = 1  # with more, s3fs asks for the size before it reads anything
                if protocol == "file":
                    options["auto_mkdir"] = True
                files, base = url_to_fs(url, **options)
            except ImportError as error:
                needed = _INSTALL.get(self.url.partition("://")[0])
                raise _FaultError(f"needs {needed}" if needed else str(error)) from None
            except Exception as error:  # noqa: BLE001  any library may stand behind the URL
                raise _FaultError(_first_line(error)) from None
            self._opened = (os.getpid(), files, base.rstrip("/"))
        return self._opened[1], self._opened[2]

    def _one(self, ask: _Ask) -> Any:
        answers = self._all([ask])
        return answers[0] if answers else None

    def _put(self, asks: list[_Ask]) -> bool:
        if not self._may_write:
            return False
        try:
            return self._all(asks, raising=PermissionError) is not None
        except PermissionError as error:
            self._may_write = False
            self._warn(
                f"may not be written: {_first_line(error)}", "TRITONBUILD_STORE=read-only says that it shall not be"
            )
            return False

    def _all(
        self,
        asks: list[_Ask],
        total: int = 0,
        limit_s: float | None = None,
        raising: type[Exception] | tuple[()] = (),
    ) -> list[Any] | None:
        """Ask all at once; return the answers, or None when one of them is missing."""
        if self._is_down or self._fault.exists():
            return None
        try:
            files, base = self._open()
            return _answers([_Job(ask, files, base) for ask in asks], total, limit_s)
        except raising:
            raise
        except _FaultError as error:
            what = str(error)
        except FileNotFoundError as error:
            what = f"no such object: {_first_line(error)}"
        except Exception as error:  # noqa: BLE001  any library may stand behind the URL
            what = _first_line(error)
        self._is_down = True
        self._warn(what, "what it may hold is made here; what is made here is not shared in this run")
        return None

    def _warn(self, what: str, advice: str) -> None:
        with contextlib.suppress(OSError):
            self._fault.parent.mkdir(parents=True, exist_ok=True)
            if self._is_down:
                self._fault.touch()
            try:
                self._fault.with_suffix(".said").touch(exist_ok=False)
            except FileExistsError:
                return
        sys.stdout.flush()
        sys.stderr.write(f"   warning: {StoreError(self.where, what, advice)}\n")
        sys.stderr.flush()


def _spans(size: int) -> list[range]:
    """Return the parts of a blob that are copied side by side: one connection rarely fills the line."""
    length = max(_SPAN_BYTES, -(-size // _MOST_SPANS))
    return [range(start, min(size, start + length)) for start in range(0, size, length)]


def _answers(jobs: list[_Job], total: int, limit_s: float | None) -> list[Any]:
    started = time.monotonic()
    for job in jobs:
        threading.Thread(target=job.run, daemon=True).start()
    for job in jobs:
        while not job.done.wait(0.2):
            _judge(jobs, time.monotonic() - started, total, limit_s)
        if job.error is not None:
            raise job.error
    return [job.answer for job in jobs]


def _judge(jobs: list[_Job], elapsed_s: float, total: int, limit_s: float | None) -> None:
    now = time.monotonic()
    for job in jobs:
        if not job.done.is_set() and now - job.heard > job.limit_s:
            raise _FaultError(f"no answer within {job.limit_s:.0f} s")
    copied = sum(job.bytes for job in jobs)
    too_slow = limit_s is not None and 0 < copied < total and elapsed_s * total / copied > limit_s
    if too_slow and elapsed_s > _JUDGE_AFTER_S:
        raise _FaultError(f"too slow: {copied / elapsed_s / 1e6:.2g} MB/s for {total / 1e6:.0f} MB")


def _whole(store: Any, path: str, write: Callable[[str], object]) -> None:
    protocol = store.protocol if isinstance(store.protocol, str) else store.protocol[0]
    if protocol in _WHOLE_BY_NATURE:
        write(path)
        return
    folder, _, name = path.rpartition("/")
    new = f"{folder}/.new-{uuid.uuid4().hex}-{name}"
    store.makedirs(folder, exist_ok=True)
    write(new)
    store.mv(new, path)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return re.sub(r"\?[^\s\"]+", "", lines[0])[:200] if lines else type(error).__name__
