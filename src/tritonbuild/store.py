"""Decides where results are kept and found again: action key -> files, here and in a store shared with others.

Two levels, like ccache's direct mode, because all that a result depends on is known only when it has been made. For
what is declared, `index/<base key>/` holds lists of the files and distributions that earlier runs read; with their
content and versions of now each list gives an action key, `results/<key>.json` names the files of that result by
digest, and these lie in `blobs/`. Blobs are written first, then the result, then the list: what can be found is
whole. A blob is digested whenever it is read: a target that was edited by hand and is a link to it counts as a miss.

Hides the folder `.build/store`, its hard links and its limit. The shared store is in `remote`.

Source: https://ccache.dev/manual/latest.html#_the_direct_mode; docs/ci.md.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import time
from dataclasses import replace
from functools import cache, cached_property
from typing import TYPE_CHECKING

from tritonbuild import state
from tritonbuild.errors import StoreError
from tritonbuild.remote import Remote
from tritonbuild.results import Result, parse_reads, parse_result

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from pathlib import Path

    KeyOf = Callable[[Sequence[str], Sequence[str]], str]

LIMIT_BYTES = 20 * 1024**3
"""How large the local store grows, beside the results that are in use."""

_NEW = ".new-"
_PENDING = "pending"
_ABANDONED_S = 24 * 3600


class Store:
    """The results of one project: its own folder, and the shared store if one is declared.

    Args:
        root: The project's folder.
        url: `store:` of pipeline.yaml.
        mode: `read-write`; `read-only`: nothing is put into the shared store; `off`: nothing is found or kept.
        limit_bytes: See LIMIT_BYTES.
    """

    def __init__(
        self, root: Path, url: str | None = None, mode: str = "read-write", limit_bytes: int = LIMIT_BYTES
    ) -> None:
        self.root = root
        self.folder = root / ".build" / "store"
        self.mode = mode
        self.limit_bytes = limit_bytes
        self._url = url
        self._size_bytes: int | None = None
        self._said = False

    @cached_property
    def remote(self) -> Remote | None:
        """The shared store, or None."""
        return Remote(self._url, self.root) if self._url and self.mode != "off" else None

    # ------------------------------------------------------------------------------------------------ find, fetch

    def find(self, base: str, key_of: KeyOf) -> Result | None:
        """Return the stored result that belongs to the content and versions of now; no blob is read.

        Args:
            base: Digest of the parts of the key that are known.
            key_of: Returns the action key for recorded files and distributions as they are now.
        """
        if self.mode == "off":
            return None
        names = self._names(f"index/{base}")
        for name in names:
            listed = parse_reads(self._read(f"index/{base}/{name}"))
            found = parse_result(key := key_of(*listed), self._read(_result_path(key))) if listed else None
            if found is not None:
                return found
        return self._find_remote(self.remote, base, names, key_of) if self.remote else None

    def _find_remote(self, remote: Remote, base: str, names: list[str], key_of: KeyOf) -> Result | None:
        # What is listed here costs the shared store one question, the rest two.
        for name in [*names, *(name for name in remote.names(f"index/{base}") if name not in names)]:
            path = f"index/{base}/{name}"
            text = self._read(path) if name in names else remote.read(path)
            listed = parse_reads(text)
            if listed is not None:
                path = _result_path(key := key_of(*listed))
                text = remote.read(path)
                found = parse_result(key, text, remote=True)
                if found is not None:
                    return found
            if text is not None:
                remote.wrong(path, "is not what tritonbuild wrote")
        return None

    def missing_bytes(self, result: Result) -> int:
        """Return how many bytes would come from the shared store."""
        return sum(size for digest, size in result.files.values() if _size(self.folder / _blob_path(digest)) != size)

    def fetch(self, result: Result, out: Path) -> bool:
        """Put the files of a result into the folder `out`, as links to the store where the file system has links.

        Returns:
            Whether all are there and have the right digests. Otherwise the result must be made again.
        """
        try:
            wanted = {digest: size for digest, size in result.files.values() if not self._holds(digest, size)}
            if wanted and not self._download(result, wanted):
                return False
            for name, (digest, _) in result.files.items():
                link(self.folder / _blob_path(digest), out / name)
            if result.remote:
                self._keep(result)
            else:
                with contextlib.suppress(OSError):
                    os.utime(self.folder / _result_path(result.key))  # what was used last is collected last
        except OSError as error:
            self._say(error)
            return False
        return True

    def _holds(self, digest: str, size: int) -> bool:
        blob = self.folder / _blob_path(digest)
        if _size(blob) is None:
            return False
        if _size(blob) == size and state.sha256_of(blob) == digest:
            state.current().files.verified(blob, digest)
            return True
        blob.unlink(missing_ok=True)
        sys.stdout.write(f"   store: a file of a result was changed by hand or damaged; {blob.name[:12]} is removed\n")
        return False

    def _download(self, result: Result, wanted: dict[str, int]) -> bool:
        if self.remote is None:
            return False
        scratch = self.root / ".build" / "tmp" / f"store-{os.getpid()}-{time.monotonic_ns()}"
        scratch.mkdir(parents=True)
        try:
            files = {_blob_path(digest): (scratch / digest, size) for digest, size in wanted.items()}
            if not self.remote.get(files, limit_s=30 + 2 * result.seconds):
                return False
            for digest, size in wanted.items():
                if _size(scratch / digest) != size or state.sha256_of(scratch / digest) != digest:
                    self.remote.wrong(_blob_path(digest), "has other bytes than its name says")
                    return False
            for digest in wanted:
                self._adopt(scratch / digest, digest)
                state.current().files.verified(self.folder / _blob_path(digest), digest)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return True

    # ------------------------------------------------------------------------------------------------- keep, share

    def keep(self, result: Result, out: Path) -> None:
        """Keep a result here: its files, which lie in the folder `out`, become links to the store.

        Never raises for the store's own failures: they are warnings.
        """
        if self.mode == "off":
            return
        try:
            for name, (digest, _) in result.files.items():
                self._adopt(out / name, digest)
            self._keep(result)
            if self._url and self.mode != "read-only":
                _write(self.folder / _PENDING / result.key, b"")
            self._collect_when_large(result)
        except OSError as error:
            self._say(error)

    def share(self) -> None:
        """Put what was kept here into the shared store; what it does not take now, a later run puts there."""
        names = self._names(_PENDING)
        for key in names if self.remote is not None and self.mode != "read-only" else ():
            result = parse_result(key, self._read(_result_path(key)))
            if result is not None and not self._upload(result):
                return
            (self.folder / _PENDING / key).unlink(missing_ok=True)

    def _upload(self, result: Result) -> bool:
        blobs = {path: self.folder / path for path in (_blob_path(digest) for digest, _ in result.files.values())}
        if self.remote is None or not all(blob.exists() for blob in blobs.values()):
            return self.remote is not None  # collected meanwhile: there is nothing left to share
        return (
            self.remote.put(blobs)
            and self.remote.write(_result_path(result.key), result.text())
            and self.remote.write(f"index/{result.base}/{result.reads.name}", result.reads.text())
        )

    def _adopt(self, path: Path, digest: str) -> None:
        """Make the file the blob of this digest; one that is there and whole stays, and the file becomes its link."""
        blob = self.folder / _blob_path(digest)
        if _size(blob) == path.stat().st_size and state.sha256_of(blob) == digest:
            if not blob.samefile(path):
                path.unlink()
                link(blob, path)
            return
        path.chmod(0o444)  # an editor asks before it changes what may be a link to the store
        blob.parent.mkdir(parents=True, exist_ok=True)
        new = blob.with_name(f"{_NEW}{os.getpid()}-{blob.name}")
        new.unlink(missing_ok=True)
        link(path, new)
        new.replace(blob)

    def _keep(self, result: Result) -> None:
        _write(self.folder / _result_path(result.key), replace(result, remote=False).text())
        _write(self.folder / "index" / result.base / result.reads.name, result.reads.text())

    # --------------------------------------------------------------------------------------------------- collection

    def collect(self, limit_bytes: int, in_use: Collection[str]) -> tuple[int, int]:
        """Remove the results that were used longest ago, until the others take no more than the limit.

        Args:
            limit_bytes: For all results that are not in use.
            in_use: Action keys that are never removed.

        Returns:
            How many results were removed, and how many bytes of blobs.
        """
        results = []
        for path in self._files("results"):
            found = parse_result(path.stem, path.read_bytes())
            if found is None:
                path.unlink(missing_ok=True)
            else:
                results.append((path.stem in in_use, path.stat().st_mtime_ns, found))
        kept: dict[str, int] = {}
        lists, size, removed = set(), 0, 0
        for is_used, _, result in sorted(results, key=lambda entry: entry[:2], reverse=True):
            new = {digest: length for digest, length in result.files.values() if digest not in kept}
            if not is_used:
                if size + sum(new.values()) > limit_bytes:
                    (self.folder / _result_path(result.key)).unlink(missing_ok=True)
                    removed += 1
                    continue
                size += sum(new.values())
            kept.update(new)
            lists.add((result.base, result.reads.name))
        for path in self._files("index"):
            if (path.parent.name, path.name) not in lists:
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    path.parent.rmdir()
        return removed, self._remove_blobs(kept)

    def _remove_blobs(self, kept: Collection[str]) -> int:
        freed = 0
        for blob in self._files("blobs"):
            if blob.name not in kept:
                freed += _size(blob) or 0
                blob.unlink(missing_ok=True)
        return freed

    def _files(self, folder: str) -> Iterator[Path]:
        for path in (self.folder / folder).glob("*/*"):
            if not path.name.startswith(_NEW):
                yield path
            elif time.time() - path.stat().st_mtime > _ABANDONED_S:
                path.unlink(missing_ok=True)

    def size_bytes(self) -> int:
        """Return the size of all blobs; those that are targets too, as links, take no disk of their own."""
        return sum(_size(path) or 0 for path in self._files("blobs"))

    def _collect_when_large(self, result: Result) -> None:
        if self._size_bytes is None:
            self._size_bytes = self.size_bytes()
        else:
            self._size_bytes += sum(size for _, size in result.files.values())
        if self._size_bytes > self.limit_bytes:
            # Down to four fifths, so that not every further result looks through the whole store.
            self.collect(self.limit_bytes * 4 // 5, {result.key, *keys_in_use()})
            self._size_bytes = self.size_bytes()

    # ------------------------------------------------------------------------------------------------------ folder

    def _names(self, path: str) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.folder / path) if not name.startswith(_NEW))
        except OSError:
            return []

    def _read(self, path: str) -> bytes | None:
        try:
            return (self.folder / path).read_bytes()
        except OSError:
            return None

    def _say(self, error: OSError) -> None:
        if not self._said:
            self._said = True
            warning = StoreError(error.filename or ".build/store", str(error.strerror), "results are not kept there")
            sys.stderr.write(f"   warning: {warning}\n")


def of(root: Path, url: str | None) -> Store:
    """Return the store of a project as the environment allows it.

    `TRITONBUILD_STORE` may be `read-only` (nothing is put into the shared store) or `off`;
    `TRITONBUILD_STORE_LIMIT` is the limit of the local folder, such as `5G`.

    Raises:
        StoreError: A variable has another value: whoever wanted a store not to be written must know.
    """
    mode = os.environ.get("TRITONBUILD_STORE") or "read-write"
    if mode not in {"read-write", "read-only", "off"}:
        raise StoreError("TRITONBUILD_STORE", f'found "{mode}", expected read-write, read-only or off')
    limit = os.environ.get("TRITONBUILD_STORE_LIMIT")
    return _store(root, url, mode, size_of(limit, "TRITONBUILD_STORE_LIMIT") if limit else LIMIT_BYTES)


# One for all tasks of a run: a bucket's client takes a tenth of a second and ten megabytes to make, and the size of a
# store of thousands of results is not summed up for every one of them.
_store = cache(Store)


def size_of(text: str, where: str) -> int:
    """Return the bytes of a size such as `500M`, `5G` or `0`.

    Raises:
        StoreError: It is none.
    """
    match = re.fullmatch(r"(\d+)([KMGT]?)", text.strip().upper())
    if match is None:
        raise StoreError(where, f'found "{text}", expected a size such as 500M or 5G')
    return int(match[1]) << 10 * " KMGT".index(match[2] or " ")


def keys_in_use() -> set[str]:
    """Return the action keys of the tasks that are remembered as done."""
    memory = state.current()
    values = (memory.get(name, "_values_:") or {} for name in list(memory.names()))
    return {known["key"] for known in values if "key" in known}


def link(source: Path, target: Path) -> None:
    """Make the target the same file as the source, or, where there are no hard links, a copy."""
    try:
        os.link(source, target)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        # Another file system, one without links, or too many links.
        shutil.copy2(source, target)


def _blob_path(digest: str) -> str:
    return f"blobs/{digest[:2]}/{digest}"


def _result_path(key: str) -> str:
    return f"results/{key[:2]}/{key}.json"


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _write(path: Path, text: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{_NEW}{os.getpid()}-{path.name}")
    new.write_bytes(text)
    new.replace(path)
