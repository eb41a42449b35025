"""Decides what is watched while eager runs: what leaves torch for Python, which way Python's code goes.

A monitor accuses nobody. It says where to look: which numbers to try, which line to name, whether random numbers or
chance are worth a closer test. Hides torch's function mode, Python's tracing, and which files are the user's own.

Source: torch.overrides (TorchFunctionMode), sys.settrace with opcode events, the DESIGN's table of detectors.
"""

from __future__ import annotations

import contextlib
import datetime
import dis
import functools
import gc
import os
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import CodeType, FrameType

_SMALL = 64
"""Numbers of one container or tensor that are looked at."""

_STEPS = 200_000
"""Instructions of one call that are remembered; longer loops are compared up to here."""

_BOOLS = frozenset({"__bool__", "equal", "allclose", "is_nonzero", "__contains__"})
_NUMBERS = frozenset({"__int__", "__float__", "__index__", "__complex__", "item", "tolist"})
_ARRAYS = frozenset({"numpy", "__array__", "__dlpack__", "storage", "untyped_storage", "_typed_storage"})
_TEXTS = frozenset({"__repr__", "__str__", "__format__"})
_ESCAPES = _BOOLS | _NUMBERS | _ARRAYS | _TEXTS

_COMPARISONS = frozenset(
    {"gt", "lt", "ge", "le", "eq", "ne", "__gt__", "__lt__", "__ge__", "__le__", "__eq__", "__ne__"}
    | {"greater", "less", "greater_equal", "less_equal", "not_equal", "isclose", "isin", "clamp", "__contains__"}
)
_RANDOM = frozenset(
    {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "multinomial"}
    | {"normal", "poisson", "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "cauchy_", "geometric_"}
    | {"log_normal_", "rrelu", "gumbel_softmax", "fractional_max_pool2d", "fractional_max_pool3d"}
)
DROPOUT = frozenset(
    {"dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}
    | {"alpha_dropout_", "feature_dropout", "feature_dropout_", "feature_alpha_dropout_"}
)
UNFILLED = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "resize_"})
_DEEP = frozenset(
    {"linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "matmul"}
    | {"bmm", "mm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention", "bilinear", "__matmul__", "lstm"}
    | {"gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "multi_head_attention_forward", "tensordot", "mv", "dot"}
    | {"_transformer_encoder_layer_fwd", "_native_multi_head_attention", "cumsum", "cumprod", "conv_tbc"}
)


def _inside(path: str | Path) -> str:
    return f"{path}{os.sep}"  # or torchvision would lie inside torch


_OURS = _inside(Path(__file__).parent)
_TORCH = tuple(_inside(Path(module.__file__ or "").parent) for module in (torch, numpy))
_STDLIB = _inside(sysconfig.get_path("stdlib"))
_SITE = tuple(_inside(sysconfig.get_path(name)) for name in ("purelib", "platlib"))


_NOW = frozenset({"now", "utcnow", "today"})
_READ_VARIABLE = type(os.environ).__getitem__.__code__
_VARIABLES = frozenset({_READ_VARIABLE.co_filename, Mapping.get.__code__.co_filename})
"""The files, frozen or not, through which a variable of the environment is read."""


@functools.lru_cache(maxsize=4096)
def first_party(filename: str) -> bool:
    """Return whether a file holds model code: not torch's, numpy's, Python's or ours."""
    if filename.startswith("<"):  # generated code: dataclasses, named tuples, torch.fx
        return False
    if filename.startswith((_OURS, *_TORCH)):
        return False
    # site-packages may lie inside the standard library's folder; a model library there is model code.
    return filename.startswith(_SITE) or not filename.startswith(_STDLIB)


@dataclass(frozen=True)
class Site:
    """A line of model code."""

    file: str
    line: int

    def __str__(self) -> str:
        """Return `src/zoo/text.py:12`, relative to the working folder where that is shorter."""
        try:
            shown = str(Path(self.file).relative_to(Path.cwd()))
        except ValueError:
            shown = self.file
        return f"{shown}:{self.line}"


def here() -> Site | None:
    """Return the innermost line of model code that is being run."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if first_party(frame.f_code.co_filename):
            return Site(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return None


@dataclass(frozen=True)
class Escape:
    """A value that left torch for Python.

    Attributes:
        kind: `bool`, `number`, `array` or `text`.
        name: What was called: `__bool__`, `item`, `numpy`.
        value: The Python value of a bool or a number, else None.
        site: Where.
    """

    kind: str
    name: str
    value: Any
    site: Site | None


@dataclass
class Observation:
    """What one eager call did.

    Attributes:
        escapes: Values that left torch, in order.
        steps: Instructions of model code, in order, as (code, offset).
        numbers: Numbers that the executed model code holds or compares tensors with.
        random: Calls that draw random numbers, name and line.
        dropout: Calls of dropout, name and line.
        unfilled: Calls that return uninitialised memory, name and line.
        clocks: Calls that read the time or the date, name and line.
        environment: Variables of the environment that model code read, name and line.
        texts: Short texts that the executed model code holds.
        in_place: Lines that changed an input, input's index and line.
        dtype: Coarsest floating dtype of all results.
        depth: Matrix products and convolutions.
        bytes: Size of all results together.
    """

    escapes: list[Escape] = field(default_factory=list)
    steps: list[tuple[CodeType, int]] = field(default_factory=list)
    numbers: set[float] = field(default_factory=set)
    random: list[tuple[str, Site | None]] = field(default_factory=list)
    dropout: list[tuple[str, Site | None]] = field(default_factory=list)
    unfilled: list[tuple[str, Site | None]] = field(default_factory=list)
    clocks: list[tuple[str, Site | None]] = field(default_factory=list)
    environment: list[tuple[str, Site | None]] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)
    in_place: list[tuple[int, Site | None]] = field(default_factory=list)
    dtype: torch.dtype | None = None
    depth: int = 0
    bytes: int = 0

    def same_way(self, other: Observation) -> bool:
        """Return whether Python's code went the same way: the same instructions, the same bools that left torch."""
        bools, others = ([e.value for e in seen.escapes if e.kind == "bool"] for seen in (self, other))
        return bools == others and self.steps == other.steps


def called_random(seen: Observation) -> list[tuple[str, Site | None]]:
    """Return the calls whose results are a matter of chance."""
    return [*seen.random, *seen.dropout, *seen.unfilled, *seen.clocks, *seen.environment]


class _Watch(TorchFunctionMode):
    """Sees every call of torch from Python; calls inside TorchScript and inside the operators are not Python's."""

    def __init__(self, seen: Observation, module: nn.Module, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.seen = seen
        self.held = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self.inputs = inputs
        self.versions = [tensor._version for tensor in inputs]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "__get__":  # shape, dtype, device, ...: nothing of the values
            return result
        seen = self.seen
        if name in _ESCAPES:
            self._escaped(name, result)
        elif name in _DEEP:
            seen.depth += 1
        elif name in _RANDOM:
            seen.random.append((name, here()))
        elif name in DROPOUT:
            seen.dropout.append((name, here()))
        elif name in UNFILLED:
            seen.unfilled.append((name, here()))
        if name in _COMPARISONS:
            self._compared(args)
        if name.endswith("_") or "out" in (kwargs or {}) or name.startswith("__i"):
            self._changed()
        if isinstance(result, Tensor):
            self._coarser(result.dtype)
            seen.bytes += result.nbytes
        return result

    def _escaped(self, name: str, result: Any) -> None:
        kind = "bool" if name in _BOOLS else "number" if name in _NUMBERS else "array" if name in _ARRAYS else "text"
        value = result if kind == "bool" or isinstance(result, (bool, int, float)) else None
        self.seen.escapes.append(Escape(kind, name, value, here()))

    def _compared(self, args: Sequence[Any]) -> None:
        for arg in args:
            if isinstance(arg, (int, float)):
                self.seen.numbers.add(arg)
            elif isinstance(arg, Tensor) and (not arg.dim() or (id(arg) in self.held and arg.numel() <= _SMALL)):
                # A tensor under vmap or without data has no numbers.
                with torch._C.DisableTorchFunction(), contextlib.suppress(RuntimeError, NotImplementedError):
                    self.seen.numbers |= _numbers(arg.detach().flatten().tolist())

    def _changed(self) -> None:
        for i, tensor in enumerate(self.inputs):
            if tensor._version != self.versions[i]:
                self.versions[i] = tensor._version
                self.seen.in_place.append((i, here()))

    def _coarser(self, dtype: torch.dtype) -> None:
        seen = self.seen
        if dtype.is_floating_point and (not seen.dtype or torch.finfo(dtype).eps > torch.finfo(seen.dtype).eps):
            seen.dtype = dtype


class _Steps:
    """Remembers the instructions of model code that are run, what reads the clock, and what reads the environment."""

    def __init__(self, seen: Observation) -> None:
        self.seen = seen
        self.codes: dict[CodeType, dict[str, Any]] = {}

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        # Callbacks of the collector, and `__del__` of what it finds, run where they happen to: not the model's way.
        self.collected = gc.isenabled()
        gc.disable()
        # Python 3.12 has opcode events only if a frame has asked for them before the tracing starts.
        sys._getframe().f_trace_opcodes = True
        self.profiled = sys.getprofile() is not None  # somebody measures us: leave that alone
        sys.settrace(self._call)
        if not self.profiled:
            sys.setprofile(self._profile)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)
        if not self.profiled:
            sys.setprofile(None)
        if self.collected:
            gc.enable()
        for code, names in self.codes.items():
            self.seen.numbers |= _numbers(code.co_consts)
            self.seen.numbers |= _numbers(names[name] for name in code.co_names if name in names)
            self.seen.texts |= {text for text in code.co_consts if isinstance(text, str) and len(text) <= _SMALL}

    def _call(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        if not first_party(frame.f_code.co_filename):
            return None
        self.codes[frame.f_code] = frame.f_globals
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self._opcode

    def _opcode(self, frame: FrameType, event: str, _arg: Any) -> Any:
        if event == "opcode" and len(self.seen.steps) < _STEPS:
            self.seen.steps.append((frame.f_code, frame.f_lasti))
        return self._opcode

    def _profile(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "c_call" and _is_clock(arg):
            self.seen.clocks.append((arg.__name__, here()))
        elif event == "call" and frame.f_code is _READ_VARIABLE:
            reader = frame.f_back
            while reader is not None and reader.f_code.co_filename in _VARIABLES:
                reader = reader.f_back
            if reader is not None and first_party(reader.f_code.co_filename):
                self.seen.environment.append((str(frame.f_locals["key"]), here()))


def _is_clock(function: Any) -> bool:
    if getattr(function, "__module__", None) == "time":
        return True
    owner = getattr(function, "__self__", None)
    return isinstance(owner, type) and issubclass(owner, datetime.date) and function.__name__ in _NOW


def _numbers(values: Iterable[Any]) -> set[float]:
    found: set[float] = set()
    for value in values:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found.add(value)
        elif isinstance(value, (tuple, list, set, frozenset)) and len(value) <= _SMALL:
            found |= _numbers(value)
        elif isinstance(value, dict) and len(value) <= _SMALL:
            found |= _numbers(value) | _numbers(value.values())
    return found


def _unchecked(*_: object, **__: object) -> None:
    pass


def observe(module: nn.Module, inputs: Sequence[Tensor], run: Callable[[], Any]) -> Observation:
    """Run `run`, which calls the module with the inputs, and return what it did.

    The answer of a watched call is not eager's: torch leaves its fast paths when it is watched.
    """
    seen = Observation()
    # torch's own checks import sympy, for seconds, and only on the paths that watching makes it take.
    with mock.patch.object(torch, "_check_with", _unchecked), _Watch(seen, module, inputs), _Steps(seen):
        run()
    for part in module.modules():
        if first_party(getattr(sys.modules.get(type(part).__module__), "__file__", None) or "<none>"):
            own = {name: value for name, value in vars(part).items() if name not in nn.Module.__annotations__}
            seen.numbers |= _numbers(own.values()) | _numbers(vars(type(part)).values())
    return seen


@dataclass(frozen=True)
class Fork:
    """Where two calls went different ways."""

    kind: str
    """`branch` or `loop`."""
    site: Site


def fork(one: Observation, two: Observation) -> Fork | None:
    """Return the first line at which model code went different ways in two calls, or None."""
    last = None
    for step, other in zip(one.steps, two.steps, strict=False):
        if step != other:
            break
        last = step
    else:
        if len(one.steps) == len(two.steps):
            return None
    if last is None:
        return None
    code, offset = last
    starts = [line for start, line in dis.findlinestarts(code) if start <= offset and line is not None]
    site = Site(code.co_filename, starts[-1] if starts else code.co_firstlineno)
    return Fork("loop" if _repeats(code, offset) else "branch", site)


def _repeats(code: CodeType, offset: int) -> bool:
    """Return whether the instruction decides if a loop goes on: the head of a `for`, the test of a `while`."""
    starts = {start: line for start, line in dis.findlinestarts(code) if line is not None}
    names, lines, back = {}, {}, []
    line = code.co_firstlineno
    for step in dis.get_instructions(code):
        line = starts.get(step.offset, line)
        names[step.offset], lines[step.offset] = step.opname, line
        if "JUMP" in step.opname and isinstance(step.argval, int) and step.argval <= step.offset:
            back.append((step.offset, step.argval))
    # From Python 3.12 on the test of a `while` is there twice, and only the second one jumps back, to the body. What
    # jumps back to the head of a `for` is the end of its body, which may be an `if`.
    tests = {lines[at] for at, to in back if names[to] != "FOR_ITER"}
    return names[offset] == "FOR_ITER" or lines[offset] in tests
