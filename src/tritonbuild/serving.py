"""What the tasks image, compose and smoke do: build what is deployed, choose a Triton, ask it.

Hides which Triton answers: the image that was just built, where Docker can build it on this machine; otherwise the
embedded one; or a server that runs already. What a machine cannot do is left out, with the reason in one line.

Source: docs/deploy.md; docs/pipeline.md, "Commands".
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import shutil
import sys
import threading
import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tritonbuild import keys, state
from tritonbuild.actions import Scratch, config_targets, fetch, put, task, traced
from tritonbuild.errors import ServerError
from tritonbuild.reporter import Reporter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tritonbuild.spec import Model, ModelVersion, Pipeline

_SMOKE_RECIPE = (
    "smoke.py",
    "served.py",
    "server.py",
    "embedded.py",
    "message.py",
    "dtypes.py",
    "backends/pytorch/model.py",
)


class Image:
    """The image of this project: whether this machine can build it, and whether it must.

    Args:
        pipeline: The declaration, which declares an image.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    @cached_property
    def no_engine(self) -> str | None:
        """Why no Docker engine can be used, or None."""
        from tritonbuild import docker

        return docker.reachable()

    @cached_property
    def left_out(self) -> str | None:
        """Why a bare doit does not build the image, or None: it does not start a download of 10 GB by itself."""
        if self.no_engine:
            return self.no_engine
        from tritonbuild import docker, image

        base = image.base_image(self.pipeline)
        if docker.ask("image", "inspect", "--format", "{{.Id}}", base).code == 0:
            return None
        return f"its base {base} is not on this machine; `doit image` pulls it"

    def up_to_date(self) -> bool:
        """Return whether the task need not run, or cannot; then the reason closes the run."""
        reason = self.left_out if Reporter.everything else self.no_engine
        if reason:
            Reporter.left_out["image"] = reason
            return True
        from tritonbuild import image

        return image.why(self.pipeline) is None


@task
def image(pipeline: Pipeline) -> None:
    """Build the image and push it where that is declared."""
    from tritonbuild import image

    sys.stdout.write(f"   {image.summary(image.build(pipeline))}\n")


def compose_parts(pipeline: Pipeline) -> keys.Parts:
    """Return the parts of the compose file's action key: its text follows from the declaration alone."""
    from tritonbuild import compose

    return {"texts": compose.files(pipeline)}


@task
def compose(pipeline: Pipeline) -> None:
    """Write docker/compose.yaml and have it checked."""
    from tritonbuild import compose

    sys.stdout.write(f"   docker/compose.yaml: accepted by {compose.write(pipeline)}\n")


def served(model: Model) -> Mapping[int, object]:
    """Return the versions that Triton will serve: all declared ones, unless a version policy chooses."""
    if "version_policy" not in model.config:
        return model.versions
    from tritonbuild import config

    return dict.fromkeys(config.served(model))


def smoke_parts(root: Path, files: Sequence[str], server: ServerChoice) -> keys.Parts:
    """Return the parts of a smoke test's action key: the server, and the bytes that it serves and is compared with.

    Args:
        root: The project's folder.
        files: What the smoke test reads, see `smoke_files`.
        server: The server.
    """
    parts = server.parts()
    if server.is_known:
        parts["device"] = keys.device_kind()
        parts["files"] = keys.file_digests(root, files)
    return parts


def smoke_files(pipeline: Pipeline, version: ModelVersion) -> list[str]:
    """Return the files that a smoke test reads, or Triton when it loads the model: warm-up data, too."""
    return [traced(version).model, *config_targets(pipeline, version.model), traced(version).cases]


class ServerChoice:
    """The one server of a run, started when the first smoke test needs it.

    Args:
        pipeline: The declaration.
        wanted: `auto`, `embedded`, `docker`, or the URL of a server that runs already.
        docker: Whether auto means the image.
    """

    def __init__(self, pipeline: Pipeline, wanted: str, *, docker: bool) -> None:
        self.pipeline = pipeline
        self.wanted = wanted
        if wanted == "auto":
            self.kind = "docker" if docker else "embedded"
        else:
            self.kind = wanted if wanted in {"embedded", "docker"} else "url"
        self.task_dep: list[str] = ["image"] if self.kind == "docker" else []
        # Equal on every machine: a verdict about the same bytes counts there too. An image or a URL may be anything.
        self.is_known = self.kind == "embedded"
        self.lock = threading.Lock()
        """Held by a smoke test: with `doit -n 2 -P thread`, two of them have one server."""
        self._running: Any = None
        self._expected: dict[str, list[tuple[str, keys.UpToDate]]] = {}
        self._asked: set[str] = set()

    def parts(self) -> keys.Parts:
        """Return what an answer depends on beside the model: the kind of server and the recipe."""
        server = self.wanted if self.kind == "url" else self.kind
        parts = {"server": server, "recipe": keys.recipe(*_SMOKE_RECIPE)}
        if self.kind == "embedded":
            parts["wheel"] = keys.distribution_version("nvidia-pytriton")
        if self.kind == "docker":
            from tritonbuild import image

            # The base alone: the image is another one whenever any model has changed.
            parts["base"] = (image.record(self.pipeline) or {"base": {"id": ""}})["base"]["id"]
        return parts

    def get(self) -> Any:
        """Return the running server; one that ended by itself is started again."""
        if self._running is not None and self._running.has_ended():
            self.stop()
        if self._running is None:
            from tritonbuild import server

            root = self.pipeline.root
            if self.kind == "embedded":
                context = server.embedded(root / "models", root / ".build")
            elif self.kind == "url":
                context = server.at(self.wanted)
            else:
                from tritonbuild import container

                context = container.server(self.pipeline)
            self._context, self._running = context, context.__enter__()
        return self._running

    def expect(self, model: str, task: str, check: keys.UpToDate) -> None:
        """Take note of a smoke test that this run may come to, in the order of the run."""
        self._expected.setdefault(model, []).append((task, check))

    def ready(self, model: str) -> Any:
        """Return the running server, which has loaded the model if it can.

        With it, the embedded server loads the models whose turn is next, as many as there are cores: each imports torch
        in a process of its own, which takes longer than the smoke test. What does not load, its own test tells. It lets
        go of those whose turn is over: to hold a thousand takes all the memory there is.
        """
        running = self.get()
        if self.kind != "embedded" or model in self._asked:
            return running
        wave = [model]
        # Of `doit -n`, neither a process nor a thread knows what the others do next.
        one_of_many = multiprocessing.parent_process() or threading.current_thread() is not threading.main_thread()
        if Reporter.everything and not one_of_many:
            names = list(self._expected)
            following = names[names.index(model) + 1 :]
            wave += itertools.takewhile(self._is_due, following[: len(os.sched_getaffinity(0)) - 1])
        self._asked.update(wave)
        with contextlib.suppress(ServerError):
            running.keep(*wave)
            running.load(*wave)
        return self.get()  # another one, if that ended it: a warm-up that fails sometimes does

    def _is_due(self, model: str) -> bool:
        memory = state.current()
        return any(check.reasons(task, memory.get(task, "_values_:") or {}) for task, check in self._expected[model])

    def stop(self) -> None:
        """Stop the server, if it runs; doit calls this at the end of every run, also after Ctrl-C."""
        if self._running is not None:
            self._running = None
            self._context.__exit__(None, None, None)


@task
def smoke(
    pipeline: Pipeline, version: ModelVersion, server: ServerChoice, check: keys.UpToDate
) -> dict[str, Any] | None:
    """Serve a version and compare its answers with its cases, unless a store holds the verdict on the same bytes."""
    from tritonbuild import smoke, store
    from tritonbuild.results import describe, reads

    root = pipeline.root
    target = root / f".build/smoke/{version.label}.json"
    results = store.of(root, pipeline.store)
    with Scratch(root) as out:
        known = fetch(results, check, out, f"smoke {version.label}") if server.is_known else None
        if known:
            put(out / "smoke.json", target)
            return known
        started = time.perf_counter()
        with server.lock:
            smoke.run(
                server.ready(version.model),
                version.model,
                version.version,
                cases=root / traced(version).cases,
                config=root / f"models/{version.model}/config.pbtxt",
                out=target,
            )
        if server.is_known:
            shutil.copyfile(target, out / "smoke.json")
            key = keys.action_key(check.parts())
            seconds = time.perf_counter() - started
            results.keep(describe(key, key, out, ["smoke.json"], reads((), ()), seconds), out)
    results.share()
    return None
