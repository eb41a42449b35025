"""Decides which TorchScripts of a model are tried, in which order, and how each is made.

`trace` comes first, then a trace with the guilty submodules scripted (those in whose code the tracer warned), then the
whole model scripted. Each is made from a fresh model: tracing and scripting change what they work on. None is
trusted; the proof decides. Hides torch.jit: what it warns about, what it raises, where in the user's code.

Source: torch/jit/_trace.py and _script.py; DESIGN's measurement of what scripting mends.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys
import warnings
from pathlib import Path
from types import BuiltinMethodType, MethodType
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO
from unittest import mock

import torch
from torch import nn
from torch.autograd.function import Function, FunctionCtx
from torch.jit._trace import TracerWarning as JitWarning

from tritonbuild.entry import Builder, is_user_code, last_line, seeded, shown_path
from tritonbuild.errors import BuildError, TraceError
from tritonbuild.scripting import scripted
from tritonbuild.yamlfile import closest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType, ModuleType

    from torch import Tensor

    from tritonbuild.spec import ModelVersion

_NAMED = 3


class TracerWarning(NamedTuple):
    """What torch.jit.trace warned about.

    Attributes:
        message: Its text.
        filename: The source file of the innermost user code, absolute.
        lineno: The line in it.
        module: The name of the submodule whose forward was running; "" for the model itself.
    """

    message: str
    filename: str
    lineno: int
    module: str


class Candidate(NamedTuple):
    """One way to a TorchScript: what it is called, and what makes it."""

    description: str
    make: Attempt


class Attempt:
    """Makes a TorchScript from a fresh model.

    Attributes:
        warnings: What the tracer warned about, once it is made.
        traced: Whether it is a trace, with scripted parts or without.
        blamed: Lines that a proof blames, `src/zoo/text.py:12`; who proves it adds them.

    Args:
        build: Returns a fresh model behind its measured interface.
        example: The inputs to trace with.
        names: Submodules to script before tracing; None to script the whole model.
    """

    def __init__(self, build: Builder, example: Sequence[Tensor], names: Sequence[str] | None) -> None:
        self.warnings: list[TracerWarning] = []
        self.traced = names is not None
        self.blamed: list[str] = []

        self._build = build
        self._example = example
        self._names = names

    def __call__(self) -> torch.jit.ScriptModule:
        """Return the TorchScript; `warnings` then holds what the tracer warned about.

        Raises:
            TraceError: torch.jit cannot do it.
        """
        where = f"trace {self._build.version.label}"
        model = self._build()
        root = self._build.root
        with seeded(self._build.version.seed), quiet(), torch.no_grad():
            if self._names is None:
                try:
                    return scripted(model)
                except BuildError:
                    raise
                except Exception as error:
                    raise TraceError(where, f"the model cannot be scripted: {explained(error, root)}") from error
            for name in self._names:
                try:
                    script_submodule(model.module, name)
                except Exception as error:
                    what = f'submodule "{name}" cannot be scripted: {explained(error, root)}'
                    raise TraceError(where, what, "script another submodule, or change its forward") from error
            example = tuple(tensor.clone() for tensor in self._example)
            try:
                with _collected(self.warnings, model.module), _inlined(model.module):
                    made = _trace(model, example)
            except BuildError:
                raise
            except Exception as error:
                raise TraceError(where, f"the model cannot be traced: {explained(error, root)}") from error
        assert isinstance(made, torch.jit.ScriptModule)
        return made


def candidates(version: ModelVersion, build: Callable[[], nn.Module], example: Sequence[Tensor]) -> Iterator[Candidate]:
    """Yield the TorchScripts to try, in order.

    What follows the first depends on its warnings and on what it is blamed for, so make and prove each before the next
    is asked for.

    Args:
        version: The declaration; `trace.method` and `trace.script` choose.
        build: What `entry.builder` returned, with its interface measured.
        example: Inputs at the example sizes, in declared order.

    Raises:
        TraceError: `trace.script` names what is no submodule.
    """
    assert isinstance(build, Builder)
    names = version.trace.script
    _check_names(names, build)
    if version.trace.method == "script":
        yield Candidate("script", Attempt(build, example, None))
        return
    first = Attempt(build, example, names)
    yield Candidate(_description(names), first)
    if version.trace.method == "trace":
        return
    guilty = outermost(
        [*(warning.module for warning in first.warnings if warning.module), *_owners(first.blamed, build)]
    )
    more = tuple(name for name in guilty if outermost([*names, name]) != outermost(names))
    if more:
        both = (*names, *more)
        yield Candidate(_description(both), Attempt(build, example, outermost(both)))
    yield Candidate("script", Attempt(build, example, None))


def _trace(model: nn.Module, example: tuple[Tensor, ...]) -> object:
    # check_trace compares one more run at the same sizes; the proof does better, and on a fresh model.
    return torch.jit.trace(model, example, check_trace=False)  # type: ignore[no-untyped-call]


def outermost(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names without those inside another one, each once."""
    unique = list(dict.fromkeys(names))
    return tuple(name for name in unique if not any(name.startswith(f"{other}.") for other in unique))


def _owners(places: Sequence[str], build: Builder) -> list[str]:
    """Return the submodules whose class has one of the lines in a method."""
    blamed = {
        (Path(file).resolve(), int(line)) for file, _, line in (place.rpartition(":") for place in places) if file
    }
    return [name for name, kind in build.submodules.items() if blamed and blamed & _lines(kind)]


def _lines(kind: type[nn.Module]) -> frozenset[tuple[Path, int]]:
    codes = [part.__code__ for base in kind.__mro__ for part in vars(base).values() if inspect.isfunction(part)]
    return frozenset(
        (Path(code.co_filename).resolve(), line)
        for code in codes
        if is_user_code(code.co_filename)
        for _, _, line in code.co_lines()
        if line
    )


def script_submodule(model: nn.Module, name: str) -> None:
    """Put the scripted submodule in its place, wherever the model holds it."""
    submodule = model.get_submodule(name)
    if isinstance(submodule, (nn.ModuleList, nn.ModuleDict)):
        # A list of modules has no forward to script; its user iterates over the members.
        for child in dict(submodule.named_children()):
            script_submodule(model, f"{name}.{child}")
        return
    made = torch.jit.script(submodule)
    for parent in list(model.modules()):
        if isinstance(parent, torch.jit.ScriptModule):
            continue
        for child, module in parent._modules.items():
            if module is submodule:
                parent._modules[child] = made


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence torch.jit's announcement that it is deprecated, by its text, and nothing else."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # torch 2.13 and before, torch 2.14
            warnings.filterwarnings("ignore", message=r"`torch\.jit\.", category=category)
        yield


def explained(error: BaseException, root: Path) -> str:
    """Return what torch.jit or the user's code raised, on one line, with the line of the user's code."""
    text = str(error).strip()
    place = _marked_line(text, root) or last_line(error, root)
    reason = next((line.strip().rstrip(":.") for line in text.splitlines() if line.strip()), type(error).__name__)
    if not place or place in reason:
        return reason
    return f"{reason} ({place})"


_PLACE = re.compile(r'File "([^"]+)", line (\d+)')
_CALLED = re.compile(r"^(\S+)\((\d+)\): ", re.MULTILINE)
"""A line of the stack that a traced node remembers."""


def _marked_line(text: str, root: Path) -> str:
    """Return the line that torch.jit names in its message; the innermost comes first."""
    called = (place for place in _CALLED.finditer(text) if is_user_code(place[1]))
    place = _PLACE.search(text) or next(called, None)
    return f"{shown_path(place[1], root)}:{place[2]}" if place else ""


@contextlib.contextmanager
def _inlined(model: nn.Module) -> Iterator[None]:
    """Let a torch.autograd.Function run its forward as plain code: the tracer would record a call of Python.

    Such a call cannot be saved. Nothing differentiates what is served, so forward is all that there is to it.
    """

    def apply(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function.setup_context is not Function.setup_context:
            return function.forward(*args, **kwargs)
        context: Any = FunctionCtx()
        context.needs_input_grad = (False,) * len(args)
        return function.forward(context, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Function, "apply", classmethod(apply)))
        # `swish = Swish.apply`, in a module or in an attribute, holds the method itself.
        for held in [vars(part) for part in model.modules()] + [vars(module) for module in _homes(model)]:
            for key, value in list(held.items()):
                method = isinstance(value, (BuiltinMethodType, MethodType))
                if method and isinstance(value.__self__, type) and issubclass(value.__self__, Function):
                    held[key] = functools.partial(apply, value.__self__)
                    stack.callback(held.__setitem__, key, value)
        yield


def _homes(model: nn.Module) -> list[ModuleType]:
    """Return the modules that hold the code of a model's parts."""
    names = {base.__module__ for kind in {type(part) for part in model.modules()} for base in kind.__mro__}
    return [sys.modules[name] for name in sorted(names) if name in sys.modules]


@contextlib.contextmanager
def _collected(found: list[TracerWarning], model: nn.Module) -> Iterator[None]:
    """Collect the tracer's warnings with the line and the submodule that they are about; let the others pass."""
    names = {id(module): name for name, module in model.named_modules()}

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, JitWarning):
            before(message, category, filename, lineno, file, line)
            return
        warning = _located(" ".join(str(message).split()), filename, lineno, names)
        if warning not in found:
            found.append(warning)

    with warnings.catch_warnings():
        before = warnings.showwarning
        warnings.simplefilter("always", JitWarning)
        # torch's own modules test shapes in ways that are right for every shape. torch's own filter, "torch.(?!jit)",
        # would silence torchvision, too.
        warnings.filterwarnings("ignore", category=JitWarning, module=r"torch\.(?!jit)")
        warnings.showwarning = show
        yield


def _located(message: str, filename: str, lineno: int, names: dict[int, str]) -> TracerWarning:
    """Find the user's line and the submodule on the stack: the warning is shown while its code still runs."""
    frame: FrameType | None = sys._getframe(2)
    line: tuple[str, int] | None = None
    while frame is not None:
        if line is None and is_user_code(frame.f_code.co_filename):
            line = (frame.f_code.co_filename, frame.f_lineno)
        name = names.get(id(frame.f_locals.get("self")))
        if name is not None:
            return TracerWarning(message, *(line or (filename, lineno)), name)
        frame = frame.f_back
    return TracerWarning(message, *(line or (filename, lineno)), "")


def _check_names(names: Sequence[str], build: Builder) -> None:
    for name in names:
        if name not in build.submodules:
            known = ", ".join([*build.submodules][:8]) + (", ..." if len(build.submodules) > 8 else "")
            raise TraceError(
                f"trace {build.version.label}",
                f'trace: script: the model has no submodule "{name}"{closest(name, build.submodules)}',
                f"it has {known}" if known else "it has none; method: script scripts the whole model",
            )


def _description(names: Sequence[str]) -> str:
    if not names:
        return "trace"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"trace with scripted {', '.join(names[:_NAMED])}{more}"
