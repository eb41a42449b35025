"""What is remembered between two runs: after a kill, after damage, beside another process, and digests of files."""

from __future__ import annotations

import os
import sqlite3
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tritonbuild import state
from tritonbuild.state import State

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[], State]:
    """Open the state of one project, as another run would."""
    return lambda: State(str(tmp_path / ".build" / "state.sqlite"))


def succeed(memory: State, task: str, values: dict[str, Any], deps: tuple[str, ...] = ()) -> None:
    """Store what doit stores for a task that succeeded, in its order."""
    memory.set(task, "_values_:", values)
    memory.set(task, "checker:", "FileChecker")
    for path in deps:
        memory.set(task, path, "digest of " + path)
    memory.set(task, "deps:", deps)


def test_a_finished_task_is_known_to_the_next_run_although_this_one_never_ends(opened: Callable[[], State]) -> None:
    succeed(opened(), "trace:a/1", {"key": "k", "parts": {"declaration": {"seed": 1}}}, ("a.py",))
    later = opened()
    assert later.get("trace:a/1", "_values_:") == {"key": "k"}
    assert later.get("trace:a/1", "a.py") == "digest of a.py"
    assert later.get("trace:a/1", "deps:") == ["a.py"]
    assert later.parts("trace:a/1") == {"declaration": {"seed": 1}}
    assert list(later.names()) == ["trace:a/1"]


def test_a_task_that_did_not_finish_is_not_known(opened: Callable[[], State]) -> None:
    memory = opened()
    succeed(memory, "trace:a/1", {"key": "old"})
    memory.set("trace:a/1", "_values_:", {"key": "new"})
    assert opened().get("trace:a/1", "_values_:") == {"key": "old"}


def test_forgotten_tasks_are_forgotten(opened: Callable[[], State]) -> None:
    memory = opened()
    for task in ("a", "b", "c"):
        succeed(memory, task, {"key": task})
    memory.remove("a")
    assert sorted(opened().names()) == ["b", "c"]
    memory.remove_all()
    assert list(opened().names()) == []
    assert not memory.in_("b")


def test_what_another_process_finished_meanwhile_is_read_again(opened: Callable[[], State]) -> None:
    waiting, working = opened(), opened()
    succeed(working, "trace:a/1", {"key": "k"})
    assert waiting.get("trace:a/1", "_values_:") is None
    waiting.reload()
    assert waiting.get("trace:a/1", "_values_:") == {"key": "k"}


def test_a_refreshed_value_is_written_only_over_what_was_read(opened: Callable[[], State]) -> None:
    memory = opened()
    for task in ("a", "b"):
        succeed(memory, task, {"key": "1", "same_while": "x"})
    reader = opened()
    for task in ("a", "b"):
        reader.refresh(task, "y")
    succeed(memory, "b", {"key": "2", "same_while": "z"})
    reader.dump()
    later = opened()
    assert later.get("a", "_values_:") == {"key": "1", "same_while": "y"}
    assert later.get("b", "_values_:") == {"key": "2", "same_while": "z"}


@pytest.mark.parametrize("content", [b"not a database, but long enough to be taken for one" * 20, b"SQLite format 3\0"])
def test_a_damaged_file_is_set_aside_and_said(
    opened: Callable[[], State], tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".build").mkdir()
    (tmp_path / ".build" / "state.sqlite").write_bytes(content)
    memory = opened()
    succeed(memory, "a", {"key": "k"})
    assert opened().get("a", "_values_:") == {"key": "k"}
    assert (tmp_path / ".build" / "state.unreadable").read_bytes() == content
    said = capsys.readouterr().err
    assert said.startswith("state.sqlite: ")
    assert said.endswith("; set aside as state.unreadable, every task is looked at again\n")


def test_a_file_damaged_in_its_middle_is_set_aside(opened: Callable[[], State], tmp_path: Path) -> None:
    memory = opened()
    for number in range(2000):
        succeed(memory, f"trace:model{number}/1", {"key": "k" * 64})
    memory.dump()
    path = tmp_path / ".build" / "state.sqlite"
    content = bytearray(path.read_bytes())
    content[4096 : len(content) - 4096] = b"\xff" * (len(content) - 8192)
    path.write_bytes(content)
    assert list(opened().names()) == []


def test_the_memory_of_another_version_of_tritonbuild_is_forgotten(opened: Callable[[], State], tmp_path: Path) -> None:
    succeed(opened(), "a", {"key": "k"})
    connection = sqlite3.connect(tmp_path / ".build" / "state.sqlite")
    connection.execute("pragma user_version = 4711")
    connection.commit()
    connection.close()
    assert list(opened().names()) == []


# ------------------------------------------------------------------------------------------------ digests of files


@pytest.fixture
def a_minute_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at files a minute after they were written: nobody can set the time of their last change."""
    now = time.time_ns
    monkeypatch.setattr(state.time, "time_ns", lambda: now() + 60 * 10**9)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read to be digested, in order."""
    names: list[str] = []
    real = state.sha256_of

    def counting(path: str) -> str:
        names.append(os.path.basename(path))
        return real(path)

    monkeypatch.setattr(state, "sha256_of", counting)
    return names


@pytest.mark.usefixtures("a_minute_later")
def test_a_file_is_read_once_for_all_runs(opened: Callable[[], State], tmp_path: Path, hashed: list[str]) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(b"1")
    for _ in range(3):
        memory = opened()
        assert memory.files.digest(weights) == memory.files.digest(str(weights)) == state.sha256(b"1").hexdigest()
        memory.dump()
    assert hashed == ["weights"]


@pytest.mark.usefixtures("a_minute_later")
def test_a_touched_file_is_read_once_more_and_then_no_more(
    opened: Callable[[], State], tmp_path: Path, hashed: list[str]
) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(b"1")
    for count in (1, 2):
        for _ in range(3):
            memory = opened()
            memory.files.digest(weights)
            memory.dump()
        assert hashed == ["weights"] * count
        time.sleep(0.02)  # the clock of a file system ticks a hundred times a second
        weights.touch()


@pytest.mark.usefixtures("a_minute_later")
@pytest.mark.parametrize("seconds", [-3600, 3600])
def test_a_file_overwritten_by_one_of_its_size_and_time_is_read_again(
    opened: Callable[[], State], tmp_path: Path, seconds: int
) -> None:
    """What `cp -p` leaves of weights that were unpacked from archives with fixed times, also in the future."""
    weights = tmp_path / "weights"
    stamp = time.time_ns() + seconds * 10**9
    for content in (b"first", b"other"):
        weights.write_bytes(content)  # in place: the same inode
        os.utime(weights, ns=(stamp, stamp))
        memory = opened()
        assert memory.files.digest(weights) == state.sha256(content).hexdigest()
        memory.dump()
        time.sleep(0.02)


def test_a_change_within_the_resolution_of_the_clock_is_seen(
    opened: Callable[[], State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system whose clock ticks every two seconds, and did not between the two."""

    def stat_there(name: str) -> SimpleNamespace:
        found = os.stat(name)
        second = time.time_ns() // 10**9 * 10**9
        return SimpleNamespace(
            st_mode=found.st_mode, st_size=found.st_size, st_ino=found.st_ino, st_ctime_ns=second, st_mtime_ns=second
        )

    moment = time.time_ns()
    monkeypatch.setattr(state.time, "time_ns", lambda: moment)
    monkeypatch.setattr(state, "os", SimpleNamespace(**{**vars(os), "stat": stat_there}))
    source = tmp_path / "net.py"
    source.write_bytes(b"first")
    memory = opened()
    first = memory.files.digest(source)
    memory.dump()
    source.write_bytes(b"other")  # as long, the same inode
    assert opened().files.digest(source) != first


def test_a_file_that_may_not_be_read_has_no_digest(
    opened: Callable[[], State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str) -> str:
        raise PermissionError(name)

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(state, "sha256_of", refused)  # root may read everything
    assert opened().files.digest(tmp_path / "file") is None


def test_what_is_no_file_has_no_digest(opened: Callable[[], State], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for name in ("nothing", "file/below", "folder", "loop", "pipe", "x" * 300):
        assert opened().files.digest(tmp_path / name) is None, name
