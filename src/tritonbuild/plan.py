"""Decides what `doit plan` and `doit why` foretell: which tasks would run, for what reason, and what may follow.

Certain is what the keys and files of now say. What comes after a task that would run is foretold only as far as it
can be known: a result that lies in a store has known files, so what follows is certain; what is made anew may come
out the same, and then nothing after it runs. Nothing is run, written or locked, and torch is not imported.

Source: docs/pipeline.md, "Commands".
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from tritonbuild import actions, keys, outlines, state, yamlfile
from tritonbuild.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from doit.dependency import Dependency
    from doit.task import Task

    from tritonbuild.results import Result
    from tritonbuild.spec import Pipeline

RUN, FETCH, MAY_RUN = "run", "fetch", "may run"


@dataclass
class Step:
    """A task that would or may run.

    Attributes:
        task: Its name.
        action: `run`, `fetch` from a store, or `may run` when a task before it changes what it reads.
        reasons: Why, a line each.
        after: The tasks before it on which it hangs.
        seconds: How long its result took to make the last time, where that is known.
        bytes: How many bytes would come from the shared store.
        files: Target -> digest that it will have; known for what is fetched.
    """

    task: str
    action: str
    reasons: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    seconds: float | None = None
    bytes: int = 0
    files: dict[str, str] = field(default_factory=dict)


class Foresight:
    """What would happen if doit ran now.

    Args:
        pipeline: The declaration.
        tasks: All tasks by name.
        owners: Target -> the task that writes it.
        memory: doit's memory of earlier runs.
    """

    def __init__(self, pipeline: Pipeline, tasks: dict[str, Task], owners: dict[str, str], memory: Dependency) -> None:
        self.pipeline = pipeline
        self.tasks = tasks
        self.owners = owners
        self.memory = memory
        self.steps: dict[str, Step] = {}
        self.up_to_date: list[str] = []
        self._places = _Places(pipeline)
        self._store: Any = None

    def look(self, selected: list[str]) -> None:
        """Foretell the tasks and all that they depend on, in the order in which they would run."""
        seen: set[str] = set()
        stack = [(name, False) for name in reversed(selected)]
        while stack:
            name, ready = stack.pop()
            if ready:
                self._look_at(self.tasks[name])
            elif name not in seen:
                seen.add(name)
                stack.append((name, True))
                stack += [(dep, False) for dep in reversed(self._before(self.tasks[name])) if dep not in seen]

    def _before(self, task: Task) -> list[str]:
        return [*task.task_dep, *task.setup_tasks]

    def _look_at(self, task: Task) -> None:
        if not task.actions:
            return
        values = self.memory.get_values(task.name)
        reasons = list(self._reasons(task, values))
        after, certain = self._after(task)
        if not reasons and not after:
            self.up_to_date.append(task.name)
            return
        step = Step(task.name, RUN if reasons or certain else MAY_RUN, reasons, after)
        step.seconds = values.get("made_in_s", values.get("seconds"))
        self.steps[task.name] = step
        if step.action == RUN:
            self._look_into_store(task, step)

    def _reasons(self, task: Task, values: dict[str, Any]) -> Iterator[str]:
        """Yield why a task would run whatever becomes of the tasks before it."""
        status = self.memory.get_status(task, self.tasks, get_log=True)
        for check, _, _ in status.reasons["uptodate_false"]:
            if isinstance(check, keys.UpToDate):
                for reason in check.reasons(task.name, values):
                    first, *rest = reason.where or ("",)
                    if first == "files" and self.owners.get(rest[0]) in self.steps:
                        continue  # what that task leaves decides: see _after
                    if first == "folders" and (self._after(task)[0] or self._comes_back(reason)):
                        continue
                    yield self._in_words(task.name, reason)
            else:
                yield f"{getattr(check, '__qualname__', check)} says so"
        told = {*values.get("files", {}), *task.targets}
        for path in status.reasons["changed_file_dep"] or ():
            if self.owners.get(path) not in self.steps and path not in told and "key" in values:
                yield f"{path} changed" if self.memory.checker.info(path) != "missing" else f"{path} is missing"
        if "key" not in values and not status.reasons["uptodate_false"]:
            yield from (f"{target} is missing" for target in status.reasons["missing_target"])
            yield from (f"{path} changed" for path in status.reasons["changed_file_dep"] or ())
            if status.reasons["has_no_dependencies"]:
                yield "depends on nothing, so it always runs"
        for kind, words in (("added_file_dep", "reads a further file:"), ("removed_file_dep", "no longer reads")):
            yield from (f"{words} {path}" for path in status.reasons[kind] or ())

    def _after(self, task: Task) -> tuple[list[str], bool]:
        """Return the tasks before this one that make it run, and whether that is certain."""
        after: dict[str, bool] = {}
        for path in task.file_dep:
            owner = self.owners.get(path, "")
            if owner in self.steps:
                digest = self.steps[owner].files.get(path)
                if digest is None or digest != self.memory._get(task.name, path):
                    after[owner] = after.get(owner, False) or digest is not None
        if not task.file_dep:
            # It looks for itself at what the tasks before it leave: the names in models/, or what goes into an image.
            by_folders = any(isinstance(check, keys.UpToDate) for check, _, _ in task.uptodate)
            for name in self._with_parts(task.task_dep):
                if name in self.steps and not (self._is_old(name, task) if by_folders else self._leaves_all(name)):
                    after[name] = False
        return [name for name in self.steps if name in after] if after else [], any(after.values())

    def _with_parts(self, names: list[str]) -> Iterator[str]:
        for name in names:
            yield name
            if self.tasks[name].has_subtask:
                yield from self.tasks[name].task_dep

    def _is_old(self, name: str, looker: Task) -> bool:
        """Return whether a task adds no name to models/ that was not there when the looker looked."""
        return self._writes(name) <= set(state.current().parts(looker.name).get("folders", ()))

    def _comes_back(self, reason: keys.Reason) -> bool:
        """Return whether names of models/ are missing, and none but those that the tasks before write again."""
        written = set().union(*map(self._writes, self.steps))
        return set(reason.before) == {*reason.after, *written}

    def _writes(self, name: str) -> set[str]:
        """Return the paths, from models/, that a task writes, with those of their folders."""
        targets = (PurePosixPath(target) for target in self.tasks[name].targets)
        paths = (path for target in targets for path in (target, *target.parents) if target.parts[0] == "models")
        return {str(path.relative_to("models")) for path in paths if len(path.parts) > 1}

    def _leaves_all(self, name: str) -> bool:
        files = self.steps[name].files
        return bool(files) and keys.file_digests(self.pipeline.root, files) == files

    def _in_words(self, task: str, reason: keys.Reason) -> str:
        match reason.where:
            case ("declaration", *steps) if steps:
                return f"{self._places.of(task, steps)}: {reason.text.split(': ', 2)[-1]}"
            case ("files", path):
                root = self.pipeline.root
                before = self.memory.get_values(task).get("files", {}).get(path)
                return f"{path}: {outlines.changed(root, path, before, reason.after) or reason.text.split(': ', 2)[-1]}"
            case ("declaration",):
                return f"{self.pipeline.path.name} declares something else"
            case ("recipe",):
                return "tritonbuild itself changed: the code that makes this"
            case ("distributions", name):
                return f"{name} {reason.before} -> {reason.after}"
        if not reason.where and task.startswith("trace:") and reason.text.startswith("never"):
            return self._failure(task) or reason.text
        return reason.text

    def _failure(self, task: str) -> str | None:
        path = self.pipeline.root / ".build" / "proof" / f"{task.removeprefix('trace:')}.json"
        try:
            proof = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        error = str(proof.get("error", "")).partition("\n")[0]
        return f"failed the last time: {error}" if proof.get("verdict") == "failed" and error else None

    def _look_into_store(self, task: Task, step: Step) -> None:
        check = next((check for check, _, _ in task.uptodate if isinstance(check, keys.UpToDate)), None)
        if check is None or not actions.is_stored(task.name):
            return
        found = self._find(check)
        if found is not None:
            step.action, step.seconds = FETCH, found.seconds
            step.bytes = self._store.missing_bytes(found)
            step.files = {target: found.files[actions.stored_name(target)][0] for target in check.targets}

    def _find(self, check: keys.UpToDate) -> Result | None:
        from tritonbuild import store

        try:
            self._store = self._store or store.of(self.pipeline.root, self.pipeline.store)
        except StoreError:
            return None
        found: Result | None = self._store.find(
            keys.action_key(check.parts()), lambda *reads: keys.action_key(check.complete(*reads))
        )
        return found if found and actions.is_whole(found, check) else None


class _Places:
    """Where in pipeline.yaml a part of a task's key stands."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._data: Any = None
        self._lines: yamlfile.Lines | None = None

    def of(self, task: str, steps: list[str]) -> str:
        if self._lines is None:
            self._data = yamlfile.read(self.pipeline.path)
            self._lines = yamlfile.Lines(self.pipeline.path)
        model, _, version = task.partition(":")[2].partition("/")
        candidates: list[tuple[str | int, ...]] = [("models", model, *steps), tuple(steps)]
        if version:
            candidates.insert(0, ("models", model, "versions", int(version), *steps))
        there = next((candidate for candidate in candidates if self._is_there(candidate)), None)
        return self._lines.place(there or ("models", model, *steps))

    def _is_there(self, location: tuple[str | int, ...]) -> bool:
        found = self._data
        for step in location:
            if not isinstance(found, dict) or step not in found:
                return False
            found = found[step]
        return True
