"""Decides what a stored result says: its files, by digest, and what it depends on beside what is declared.

Hides the JSON of `results/<key>.json` and of the lists under `index/`. What comes from a store is not trusted: anything
that tritonbuild would not have written is read as nothing, and no path in it leads out of the project.

Source: docs/ci.md, "What lies in a store".
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from tritonbuild import state

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[a-z]+\.[a-z]+")


class Reads(NamedTuple):
    """What a task was found to depend on while it ran.

    Attributes:
        files: Paths relative to the project's root, sorted.
        distributions: Names of installed distributions, sorted.
    """

    files: tuple[str, ...]
    distributions: tuple[str, ...]

    def text(self) -> bytes:
        """Return the content of a list under `index/`."""
        return _json(self._asdict())

    @property
    def name(self) -> str:
        """The name of that list: equal lists have equal names."""
        return f"{sha256(self.text()).hexdigest()[:16]}.json"


@dataclass(frozen=True)
class Result:
    """A stored result.

    Attributes:
        key: The action key.
        base: Digest of the parts of the key that are known before the task runs.
        files: Name -> (sha256, size in bytes).
        reads: What it depends on beside them.
        seconds: How long it took to make.
        remote: Whether it was found in the shared store.
    """

    key: str
    base: str
    files: dict[str, tuple[str, int]]
    reads: Reads
    seconds: float
    remote: bool = False

    def text(self) -> bytes:
        """Return the content of `results/<key>.json`."""
        made = {name: {"sha256": digest, "size": size} for name, (digest, size) in self.files.items()}
        return _json({"base": self.base, **self.reads._asdict(), "seconds": self.seconds, "made": made})


def describe(key: str, base: str, folder: Path, names: Iterable[str], reads: Reads, seconds: float) -> Result:
    """Return the description of a result whose files lie in the folder."""
    files = {name: (state.sha256_of(folder / name), (folder / name).stat().st_size) for name in names}
    return Result(key, base, files, reads, round(seconds, 3))


def parse_reads(text: bytes | None) -> Reads | None:
    """Return what a list says, or None when it is missing or not one."""
    return _reads(_parse(text))


def parse_result(key: str, text: bytes | None, *, remote: bool = False) -> Result | None:
    """Return what a description says, or None when it is missing or not one."""
    data = _parse(text)
    reads = _reads(data)
    try:
        files = {str(name): (made["sha256"], made["size"]) for name, made in data["made"].items()}
        if reads is None or not files or not all(map(_is_file, files.items())) or not _DIGEST.fullmatch(data["base"]):
            return None
        return Result(key, data["base"], files, reads, float(data["seconds"]), remote)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _is_file(entry: tuple[str, tuple[object, object]]) -> bool:
    name, (digest, size) = entry
    return bool(_NAME.fullmatch(name) and _DIGEST.fullmatch(str(digest)) and isinstance(size, int))


def _parse(text: bytes | None) -> dict[str, Any]:
    try:
        data = json.loads(text or b"")
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _reads(data: dict[str, Any]) -> Reads | None:
    files, distributions = data.get("files"), data.get("distributions")
    if not _is_list_of_texts(files) or not _is_list_of_texts(distributions):
        return None
    if not all(map(_is_source, files)):
        return None
    return reads(files, distributions)


def _is_source(name: str) -> bool:
    """Return whether a result may depend on this path: one in the project, or the source of a module beside it."""
    within = re.sub(r"^(\.\./)+", "", name) if name.endswith(".py") else name
    return not within.startswith("/") and ".." not in within.split("/")


def reads(files: Sequence[str], distributions: Sequence[str]) -> Reads:
    """Return both, sorted."""
    return Reads(tuple(sorted(files)), tuple(sorted(distributions)))


def _is_list_of_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, sort_keys=True, separators=(",", ":")) + "\n").encode()
