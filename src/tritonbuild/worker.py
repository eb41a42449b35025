"""Decides where torch work runs: in children of a fork server that has imported torch once.

Every job has a child of its own: class names, random state, default dtype, a crash or an out-of-memory kill of one
model touch nothing else. CUDA is first touched in the child, so the preloaded modules must not ask for it. A child
dies with its parent, its output goes to a log, and its end by a signal is a verdict, not a
traceback. What the child read of the project is recorded, like a compiler's depfile.

Source: https://docs.python.org/3/library/multiprocessing.html (forkserver).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from importlib import metadata
from importlib.util import source_from_cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tritonbuild import errors, keys
from tritonbuild.errors import BuildError, ProofError, TraceError
from tritonbuild.spec import ModelVersion

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.process import BaseProcess

_FREE_SPACE = "free some: nothing is half-written, and the next doit goes on from here"

IMPORT_LIMIT_S = 300.0
"""Seconds that the import of an entry point's module may take."""

_SAY_AFTER_S = 2.0


@dataclass(frozen=True)
class Found:
    """What a child found that its result depends on.

    Attributes:
        files: First-party files it imported or opened, relative to the project's root.
        distributions: Installed distributions whose code it imported and that hold the entry point, and torch.
        stamps: Path -> size, time of change and inode that the file had when it was opened (see `keys.stamp`).
        device: The kind of device that it ran on: cuda or cpu.
    """

    files: tuple[str, ...]
    distributions: tuple[str, ...]
    stamps: dict[str, keys.Stamp]
    device: str


def run(version: ModelVersion, root: Path, out: Path, log: Path, *, import_limit_s: float = IMPORT_LIMIT_S) -> Found:
    """Trace and prove one model version in a child of its own.

    Args:
        version: The declaration.
        root: The project's folder; the child works there.
        out: An existing, empty folder for the results (see `trace.run`).
        log: The file that takes all that the child prints.
        import_limit_s: Seconds until an import that hangs is given up.

    Raises:
        TraceError: The entry point, its weights or its TorchScript; or the child was killed or hung.
        ProofError: The TorchScript differs from eager, or its execution crashed the child.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = _context().Process(
        target=_child, args=(version.model_dump_json(), str(root), str(out), str(log), sender), daemon=True
    )
    child.start()
    sender.close()
    reply, phase = None, ""
    try:
        reply, phase = _listen(child, receiver, version.label, import_limit_s)
    finally:
        # After its last word it ends by itself: to give its memory back takes 10 ms, which need not be waited for.
        if reply is None:
            if child.is_alive():
                child.kill()
            child.join()
        receiver.close()
    if reply is None:
        raise _died(child, version, log, phase)
    if "error" in reply:
        kind, arguments = reply["error"]
        raise getattr(errors, kind)(*arguments)
    if "bug" in reply:
        raise RuntimeError(
            f"trace {version.label}: a bug of tritonbuild; the child's traceback follows\n{reply['bug']}"
        )
    return Found(**reply["found"])


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tritonbuild.preload"])
    return context


def _listen(
    child: BaseProcess, receiver: Connection, label: str, import_limit_s: float
) -> tuple[dict[str, Any] | None, str]:
    """Return the child's last word, or None when it died without one, and what it was doing."""
    started = time.monotonic()
    phase, said = "importing", ""
    while True:
        elapsed = time.monotonic() - started
        ready = wait([receiver, child.sentinel], timeout=0.5)
        if receiver in ready:
            try:
                message: dict[str, Any] = receiver.recv()
            except EOFError:
                return None, phase
            if "phase" not in message:
                return message, phase
            phase = message["phase"]
        elif child.sentinel in ready:
            return None, phase
        if phase == "importing" and elapsed > import_limit_s:
            child.kill()
            raise TraceError(
                f"trace {label}",
                f"the entry point's module was not imported within {import_limit_s:g} s",
                "does it wait for a network, a lock or an input while it is imported?",
            )
        if elapsed > _SAY_AFTER_S and phase != said:
            sys.stdout.write(f"   trace {label}: {phase}\n")
            sys.stdout.flush()
            said = phase


def _died(child: BaseProcess, version: ModelVersion, log: Path, phase: str) -> BuildError:
    where = f"trace {version.label}"
    tail = f"its output is in {_relative(log)}"
    code = child.exitcode or 0
    if code == -signal.SIGKILL:
        return TraceError(
            where,
            "the child was killed (SIGKILL); the usual reason is that memory ran out",
            f"make the largest batch or axis smaller, or free memory; {tail}",
        )
    if code < 0 and phase.startswith("making the TorchScript (trace"):
        return ProofError(
            where,
            f"crash: PyTorch's tracer ended the child by {signal.Signals(-code).name}",
            "it does not survive an error of an operator that forward catches (`try` around a view): test beforehand "
            f"instead; {tail}",
        )
    if code < 0:
        return ProofError(
            where,
            f"crash: running the model ended the child by {signal.Signals(-code).name}",
            f"code in a library that the model calls corrupts memory at some declared size; {tail}",
        )
    return TraceError(where, f"the model's code ended the process with exit code {code}", tail)


def _relative(path: Path) -> str:
    return os.path.relpath(path)


def _child(declaration: str, root: str, out: str, log: str, sender: Connection) -> None:
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; its terminal sends Ctrl-C to all of us
    os.chdir(root)
    _redirect(log)
    version = ModelVersion.model_validate_json(declaration)
    reply: dict[str, Any]
    with _recording(version, Path(root), out) as opened:
        try:
            from tritonbuild import trace

            def say(phase: str) -> None:
                sender.send({"phase": phase})

            device = trace.run(version, Path(root), Path(out), say)
            reply = {"found": {**_found(version, Path(root), opened), "device": device}}
        except BuildError as error:
            reply = {"error": (type(error).__name__, error.args)}
        except BaseException as error:  # noqa: BLE001  whatever it is, it must reach the parent
            reply = {"bug": traceback.format_exc()}
            if "No space left on device" in str(error):  # safetensors and torch have exceptions of their own for it
                reply = {"error": ("TraceError", (f"trace {version.label}", "no space left on device", _FREE_SPACE))}
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send(reply)
    sender.close()
    # Threads or exit handlers of the model's libraries must not hold the child back, nor crash it after its work.
    os._exit(0)


def _die_with_parent() -> None:
    """End this child with the process that asked for it, even when that is killed.

    PR_SET_PDEATHSIG would be told of the fork server's end only, and the fork server lives as long as its children.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _redirect(log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    os.close(nothing)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    # Texts of the model's errors may hold what no encoding has: names of files that are no UTF-8.
    sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115


@contextlib.contextmanager
def _recording(version: ModelVersion, root: Path, out: str) -> Iterator[dict[str, keys.Stamp | None]]:
    """Collect the files that are opened for reading, as they are then; an audit hook can only be silenced."""
    # Opened by code that is not Python, which no audit hook sees.
    opened = {name: keys.stamp(name) for name in _declared(version, root)}
    active = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if active and event == "open" and isinstance(arguments[0], str) and not (arguments[2] or 0) & os.O_ACCMODE:
            name = os.path.join(root, arguments[0])
            if name.endswith(".pyc"):
                with contextlib.suppress(ValueError):
                    name = source_from_cache(name)
            if name not in opened and not name.startswith(out):
                opened[name] = keys.stamp(name)

    sys.addaudithook(hook)
    _announce_readers()
    try:
        yield opened
    finally:
        active = False


def _declared(version: ModelVersion, root: Path) -> dict[str, str]:
    """Return the files that the declaration names: as they are opened -> relative to root."""
    paths = [declared.values for declared in version.inputs.values()] + [version.weights and version.weights.path]
    return {str(root / path): os.path.normpath(path) for path in paths if path}


def _announce_readers() -> None:
    """Make readers that are not Python tell the audit hook which file they open: Rust's safetensors, libtorch."""
    import safetensors.torch
    import torch

    def announced(read: Any) -> Any:
        def reader(file: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(file, str | os.PathLike):
                sys.audit("open", os.fspath(file), "r", os.O_RDONLY)
            return read(file, *arguments, **options)

        return functools.wraps(read)(reader)

    safe_open = announced(safetensors.safe_open)
    safetensors.safe_open = safetensors.torch.safe_open = safe_open  # type: ignore[misc]
    torch.jit.load = announced(torch.jit.load)


# What tritonbuild writes: in models/ it has folders only, so a plain file there is the project's own.
_GENERATED = re.compile(r"\.build/|models/[^/]+/")
# Thousands of modules lie there, and to resolve each of their paths takes longer than to trace a small model.
_INSTALLED = re.compile(rf"/(site|dist)-packages/|^{re.escape(os.path.dirname(os.__file__))}/")
_NOT_SOURCES = {".git", ".venv", "venv", "site-packages", "__pycache__", "node_modules"}


# The last module that the fork server has imported, and those of its modules that a project may own.
_last_preloaded = ""
_preloaded: list[str] = []


def remember_modules() -> None:
    """Remember what is imported by now: to look at it once more, a child would have to copy thousands of pages."""
    global _last_preloaded
    files = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
    own = f"{os.path.dirname(__file__)}/"
    _preloaded[:] = [
        name for name, file in files.items() if file and not (file.startswith(own) or _INSTALLED.search(file))
    ]
    _last_preloaded = next(reversed(sys.modules))


def _imported() -> list[str]:
    """Return the names of the modules that may be the project's."""
    for count in (256, None):
        # At once, not name by name: a thread of the model may import meanwhile.
        names = list(itertools.islice(reversed(sys.modules), count))
        if _last_preloaded in names:
            return [*names[: names.index(_last_preloaded)], *_preloaded]
    return names


def _found(version: ModelVersion, root: Path, opened: dict[str, keys.Stamp | None]) -> dict[str, Any]:
    own = Path(__file__).resolve().parent
    first_party = {}
    for name in _imported():
        file = getattr(sys.modules.get(name), "__file__", None)
        source = (_inside(file, root, own) or _beside(file, root, own)) if file and os.path.isfile(file) else None
        if source:
            first_party[name] = source
    stamps = {}
    declared = _declared(version, root)
    for name, stamp in opened.items():
        inside = declared.get(name) or _inside(name, root, own)
        # A file that was looked for and was not there counts: it may be there the next time. Not so a temporary file,
        # nor what traceback's machinery looks for.
        looked_for = stamp is None and not name.endswith(".py")
        if inside and (looked_for or os.path.exists(name)):
            stamps[inside] = stamp
    files = tuple(sorted({*first_party.values(), *stamps}))
    modules = [version.entry_point.split(":")[0], *first_party]
    return {"files": files, "distributions": _distributions(modules), "stamps": stamps}


def _inside(name: str | None, root: Path, own: Path) -> str | None:
    """Return the path relative to root if it is a file of the project that is not generated, else None."""
    if not name or name.endswith(".pyc"):
        return None  # the source of a .pyc is among the modules
    # As it is named, so that a link to somewhere else counts; else as it is, when the project itself lies behind one.
    path = os.path.normpath(os.path.join(root, name))
    inside = _below(path, root)
    if inside is None and not _INSTALLED.search(path):
        inside = _below(os.path.realpath(path), root)
    if inside is None:
        return None
    parts = inside.split("/")
    generated = _GENERATED.match(inside) or not _NOT_SOURCES.isdisjoint(parts)
    return None if generated or os.path.isdir(path) or Path(path).resolve().is_relative_to(own) else inside


def _beside(file: str, root: Path, own: Path) -> str | None:
    """Return the path, from root, of a module that is neither in the project nor installed, else None.

    A package that is installed to be edited, or a folder on PYTHONPATH: its version says nothing about its content.
    """
    path = os.path.realpath(file)
    if _INSTALLED.search(file) or _INSTALLED.search(path) or not path.endswith(".py"):
        return None
    if _below(path, root) or Path(path).is_relative_to(own):
        return None
    return os.path.relpath(path, root.resolve())


def _below(path: str, root: Path) -> str | None:
    return next((path[len(folder) :] for folder in _spellings(root) if path.startswith(folder)), None)


@functools.cache
def _spellings(root: Path) -> tuple[str, str]:
    return f"{root}/", f"{root.resolve()}/"


def _distributions(modules: list[str]) -> tuple[str, ...]:
    """Return the installed distributions that these modules are of, or name in their own namespace."""
    tops = {modules[0].split(".")[0]}
    for name in modules:
        for value in list(vars(sys.modules.get(name, object())).values()) if name in sys.modules else ():
            of = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(of, str):
                tops.add(of.split(".")[0])
    names = {"torch"}
    own = {name.split(".")[0] for name in modules[1:]} | {"torch", "tritonbuild", "__main__"}
    for top in tops - set(sys.stdlib_module_names) - own:
        try:
            names.add(metadata.distribution(top).metadata["Name"])
        except metadata.PackageNotFoundError:
            names.update(metadata.packages_distributions().get(top, ()))
    return tuple(sorted(names))
