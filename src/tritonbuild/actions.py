"""What each task does when it runs: calls its stage, publishes the results, turns our errors into failed tasks.

Hides where results lie under .build/ and in which order they are put in place. A stage writes into a temporary folder
on the same file system, and each file is renamed into its place when all of them are there: a kill at any moment
leaves targets whole or absent. Stages are imported when they run, never when the graph is loaded.

Source: shape of the files in docs/pipeline.md, "Results".
"""

from __future__ import annotations

import errno
import functools
import json
import os
import sys
import tempfile
import time
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from doit.exceptions import TaskFailed

from tritonbuild import keys, parts, state
from tritonbuild.errors import BuildError, ProofError, SpecError, TraceError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tritonbuild.results import Result
    from tritonbuild.spec import ModelVersion, Pipeline
    from tritonbuild.store import Store

_FULL = {errno.ENOSPC, errno.EDQUOT}


def task(action: Callable[..., Any]) -> Callable[..., Any]:
    """Return the action with our errors as failed tasks: one text, exit code 1, no traceback."""

    @functools.wraps(action)
    def run(*arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            values = action(*arguments) or {}
        except BuildError as error:
            return TaskFailed(str(error))
        except OSError as error:
            if error.errno is None or (error.filename is None and error.errno not in _FULL):
                raise
            where = error.filename or os.getcwd()
            return TaskFailed(f"{where}: {error.strerror}\n    free space, or make it writable for this user")
        return {**values, "seconds": round(time.perf_counter() - started, 3)}

    return run


# ---------------------------------------------------------------------------------------------------- check


def check_config(pipeline: Pipeline) -> None:
    """Check every model's `config:` against Triton's ModelConfig, unless this declaration has passed before.

    Raises:
        SpecError: With all problems.
    """
    if not any(model.config for model in pipeline.models.values()):
        return
    # The text, not what it declares: this is asked in every run, and to look again at what has not changed is cheap.
    text = state.current().files.digest(pipeline.path)
    digest = keys.digest({"text": text, "recipe": keys.recipe(*parts.CONFIG_RECIPE)})
    if state.current().get("_declaration", "key") == digest:
        return
    from tritonbuild import config

    problems = config.check(pipeline)
    if problems:
        raise SpecError(problems)
    state.current().set("_declaration", "key", digest)
    state.current().set("_declaration", "deps:", ())


@task
def check(pipeline: Pipeline) -> None:
    """Say what is declared, and what the declared release is too old for."""
    from tritonbuild import image

    versions = sum(len(model.versions) for model in pipeline.models.values())
    models = len(pipeline.models)
    sys.stdout.write(
        f"   {pipeline.path.name}: {models} model{'s' * (models > 1)}, {versions} version{'s' * (versions > 1)}, "
        f"for Triton {pipeline.triton}\n"
    )
    for warning in image.release_warnings(pipeline):
        sys.stdout.write(f"   warning: {warning}\n")


# ---------------------------------------------------------------------------------------------------- trace


_TRACED = ("model.pt", "signature.json", "cases.safetensors", "proof.json")


class Traced(NamedTuple):
    """Where the results of a traced version lie, relative to the project's root."""

    model: str
    signature: str
    cases: str
    proof: str


def traced(version: ModelVersion) -> Traced:
    """Return where the results of a traced version lie."""
    return _traced(version.label)


@functools.cache
def _traced(label: str) -> Traced:
    return Traced(
        model=f"models/{label}/model.pt",
        signature=f".build/signature/{label}.json",
        cases=f".build/cases/{label}.safetensors",
        proof=f".build/proof/{label}.json",
    )


def is_stored(task_name: str) -> bool:
    """Return whether the results of a task are kept in a store."""
    return task_name.startswith(("trace:", "smoke:"))


def stored_name(target: str) -> str:
    """Return the name of a target in a stored result: `model.pt`, `cases.safetensors`, ..."""
    path = PurePosixPath(target)
    return f"{path.parts[1]}{path.suffix}" if path.parts[0] == ".build" else path.name


def trace_files(pipeline: Pipeline, version: ModelVersion) -> list[str]:
    """Return the files that a version is declared to read: its weights, its example data, its entry point."""
    # Spelt as a task of the user spells its target, which runs first then.
    files = [os.path.normpath(version.weights.path)] if version.weights else []
    files += [os.path.normpath(declared.values) for declared in version.inputs.values() if declared.values]
    source = _source(pipeline.root, version.entry_point.split(":")[0])
    return [*files, source] if source else files


@functools.cache
def _source(root: Path, module: str) -> str | None:
    name = module.replace(".", "/")
    return next((path for path in (f"{name}.py", f"src/{name}.py") if os.path.exists(root / path)), None)


def is_whole(found: Result, check: keys.UpToDate) -> bool:
    """Return whether a stored result has all that the task writes; one of another version of tritonbuild may not."""
    return {stored_name(target) for target in check.targets} <= found.files.keys()


@task
def trace(pipeline: Pipeline, version: ModelVersion, check: keys.UpToDate) -> dict[str, Any]:
    """Take a version's model.pt, signature, cases and proof from a store, or trace and prove it; publish them."""
    from tritonbuild import repository, store

    root, to = pipeline.root, traced(version)
    results = store.of(root, pipeline.store)
    with Scratch(root) as out:
        values = fetch(results, check, out, f"trace {version.label}") or _trace(results, root, version, check, out)
        for name, target in (
            ("signature.json", to.signature),
            ("cases.safetensors", to.cases),
            ("proof.json", to.proof),
        ):
            put(out / name, root / target)
        repository.publish(root, version.model, {"model.pt": out / "model.pt"}, version.version)
        _say_cuts(version, root / to.proof)
    results.share()
    return values


def _say_cuts(version: ModelVersion, proof: Path) -> None:
    """Say in one line what a proof that passed has not looked at."""
    cuts = json.loads(proof.read_text()).get("cuts")
    if cuts:
        others = f" (and {len(cuts) - 1} more, in {traced(version).proof})" if cuts[1:] else ""
        sys.stdout.write(f"   trace {version.label} passed, but: {cuts[0]}{others}\n")


def fetch(results: Store, check: keys.UpToDate, out: Path, what: str) -> dict[str, Any] | None:
    """Return the values of the task if its result is in a store; the files are then in `out`."""
    stamps: dict[str, keys.Stamp | None] = {}

    def key_of(files: Sequence[str], distributions: Sequence[str]) -> str:
        stamps.update({path: keys.stamp(check.root / path) for path in files})
        return keys.action_key(check.complete(files, distributions))

    found = results.find(keys.action_key(check.parts()), key_of)
    if found is None or not is_whole(found, check) or not results.fetch(found, out):
        return None
    sys.stdout.write(f"   {what}: from the {'shared ' if found.remote else ''}store, made in {found.seconds:.1f} s\n")
    files, distributions = found.reads
    return {
        "files": list(files),
        "distributions": list(distributions),
        "stamps": {path: stamps[path] for path in files},
        "made_in_s": found.seconds,
    }


def _trace(results: Store, root: Path, version: ModelVersion, check: keys.UpToDate, out: Path) -> dict[str, Any]:
    from tritonbuild import worker
    from tritonbuild.results import describe, reads

    started = time.perf_counter()
    log = root / ".build" / "log" / f"trace-{version.model}-{version.version}.log"
    try:
        _files_exist(root, version)
        found = worker.run(version, root, out, log)
    except BuildError as error:
        _publish_failure(root, version, out, error)
        raise
    key = keys.action_key(check.complete(found.files, found.distributions))
    proof = json.loads((out / "proof.json").read_text())
    proof["action_key"] = key
    (out / "proof.json").write_text(json.dumps(proof, indent=2) + "\n")
    seconds = round(time.perf_counter() - started, 3)
    # `auto` means another device to PyTorch than the key says where its driver is missing or too old, or under WSL.
    as_in_key = version.device != "auto" or found.device == keys.device_kind()
    if as_in_key and not keys.edited(root, found.stamps):
        read = reads(found.files, found.distributions)
        results.keep(describe(key, keys.action_key(check.parts()), out, _TRACED, read, seconds), out)
    return {
        "files": list(found.files),
        "distributions": list(found.distributions),
        "stamps": found.stamps,
        "made_in_s": seconds,
    }


def _files_exist(root: Path, version: ModelVersion) -> None:
    for path in [version.weights.path] if version.weights else []:
        if not (root / path).is_file():
            raise TraceError(
                f"trace {version.label}",
                f"weights file {path}: no such file",
                "put it there, or let a task of your dodo.py make it (a task with this file as target runs first)",
            )


def _publish_failure(root: Path, version: ModelVersion, out: Path, error: BuildError) -> None:
    """Put the failed proof in place; what an earlier run has published stays as it is."""
    path = out / "proof.json"
    result: dict[str, Any] = {"hazards": [], "cases": 0, "max_abs_error": {}}
    if path.exists() and path.stat().st_size:  # empty on a full disk
        result = json.loads(path.read_text())
    elif isinstance(error, ProofError):  # the child died of the model and wrote nothing
        way_out = error.advice[0] if error.advice else ""
        result["hazards"] = [{"hazard": "crash", "case": "", "where": "", "detail": error.what, "way_out": way_out}]
    result.update(verdict="failed", error=str(error))
    path.write_text(json.dumps(result, indent=2) + "\n")
    put(path, root / traced(version).proof)


# ---------------------------------------------------------------------------------------------------- config


def config_targets(pipeline: Pipeline, name: str) -> list[str]:
    """Return config.pbtxt and the files that it names, in the model's folder."""
    return [
        f"models/{name}/config.pbtxt",
        *(f"models/{name}/{path}" for path in _config_copies(pipeline, name)),
    ]


def config_files(pipeline: Pipeline, name: str) -> list[str]:
    """Return the files of the project that the model's config names: labels, warm-up data."""
    return [os.path.relpath(source, pipeline.root) for source in _config_copies(pipeline, name).values()]


def _config_copies(pipeline: Pipeline, name: str) -> dict[str, Path]:
    if not pipeline.models[name].config:
        return {}
    from tritonbuild import config

    return config.files(pipeline, name)


@task
def config(pipeline: Pipeline, name: str) -> None:
    """Write config.pbtxt and the files that it names."""
    from tritonbuild import config, repository

    root = pipeline.root
    signatures = {
        number: json.loads((root / traced(version).signature).read_text())
        for number, version in pipeline.versions[name].items()
    }
    text = config.render(pipeline, name, signatures)
    repository.publish(root, name, {"config.pbtxt": text.encode(), **_config_copies(pipeline, name)})


# ------------------------------------------------------------------------------------------------ repository


@task
def repository(pipeline: Pipeline) -> None:
    """Remove from models/ what is not declared any more and was ours; refuse what is not ours."""
    from tritonbuild import repository

    declared = {name: list(model.versions) for name, model in pipeline.models.items()}
    for removed in repository.prune(pipeline.root, declared):
        sys.stdout.write(f"   removed {removed}: not declared any more\n")


# ------------------------------------------------------------------------------------------------- all stages


def remove(paths: Sequence[str], dryrun: bool = False) -> None:
    """Remove targets, for `doit clean`, and the folders that are then empty or hold our marker alone."""
    for path in map(Path, paths):
        if path.exists():
            sys.stdout.write(f"removing {path}\n")
            if not dryrun:
                path.unlink()
        if dryrun:
            continue
        for folder in list(path.parents)[:-1]:
            if not folder.is_dir() or {entry.name for entry in folder.iterdir()} - {".tritonbuild"}:
                break
            (folder / ".tritonbuild").unlink(missing_ok=True)
            folder.rmdir()


class Scratch(tempfile.TemporaryDirectory[str]):
    """A temporary folder under .build, on the file system of the targets, as a Path."""

    def __init__(self, root: Path) -> None:
        parent = root / ".build" / "tmp"
        parent.mkdir(parents=True, exist_ok=True)
        super().__init__(dir=parent)

    def __enter__(self) -> Path:  # type: ignore[override]
        return Path(super().__enter__())


def put(source: Path, target: Path) -> None:
    """Move a whole file into its place, in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)
