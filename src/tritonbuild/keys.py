"""Decides when a task is up to date: its action key is unchanged and its targets are what it wrote.

An action key is a digest of named parts: the slice of the declaration that the stage reads, the contents of the files
that it read (recorded by the child that ran it, like a compiler's depfile), the versions of the distributions whose
code ran, the kind of device, the recipe's own source. Never of times, paths outside the project, comments, or the
machine. The parts are kept beside the key, so that a difference can be named. doit alone checks that targets
exist; here they must have the content that was written, so a hand-edited config.pbtxt is made again.

Source: docs/architecture.md; the idea of depfiles is make's and ninja's.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doit.dependency import FileChangedChecker

from tritonbuild import outlines, state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from doit.task import Task

Parts = dict[str, Any]
Stamp = list[int]
_ENCODE = json.JSONEncoder(separators=(",", ":")).encode
_EDITED = "edited while the task ran"


def action_key(parts: Parts) -> str:
    """Return the action key of the parts: 64 hexadecimal digits. The order of keys counts: inputs bind by order."""
    return sha256(_ENCODE(parts).encode()).hexdigest()


def digest(parts: Mapping[str, Any]) -> str:
    """Return a digest of the parts: 64 hexadecimal digits, independent of the order of keys."""
    return sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@cache
def recipe(*modules: str) -> str:
    """Return a digest of the source of modules of ours: a changed recipe makes its results again."""
    hasher = sha256()
    for module in modules:
        hasher.update((Path(__file__).parent / module).read_bytes())
    return hasher.hexdigest()[:16]


@cache
def distribution_version(name: str) -> str:
    """Return the installed version of a distribution, or `absent`."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@cache
def device_kind() -> str:
    """Return `cuda` or `cpu` for this machine, without importing torch: is there a GPU that this process may use?"""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}:
        return "cpu"
    return "cuda" if any(Path("/dev").glob("nvidia[0-9]*")) else "cpu"


def file_digests(root: Path, paths: Iterable[str]) -> dict[str, str | None]:
    """Return path -> sha256 for files relative to the project's root; None where a file is missing."""
    files = state.current().files
    base = f"{root}/"
    return {path: files.digest(base + path) for path in paths}


def stamp(path: str | Path) -> Stamp | None:
    """Return size, time of change and inode of a file, or None; equal ones mean that it was not written in between."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_ctime_ns, found.st_ino]


def edited(root: Path, stamps: Mapping[str, Stamp | None]) -> list[str]:
    """Return the files, relative to the project's root, that do not have the stamp any more."""
    return [path for path, before in stamps.items() if stamp(root / path) != before]


@dataclass(frozen=True)
class Reason:
    """Why a task must run.

    Attributes:
        text: In words, such as `declaration: inputs.image.shape: [1] -> [2]`.
        where: The steps to the part of the key that differs; none when it is not a part.
        before: That part as it was at the last success.
        after: That part now.
    """

    text: str
    where: tuple[str, ...] = ()
    before: Any = None
    after: Any = None

    @classmethod
    def of(cls, where: tuple[str, ...], before: Any, after: Any) -> Reason:
        """Return the reason for a part that differs."""
        steps = ": ".join(filter(None, (where[0], ".".join(where[1:]))))
        return cls(f"{steps}: {_short(before)} -> {_short(after)}", where, before, after)


class UpToDate:
    """An up-to-date check for doit: compares the key of now with that of the last success, then the targets.

    The task's action may return `{"files": [paths], "distributions": [names], "stamps": {path: stamp}}`: what it found,
    while it ran, that its result depends on, and the stamps that these files had when it read them.

    Args:
        root: The project's folder.
        parts: What is known before the task has run. A function, because it may read files.
        targets: Files the task writes, relative to root.
        same_while: A digest of all that `parts` is made from, or None: while it is the same, they are not made again.
    """

    # doit asks for the signature of each check with inspect.signature, which costs as much as all the rest of it.
    __signature__ = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("task", "values")]
    )

    def __init__(
        self, root: Path, parts: Callable[[], Parts], targets: Sequence[str], same_while: str | None = None
    ) -> None:
        self.root = root
        self.parts = parts
        self.targets = targets
        self.same_while = same_while

    def __call__(self, task: Task, values: dict[str, Any]) -> bool:
        """Return whether the task need not run; registers what to remember when it has run."""
        task.value_savers.append(lambda: self._remember(task.values))
        if self.reasons(task.name, values):
            state.current().files.something_runs()
            return False
        return True

    def reasons(self, task: str, values: Mapping[str, Any]) -> list[Reason]:
        """Return why the task must run: each part of its key that differs, or the targets; nothing when up to date."""
        if "key" not in values:
            return [Reason("never finished here, or forgotten")]
        memory = state.current()
        if self.same_while is None or self.same_while != values["same_while"]:
            if action_key(self.parts()) != values.get("base", values["key"]):
                now = self.complete(values["files"], values["distributions"])
                return differences(memory.parts(task), now) or [Reason("the order of what is declared differs")]
            if self.same_while is not None:
                memory.refresh(task, self.same_while)
        digest_of, base = memory.files.digest, f"{self.root}/"
        reasons = [
            Reason.of(("files", path), before, digest_of(base + path))
            for path, before in values["files"].items()
            if digest_of(base + path) != before
        ]
        for name, before in values["distributions"].items():
            if distribution_version(name) != before:
                reasons.append(Reason.of(("distributions", name), before, distribution_version(name)))
        for path, written in values["targets"].items():
            found = digest_of(base + path)
            if found != written:
                reasons.append(Reason(f"{path} is missing" if found is None else f"{path} was changed by hand"))
        if not reasons and len(values["targets"]) != len(self.targets):
            return [Reason("writes other files than before")]
        return reasons

    def complete(self, files: Iterable[str], distributions: Iterable[str]) -> Parts:
        """Return all parts, with the recorded files and distributions as they are now."""
        parts = dict(self.parts())
        if files:
            parts["files"] = file_digests(self.root, files)
        if distributions:
            parts["distributions"] = {name: distribution_version(name) for name in distributions}
        return parts

    def _remember(self, found: dict[str, Any]) -> dict[str, Any]:
        files, distributions = list(found.get("files", ())), list(found.get("distributions", ()))
        parts = self.complete(files, distributions)
        outlines.keep(self.root, parts.get("files", {}))
        for path in edited(self.root, found.pop("stamps", {})):
            # Nobody knows which text the task has read, so it runs again.
            parts["files"][path] = _EDITED
        key, base = action_key(parts), action_key(self.parts())
        return {
            "key": key,
            **({"base": base} if base != key else {}),
            "same_while": self.same_while,
            "parts": parts,
            "files": {path: parts["files"][path] for path in files},
            "distributions": {name: parts["distributions"][name] for name in distributions},
            "targets": file_digests(self.root, self.targets),
        }


def differences(old: Mapping[str, Any], new: Mapping[str, Any], above: tuple[str, ...] = ()) -> list[Reason]:
    """Return each part that differs."""
    found = []
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, (*above, str(key)))
        else:
            found.append(Reason.of((*above, str(key)), before, after))
    return found


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Return the first part that differs, as `declaration: inputs.image.shape: [1] -> [2]`, or None."""
    return next((reason.text for reason in differences(old, new)), None)


def _short(value: object) -> str:
    if value is None:
        return "nothing"
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) == 64 and all(letter in "0123456789abcdef" for letter in text):
        return text[:12]
    return text if len(text) <= 60 else text[:57] + "..."


class FileChecker(FileChangedChecker):  # type: ignore[misc]
    """doit's check of file dependencies, on our digests: content decides, and a file is hashed once.

    A missing file is reported as changed, so that the task runs and says in its own words what is missing.
    """

    _MISSING = "missing"

    def __init__(self) -> None:
        super().__init__()
        self._first: dict[str, str] = {}

    def exists(self, file_path: str) -> bool:
        """Return whether a target exists."""
        return state.current().files.digest(file_path) is not None

    def info(self, file_path: str) -> str:
        """Return the state of the file as it is now."""
        now = state.current().files.digest(file_path) or self._MISSING
        self._first.setdefault(file_path, now)
        return now

    def check_modified(self, file_path: str, file_stat: str, state: str) -> bool:
        """Return whether the state of now differs from the remembered one."""
        del file_path
        return file_stat != state or file_stat == self._MISSING

    def get_state(self, dep: str, current_state: str | None) -> str | None:
        """Return the state to remember, or None when it is remembered already."""
        first = self._first.get(dep)
        now = self.info(dep)
        if first is not None and now != first:
            now = _EDITED  # between the check, before the task ran, and now: the task may have read either
        return None if now == current_state else now
