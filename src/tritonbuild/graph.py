"""The whole build graph: which task reads and writes what. Wiring only; the work is in the stages.

    pipeline.yaml ─ check
         │
         ├─ trace:<model>/<version>   models/<model>/<version>/model.pt, signature, cases, proof
         ├─ config:<model>            models/<model>/config.pbtxt
         ├─ repository                models/ holds exactly the declared models
         ├─ smoke:<model>/<version>   served answers against the cases
         └─ image, compose            what is deployed, where a Docker engine is reachable

A dodo.py says `from tritonbuild.graph import *` and gets these tasks. Nothing that is imported here at load imports
torch, numpy or tritonclient: a doit with nothing to do stays fast (a test walks the imports).
"""

from __future__ import annotations

import gc
import io
import os
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import doit
from doit.exceptions import InvalidDodoFile

from tritonbuild import actions, keys, parts, serving, spec
from tritonbuild.errors import SpecError
from tritonbuild.reporter import BUILD, Reporter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tritonbuild.spec import ModelVersion, Pipeline

__all__ = [
    "DOIT_CONFIG",
    "task_check",
    "task_compose",
    "task_config",
    "task_image",
    "task_repository",
    "task_smoke",
    "task_trace",
]

# A graph of thousands of tasks is made once and kept: to search it for cycles again and again costs a fifth of a run.
gc.set_threshold(100_000, 50, 50)

# A name that the terminal's encoding has no letters for must not hide the message that it stands in.
if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")

DOIT_CONFIG = {
    "backend": "tritonbuild",
    "dep_file": ".build/state.sqlite",
    "check_file_uptodate": keys.FileChecker,
    "reporter": Reporter,
    "continue": True,  # one wrong model does not keep the others from being built
    "verbosity": 2,
}


@cache
def pipeline() -> Pipeline:
    """Return the declaration beside dodo.py; `doit pipeline=other.yaml` picks another."""
    path = Path(str(doit.get_var("pipeline", "pipeline.yaml")))
    if os.path.realpath(path.parent) != os.getcwd():
        raise InvalidDodoFile(
            f"pipeline={path}: found a file in another folder, expected one beside dodo.py\n"
            "    what is built lies beside the two: put a dodo.py there, and run doit there"
        )
    try:
        loaded = spec.load(path, BUILD / "declaration")
        actions.check_config(loaded)
    except SpecError as error:
        count = len(error.problems)
        raise InvalidDodoFile(f"{count} problem{'s' * (count > 1)} in {path}\n{error}") from None
    return loaded


@cache
def _same() -> str:
    return parts.same_while(pipeline())


def task_check() -> dict[str, Any]:
    """check pipeline.yaml; every command does, this one says what is declared"""
    declared = pipeline()
    return {
        "actions": [(actions.check, [declared])],
        "uptodate": [keys.UpToDate(declared.root, lambda: parts.check(declared), [])],
    }


def task_trace() -> Iterator[dict[str, Any]]:
    """trace a model version in a child of its own and prove that it equals eager"""
    declared = pipeline()
    for version in declared.all_versions():
        yield _trace(declared, version, _same())


def _trace(declared: Pipeline, version: ModelVersion, same: str) -> dict[str, Any]:
    targets = list(actions.traced(version))
    check = keys.UpToDate(declared.root, lambda: parts.trace(version), targets, same)
    return {
        "name": version.label,
        "doc": f"{version.entry_point} -> {targets[0]}",
        "actions": [(actions.trace, [declared, version, check])],
        "file_dep": actions.trace_files(declared, version),
        "targets": targets,
        "uptodate": [check],
        "clean": [(actions.remove, [targets])],
    }


def task_config() -> Iterator[dict[str, Any]]:
    """write a model's config.pbtxt from its declaration and its measured signature"""
    declared = pipeline()
    for name in declared.models:
        yield _config(declared, name, _same())


def _config(declared: Pipeline, name: str, same: str) -> dict[str, Any]:
    targets = actions.config_targets(declared, name)
    signatures = [actions.traced(version).signature for version in declared.versions[name].values()]
    return {
        "name": name,
        "doc": targets[0],
        "actions": [(actions.config, [declared, name])],
        "file_dep": signatures + actions.config_files(declared, name),
        "targets": targets,
        "uptodate": [keys.UpToDate(declared.root, lambda: parts.config(declared, name), targets, same)],
        "clean": [(actions.remove, [targets])],
    }


def task_repository() -> dict[str, Any]:
    """make models/ hold exactly what is declared: Triton serves every folder that it finds"""
    declared = pipeline()
    return {
        "actions": [(actions.repository, [declared])],
        "task_dep": ["trace", "config"],
        "uptodate": [keys.UpToDate(declared.root, lambda: parts.repository(declared), [])],
    }


def task_image() -> Iterator[dict[str, Any]]:
    """build the Docker image that carries models/: one layer per model version"""
    declared = pipeline()
    if declared.image:
        yield {
            "basename": "image",
            "doc": "build the Docker image that carries models/: one layer per model version",
            "actions": [(serving.image, [declared])],
            "task_dep": ["trace", "config", "repository"],
            "uptodate": [serving.Image(declared).up_to_date],
        }


def task_compose() -> Iterator[dict[str, Any]]:
    """write docker/compose.yaml, which serves the image"""
    declared = pipeline()
    if declared.image:
        yield {
            "basename": "compose",
            "doc": "write docker/compose.yaml, which serves the image",
            "actions": [(serving.compose, [declared])],
            "targets": ["docker/compose.yaml"],
            "uptodate": [
                keys.UpToDate(declared.root, lambda: serving.compose_parts(declared), ["docker/compose.yaml"])
            ],
        }


def task_smoke() -> Iterator[dict[str, Any]]:
    """serve a model version and compare its answers with eager PyTorch's"""
    declared = pipeline()
    wanted = str(doit.get_var("server", "auto"))
    docker = wanted == "auto" and declared.image is not None and serving.Image(declared).left_out is None
    server = serving.ServerChoice(declared, wanted, docker=docker)
    for name, versions in declared.versions.items():
        for number in serving.served(declared.models[name]):
            yield _smoke(declared, versions[number], server)


def _smoke(declared: Pipeline, version: ModelVersion, server: serving.ServerChoice) -> dict[str, Any]:
    targets = [f".build/smoke/{version.label}.json"]
    files = serving.smoke_files(declared, version)
    check = keys.UpToDate(declared.root, lambda: serving.smoke_parts(declared.root, files, server), targets)
    server.expect(version.model, f"smoke:{version.label}", check)
    return {
        "name": version.label,
        "doc": f"models/{version.label} on {server.kind} against its cases",
        "actions": [(serving.smoke, [declared, version, server, check])],
        "file_dep": files,
        "task_dep": server.task_dep,
        "targets": targets,
        "uptodate": [check],
        "teardown": [server.stop],
        "clean": [(actions.remove, [targets])],
    }
