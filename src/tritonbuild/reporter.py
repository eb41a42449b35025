"""Decides what a run of doit prints, who may run at a time, and the exit code.

doit's own lines stay (`.  trace:resnet18/1` runs, `-- trace:resnet18/1` is up to date); failures are our error texts
without doit's frame around them; a table of the smoke tests and one line of what was left out close the run. One run
at a time per project: the second waits and says for whom.

Source: doit.reporter.ConsoleReporter; exit codes in docs/pipeline.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from doit.exceptions import TaskFailed, UnmetDependency
from doit.reporter import ConsoleReporter
from filelock import FileLock, Timeout

from tritonbuild import state

if TYPE_CHECKING:
    from types import FrameType

    from doit.exceptions import BaseFail
    from doit.task import Task

_PR_SET_PDEATHSIG = 1  # prctl(2)

BUILD = Path(".build")
_LOCK = BUILD / "lock"
_HOLDER = BUILD / "lock.holder"


class Reporter(ConsoleReporter):  # type: ignore[misc]
    """doit's console reporter, with our failures, our closing lines and the lock of the project."""

    desc = "tritonbuild: doit's lines, plain failures, a table of the smoke tests"

    left_out: ClassVar[dict[str, str]] = {}
    """Task -> why this machine cannot run it; filled by the graph, shown once at the end."""

    everything: ClassVar[bool] = True
    """Whether this is a bare doit: no task was named."""

    def __init__(self, outstream: Any, options: dict[str, Any]) -> None:
        super().__init__(outstream, options)
        self.ran: list[str] = []
        self.up_to_date = 0
        self.blocked: list[str] = []
        self.mendable = True
        self.stopped = False
        self.lock = FileLock(_LOCK)

    def initialize(self, tasks: dict[str, Task], selected_tasks: list[str]) -> None:
        """Take the project's lock; called once, before the first task is looked at."""
        super().initialize(tasks, selected_tasks)
        Reporter.everything = len(selected_tasks) == len(tasks)
        state.current().files.nothing_runs_yet()
        os.register_at_fork(after_in_child=_die_with_parent)  # the processes of `doit -n`
        BUILD.mkdir(exist_ok=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            holder = "unknown"
            with contextlib.suppress(FileNotFoundError):  # not written yet, or just removed
                holder = _HOLDER.read_text().strip()
            self.write(f"   another doit (process {holder}) works in this folder; waiting for it\n")
            self.outstream.flush()
            self.lock.acquire()
            state.current().reload()  # what the other one finished is not done again
        with contextlib.suppress(OSError):  # a full disk: the tasks will say so
            _HOLDER.write_text(f"{os.getpid()}\n")
        shutil.rmtree(BUILD / "tmp", ignore_errors=True)  # what a killed run has left half-written

    def _stop(self, number: int, frame: FrameType | None) -> None:
        # Unlike KeyboardInterrupt this ends doit without a traceback; doit still stops the servers and closes the run.
        del frame
        self.stopped = True
        raise SystemExit(128 + number)

    def execute_task(self, task: Task) -> None:
        """Show the task that starts."""
        if task.actions:  # a group such as `trace` has none
            state.current().files.something_runs()
        super().execute_task(task)
        self.outstream.flush()

    def add_success(self, task: Task) -> None:
        """Count a task that did its work."""
        if task.actions:
            self.ran.append(task.name)

    def skip_uptodate(self, task: Task) -> None:
        """Count a task that had nothing to do."""
        super().skip_uptodate(task)
        self.up_to_date += 1

    def add_failure(self, task: Task, fail: BaseFail) -> None:
        """Show a failure at once: the text of our error, or the traceback of a bug."""
        self.failures.append({"task": task, "exception": fail})
        if isinstance(fail, UnmetDependency):
            if task.actions:  # a group such as `trace` has none: its subtasks are what counts
                self.blocked.append(task.name)
            return
        self.mendable = self.mendable and isinstance(fail, TaskFailed)
        self.write(f"!! {fail.get_msg().strip()}\n")

    def complete_run(self) -> None:
        """Close the run: the table, what was left out, the counts, the exit code."""
        self._smoke_table()
        for name, reason in self.left_out.items():
            self.write(f"   left out: {name}: {reason}\n")
        failed = [
            result["task"].name for result in self.failures if not isinstance(result["exception"], UnmetDependency)
        ]
        words = ["stopped"] if self.stopped else []
        words += [f"{len(self.ran)} done", f"{self.up_to_date} up to date"]
        if failed:
            words.append(f"{len(failed)} failed ({_few(failed)})")
        if self.blocked:
            words.append(f"{len(self.blocked)} not tried for that ({_few(self.blocked)})")
        self.write(f"   {', '.join(words)}\n")
        if self.runtime_errors:
            self.write("\n".join(self.runtime_errors) + "\n")
        self.outstream.flush()
        _HOLDER.unlink(missing_ok=True)
        self.lock.release()
        if self.failures and self.mendable and not self.runtime_errors and not self.stopped:
            # doit counts a task whose dependency failed as an error of its own (exit code 2, which here means a bug).
            raise SystemExit(1)

    def _smoke_table(self) -> None:
        names = [name.removeprefix("smoke:") for name in self.ran if name.startswith("smoke:")]
        if not names:
            return
        from rich.console import Console
        from rich.table import Table

        table = Table(title_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for column in ("model", "version", "server", "cases", "largest error", "latency"):
            right = column in {"version", "cases", "largest error", "latency"}
            table.add_column(column, justify="right" if right else "left", no_wrap=True)
        for name in names:
            result = json.loads((BUILD / "smoke" / f"{name}.json").read_text())
            model, version = name.split("/")
            error = max(result["max_abs_error"].values(), default=0.0)
            server = f"{result['server']['kind']} {result['server']['version']}"
            cells = (model, version, server, str(result["cases"]), f"{error:.1e}" if error else "0")
            table.add_row(*cells, f"{result['latency_ms']:.1f} ms")
        self.write("\n")
        Console(file=self.outstream, width=100, highlight=False).print(table)
        self.write("\n")


def _die_with_parent() -> None:
    # A process of `doit -n` waits for its next task for ever; after a SIGKILL of doit none will come.
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])}, and {len(names) - 3} more"
