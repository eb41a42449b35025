"""Decides how our commands join doit's: `doit plan`, `doit why TASK`, `doit gc`; what they print, their exit codes.

Source: doit's plug-ins (entry points in the group doit.COMMAND), https://pydoit.org/extending.html; docs/pipeline.md.
"""

from __future__ import annotations

import json

from doit.cmd_base import DoitCmdBase
from doit.control import TaskControl
from doit.exceptions import InvalidCommand
from filelock import FileLock, Timeout

from tritonbuild import state
from tritonbuild.errors import StoreError
from tritonbuild.plan import FETCH, MAY_RUN, RUN, Foresight, Step
from tritonbuild.reporter import BUILD, Reporter


class Plan(DoitCmdBase):  # type: ignore[misc]
    """doit plan"""

    name = "plan"
    doc_purpose = "show what a run would do, and why, without doing it"
    doc_usage = "[TASK ...]"
    doc_description = (
        "Exit codes: 0, or with --exit-code 1 when a task would run; 3 when pipeline.yaml is not valid. "
        "The shared store is asked what it holds; TRITONBUILD_STORE=off asks nobody."
    )
    cmd_options = (
        {"name": "as_json", "long": "json", "type": bool, "default": False, "help": "print JSON"},
        {
            "name": "exit_code",
            "long": "exit-code",
            "type": bool,
            "default": False,
            "help": "exit with 1 when a task would run",
        },
    )

    def _execute(self, as_json: bool, exit_code: bool) -> int:
        seen, _ = _foresee(self, self.sel_tasks)
        self.outstream.write(_json(seen) if as_json else _text(seen))
        self.dep_manager.close()
        return 1 if exit_code and seen.steps else 0


class Why(DoitCmdBase):  # type: ignore[misc]
    """doit why"""

    name = "why"
    doc_purpose = "show why a task would run, or what keeps it up to date"
    doc_usage = "TASK ..."
    doc_description = None

    def _execute(self, pos_args: list[str]) -> int:
        if not pos_args:
            raise InvalidCommand("`why` needs a task, such as trace:pnet/1; `doit list --all` shows them")
        seen, selected = _foresee(self, pos_args)
        for name in selected:
            step = seen.steps.get(name)
            if step is not None:
                self.outstream.write(f"{_line(step)}\n" + "".join(f"    {why}\n" for why in _whys(step)))
            elif seen.tasks[name].actions:
                self.outstream.write(f"{name}  up to date\n" + _kept_by(name))
        self.dep_manager.close()
        return 0


class Gc(DoitCmdBase):  # type: ignore[misc]
    """doit gc"""

    name = "gc"
    doc_purpose = "remove results from .build/store that no task uses now, those used longest ago first"
    doc_usage = "[--limit SIZE]"
    doc_description = (
        "Results that are in use are kept in any case. A bucket is collected by its own rules: docs/ci.md."
    )
    cmd_options = (
        {
            "name": "limit",
            "long": "limit",
            "type": str,
            "default": "",
            "help": "what may stay of the others, such as 5G or 0 [default: TRITONBUILD_STORE_LIMIT, or 20G]",
        },
    )

    def _execute(self, limit: str) -> int:
        from tritonbuild import store
        from tritonbuild.graph import pipeline

        try:
            results = store.of(pipeline().root, None)
            limit_bytes = store.size_of(limit, "--limit") if limit else results.limit_bytes
        except StoreError as error:
            raise InvalidCommand(str(error)) from None
        lock = FileLock(BUILD / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InvalidCommand("another doit works in this folder; collect when it is done") from None
        removed, freed = results.collect(limit_bytes, store.keys_in_use())
        lock.release()
        self.outstream.write(
            f"{removed} results removed, {_size(freed)} freed; {_size(results.size_bytes())} stay in .build/store\n"
        )
        self.dep_manager.close()
        return 0


def _foresee(command: DoitCmdBase, names: list[str] | None) -> tuple[Foresight, list[str]]:
    """Return what would happen, and the names of the selected tasks: of a group, its members."""
    from tritonbuild.graph import pipeline

    Reporter.everything = not names
    control = TaskControl(command.task_list)
    control.process(names)
    seen = Foresight(pipeline(), control.tasks, control.targets, command.dep_manager)
    seen.look(control.selected_tasks)
    selected: dict[str, None] = {}
    for name in control.selected_tasks:
        task = control.tasks[name]
        selected.update(dict.fromkeys(task.task_dep if task.has_subtask else [name]))
    return seen, list(selected)


def _whys(step: Step) -> list[str]:
    if step.reasons:
        return step.reasons
    before = step.after[0] if len(step.after) == 1 else f"one of {', '.join(step.after[:3])}"
    more = f" and {len(step.after) - 3} more" if len(step.after) > 3 else ""
    verb = "if" if step.action == MAY_RUN else "because"
    return [f"{verb} {before}{more} changes what it reads"]


def _line(step: Step) -> str:
    words = step.action
    if step.bytes:
        words += f", {_size(step.bytes)} from the shared store"
    if step.seconds is not None:
        words += f", {'made in' if step.action == FETCH else 'last time'} {step.seconds:.1f} s"
    return f"{step.task}  {words}"


def _text(seen: Foresight) -> str:
    lines = []
    for step in seen.steps.values():
        lines += [_line(step), *(f"    {why}" for why in _whys(step))]
    lines += [f"left out: {name}: {reason}" for name, reason in Reporter.left_out.items()]
    counts = _counts(seen)
    words = [f"{counts['run']} would run", f"{counts['fetch']} fetched", f"{counts['may run']} may follow"]
    seconds = sum(step.seconds or 0.0 for step in seen.steps.values() if step.action == RUN)
    total = f"; {seconds:.1f} s of work the last time" if seconds >= 0.1 else ""
    lines.append(f"{', '.join(words)}, {len(seen.up_to_date)} up to date{total}")
    return "\n".join(lines) + "\n"


def _counts(seen: Foresight) -> dict[str, int]:
    found = [step.action for step in seen.steps.values()]
    return {action: found.count(action) for action in (RUN, FETCH, MAY_RUN)}


def _json(seen: Foresight) -> str:
    counts = _counts(seen)
    document = {
        "run": counts[RUN],
        "fetch": counts[FETCH],
        "may_run": counts[MAY_RUN],
        "up_to_date": len(seen.up_to_date),
        "left_out": Reporter.left_out,
        "tasks": [
            {
                "task": step.task,
                "action": step.action.replace(" ", "_"),
                "reasons": step.reasons,
                "after": step.after,
                "last_seconds": step.seconds,
                "fetch_bytes": step.bytes,
            }
            for step in seen.steps.values()
        ],
    }
    return json.dumps(document, indent=2) + "\n"


def _kept_by(name: str) -> str:
    """Return what the task's key consists of."""
    values = state.current().get(name, "_values_:") or {}
    lines = [f"    {path}  {(digest or 'missing')[:12]}" for path, digest in values.get("files", {}).items()]
    lines += [f"    {name}  {version}" for name, version in values.get("distributions", {}).items()]
    parts = state.current().parts(name)
    lines += [f"    {part}: {', '.join(value) if isinstance(value, dict) else value}" for part, value in parts.items()]
    return "\n".join(lines) + "\n" if lines else ""


def _size(count: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:  # what is rounded up to 1000 is 1 of the next unit
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} TB"
