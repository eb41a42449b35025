"""Decides what is remembered between two runs: one SQLite file, `.build/state.sqlite`.

Three tables: doit's own memory of successful tasks (as a doit backend), the parts of their action keys, which are read
only when a difference is to be named, and the digests of files. A task is written
when it succeeds, not when the run ends: what was finished before a SIGKILL is not done again. A file that SQLite
cannot read is set aside with a warning; forgetting is always right, it only costs time.

Source: doit's backend interface (doit.dependency.SqliteDB), https://sqlite.org/wal.html.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import stat
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from doit.exceptions import InvalidCommand

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_TABLES = """
create table if not exists tasks (name text primary key, data text not null) without rowid;
create table if not exists parts (name text primary key, data text not null);
create table if not exists files (
    path text primary key, size int not null, ctime_ns int not null, inode int not null, digest text not null
) without rowid;
"""

_FORMAT = 2
_ADVICE = "    free space, or make it writable for this user"

# A file may change again within the resolution of its time stamp, with the same size. A digest taken this shortly
# after the last change is therefore not trusted the next time (git calls such entries racy).
_SETTLED_NS = 2_000_000_000


class State:
    """The backend that doit is given: `backend: tritonbuild`, `dep_file: .build/state.sqlite`.

    Args:
        name: Path of the SQLite file; its folder is made.
    """

    desc: ClassVar[str] = "tritonbuild's memory: written after each task"

    def __init__(self, name: str, codec: object = None, *, module_name: str | None = None) -> None:
        del codec, module_name  # doit passes them to every backend; JSON is part of this file's format
        self.name = name
        self.opened_by = os.getpid()
        self._said = False
        self._connection = _connect(Path(name))
        self._tasks: dict[str, dict[str, Any]] = {}
        self._texts: dict[str, str] = {}
        self._new_parts: dict[str, Any] = {}
        self._refreshed: set[str] = set()
        self.files = FileDigests(self._connection)
        self.reload()
        global _current
        _current = self

    def reload(self) -> None:
        """Read again what another process has written meanwhile."""
        self._tasks.clear()
        self._refreshed.clear()
        self._texts = dict(self._connection.execute("select name, data from tasks"))
        self.files.reload()

    def _task(self, task_id: str) -> dict[str, Any]:
        task = self._tasks.get(task_id)
        if task is None:
            text = self._texts.get(task_id)
            task = self._tasks[task_id] = json.loads(text) if text else {}
            if text:
                self._texts[task_id] = ""  # it is known, and once in memory
        return task

    def get(self, task_id: str, dependency: str) -> Any:
        """Return what was stored, or None. The result of a task of ours, for doit's result_dep, is its key."""
        task = self._task(task_id)
        if dependency == "result:" and "result:" not in task:
            return task.get("_values_:", {}).get("key")
        return task.get(dependency)

    def set(self, task_id: str, dependency: str, value: object) -> None:
        """Store a value. doit writes `deps:` last for a successful task: then the task goes to disk."""
        task = self._task(task_id)
        if dependency == "_values_:" and isinstance(value, dict) and "parts" in value:
            self._new_parts[task_id] = value["parts"]
            value = {name: known for name, known in value.items() if name != "parts"}
        if dependency == "result:" and "key" in task.get("_values_:", {}):
            return  # the key says the same in less: see `get`
        task[dependency] = value
        if dependency in {"deps:", "ignore:"}:
            text = json.dumps(task)
            self._texts[task_id] = ""
            with self._writing():
                self._connection.execute("insert or replace into tasks values (?, ?)", (task_id, text))
                if task_id in self._new_parts:
                    parts = json.dumps(self._new_parts.pop(task_id))
                    self._connection.execute("insert or replace into parts values (?, ?)", (task_id, parts))
                self.files.flush()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Commit what is written in the block. What cannot be written is forgotten, which only costs time."""
        try:
            with self._connection:
                yield
        except sqlite3.OperationalError as error:
            if not self._said:
                self._said = True
                sys.stderr.write(f"   warning: {self.name}: {error}\n    what this run finishes is done again\n")

    def refresh(self, task_id: str, same_while: str) -> None:
        """Note under which digest a task that did not run was found up to date; it is written when the run ends."""
        self._task(task_id)["_values_:"]["same_while"] = same_while
        self._refreshed.add(task_id)

    def _write_refreshed(self) -> None:
        for name in self._refreshed:
            row = self._connection.execute("select data from tasks where name = ?", (name,)).fetchone()
            now = json.loads(row[0]) if row else {}
            # A command that holds no lock must not undo what a run has written meanwhile.
            if now.get("_values_:", {}).get("key") == self._tasks[name]["_values_:"]["key"]:
                now["_values_:"]["same_while"] = self._tasks[name]["_values_:"]["same_while"]
                self._connection.execute("update tasks set data = ? where name = ?", (json.dumps(now), name))

    def parts(self, task_id: str) -> dict[str, Any]:
        """Return the parts of the action key with which the task last succeeded; none if it is not known."""
        row = self._connection.execute("select data from parts where name = ?", (task_id,)).fetchone()
        return dict(json.loads(row[0])) if row else {}

    def in_(self, task_id: str) -> bool:
        """Return whether anything is known of the task."""
        return bool(self._tasks.get(task_id)) or task_id in self._texts

    def remove(self, task_id: str) -> None:
        """Forget one task."""
        known = self._texts.pop(task_id, None)
        self._tasks.pop(task_id, None)
        if known is not None:
            with self._connection:
                self._connection.execute("delete from tasks where name = ?", (task_id,))

    def remove_all(self) -> None:
        """Forget every task. Digests of files stay: they are facts, not results."""
        self._texts.clear()
        self._tasks.clear()
        with self._connection:
            self._connection.execute("delete from tasks")

    def names(self) -> Iterable[str]:
        """Return the tasks that are known."""
        return self._texts.keys()

    def dump(self) -> None:
        """Write what is left and close; doit calls this at the end of a command."""
        with self._writing():
            self._write_refreshed()
            self.files.flush()
        self._connection.close()


_current: State | None = None


def current() -> State:
    """Return the state that this process has opened."""
    if _current is None:
        raise RuntimeError("no state is open: doit opens it before it loads tasks")
    return _current


class FileDigests:
    """sha256 of files by path, hashed once: size, time of change and inode are a short cut, the content is the truth.

    The time of change (ctime), which nobody can set: `cp -p`, `rsync -t` and `tar x` set that of the last write, and
    weights of one architecture have one size.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._here = f"{os.getcwd()}/"
        # Path -> "size.ctime_ns.inode.digest": one text takes a third of the memory of a tuple of four.
        self._known: dict[str, str] = {}
        self._seen: dict[str, str] = {}
        self._once: dict[str, str | None] | None = None
        self._verified: dict[str, str] = {}
        self._new: dict[str, str] = {}

    def reload(self) -> None:
        """Read again what another process has written meanwhile."""
        self._once = {} if self._once is not None else None
        entry = "size || '.' || ctime_ns || '.' || inode || '.' || digest"
        self._known = dict(self._connection.execute(f"select path, {entry} from files"))  # noqa: S608  no input in it

    def nothing_runs_yet(self) -> None:
        """Look at a file once, until a task runs."""
        self._once = {}

    def something_runs(self) -> None:
        """Look at every file again from now on."""
        self._once = None

    def digest(self, path: str | Path) -> str | None:
        """Return the sha256 of the file's content in hexadecimal, or None when there is no such file.

        A folder is none, nor is a link that leads nowhere, nor what may not be read: the task says so that reads it.
        """
        name = os.fspath(path)
        if not name.startswith("/"):
            name = self._here + name  # one name for doit's relative paths and for ours
        if self._once is None:
            return self._digest(name)
        if name not in self._once:
            self._once[name] = self._digest(name)
        return self._once[name]

    def _digest(self, name: str) -> str | None:
        try:
            found = os.stat(name)
        except OSError:
            return None
        if not stat.S_ISREG(found.st_mode):
            return None
        fresh = f"{found.st_size}.{found.st_ctime_ns}.{found.st_ino}."
        known = self._seen.get(name) or self._known.get(name)
        if known is not None and known.startswith(fresh):
            return known[len(fresh) :]
        now_ns = time.time_ns()
        try:
            digest = self._verified.get(_written(found)) or sha256_of(name)
        except OSError:
            return None
        self._seen[name] = fresh + digest
        if now_ns - found.st_ctime_ns > _SETTLED_NS:
            self._new[name] = fresh + digest
        return digest

    def verified(self, path: Path, digest: str) -> None:
        """Take the digest of a file for known in this run, also under the names that are links to it."""
        self._verified[_written(path.stat())] = digest

    def flush(self) -> None:
        """Write what is new; the caller holds the transaction."""
        self._connection.executemany(
            "insert or replace into files values (?, ?, ?, ?, ?)",
            # A name that is not UTF-8 is no text to SQLite: such a file is read in every run.
            [(path, *entry.split(".")) for path, entry in self._new.items() if _is_utf8(path)],
        )
        self._known.update(self._new)
        self._new.clear()


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _written(found: os.stat_result) -> str:
    # A further link to a file changes its ctime.
    return f"{found.st_size}.{found.st_mtime_ns}.{found.st_ino}"


def sha256_of(path: str | Path) -> str:
    """Return the sha256 of the file's content in hexadecimal."""
    hasher = sha256()
    with Path(path).open("rb", buffering=0) as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()


def _connect(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return _open(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError) and "malformed" not in str(error):
                raise
            _set_aside(path, error)
            return _open(path)
    except (OSError, sqlite3.OperationalError) as error:
        raise InvalidCommand(f"{path}: {getattr(error, 'strerror', error)}\n{_ADVICE}") from None


def _set_aside(path: Path, error: sqlite3.DatabaseError) -> None:
    aside = path.with_suffix(".unreadable")
    path.replace(aside)
    for rest in ("-wal", "-shm"):
        Path(f"{path}{rest}").unlink(missing_ok=True)
    sys.stderr.write(f"{path.name}: {error}; set aside as {aside.name}, every task is looked at again\n")


def _open(path: Path) -> sqlite3.Connection:
    # check_same_thread: doit -P thread reads from its threads; its own lock keeps them apart.
    connection = sqlite3.connect(path, timeout=30, check_same_thread=False)
    connection.execute("pragma journal_mode = wal")
    # WAL with NORMAL survives a SIGKILL without losing a commit, and costs no fsync per task.
    connection.execute("pragma synchronous = normal")
    # All is read once, into dicts: a cache of pages beside them is 2 MB for nothing.
    connection.execute("pragma cache_size = -100")
    if connection.execute("pragma user_version").fetchone()[0] != _FORMAT:
        # Written by another version of tritonbuild, or new. What it remembers is forgotten.
        drops = "".join(f"drop table if exists {table};" for table in ("tasks", "parts", "files"))
        connection.executescript(drops + _TABLES)
        connection.execute(f"pragma user_version = {_FORMAT}")
    connection.execute("select count(*) from tasks").fetchone()
    return connection
