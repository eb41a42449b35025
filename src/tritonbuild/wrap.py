"""Decides what Triton sees of a model: tensors in, under the declared names; a flat tuple of tensors out.

Hides how a model wants to be called (by name, by order, with one list or one dict of tensors) and what it returns (a
dict, a dataclass, a named tuple, anything nested). `Flat` is the eager module with that interface; `scripting`
gives it to a scripted one. Three things are changed on the way, and nothing else: entries that are None
are left out, a bfloat16 output becomes float32 (Triton's PyTorch backend has no bfloat16), and an output without axes
gets one where there is no batch. A model whose floats are all bfloat16 and that raises for the declared inputs as they
are gets its float inputs cast to bfloat16; one that takes them is left alone.

Source: the PyTorch backend's rules on arguments and outputs, measured on it.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from keyword import iskeyword
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tritonbuild import dtypes
from tritonbuild.errors import TraceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tritonbuild.spec import ModelVersion

# Names that TorchScript's serialization changes, or that hide a name which the saved code needs.
_RESERVED = frozenset(
    {"self", "torch", "ops", "aten", "_", "__torch__", "CONSTANTS", "NoneType", "Ellipsis", "inf", "nan"}
    | {"int", "float", "bool", "complex", "str", "print", "isinstance", "getattr", "fork", "annotate"}
    | {"uninitialized", "unchecked_cast"}
)

Style = Literal["names", "order", "list", "tuple", "dict"]


class Step(NamedTuple):
    """One step into a result: `how` is index, key or field, `at` which one, `position` in a tuple or list."""

    how: str
    at: Any
    position: int | None
    siblings: int


@dataclass(frozen=True)
class Leaf:
    """One entry of what a model returns.

    Attributes:
        steps: How to reach it.
        value: A tensor, or what cannot be served.
    """

    steps: tuple[Step, ...]
    value: Any

    @property
    def path(self) -> str:
        """`['out']`, `[1].logits`; empty for the result itself."""
        return "".join(f".{step.at}" if step.how == "field" else f"[{step.at!r}]" for step in self.steps)

    @property
    def name(self) -> str | None:
        """The last key or field that is a name."""
        named = [step.at for step in self.steps if step.how != "index" and isinstance(step.at, str)]
        return named[-1] if named else None


def leaves(result: object, steps: tuple[Step, ...] = ()) -> Iterator[Leaf]:
    """Yield the entries of what a model returned, in its order, without those that are None."""
    inside: list[tuple[str, Any, Any]] | None = None
    if isinstance(result, Mapping):
        # transformers' ModelOutput is a dict and a dataclass: people read its entries as fields.
        inside = [("field" if is_dataclass(result) else "key", key, value) for key, value in result.items()]
    elif isinstance(result, tuple) and hasattr(result, "_fields"):
        inside = [("field", field, value) for field, value in zip(result._fields, result, strict=True)]
    elif isinstance(result, (list, tuple)):
        inside = [("index", i, value) for i, value in enumerate(result)]
    elif is_dataclass(result) and not isinstance(result, type):
        inside = [("field", field.name, getattr(result, field.name)) for field in fields(result)]
    if inside is not None:
        ordered = isinstance(result, (list, tuple))
        for i, (how, at, value) in enumerate(inside):
            yield from leaves(value, (*steps, Step(how, at, i if ordered else None, len(inside))))
    elif result is not None:
        yield Leaf(steps, result)


@dataclass(frozen=True)
class Output:
    """One output: its name, where it stands in the model's result, and what it was there at the first call."""

    name: str
    leaf: Leaf
    dtype: torch.dtype
    axes: int


class Interface:
    """How one model version is called and what becomes of its result; measured once, shared by all its modules.

    Args:
        version: The declaration.
                styles: How forward may take the inputs, from `calling.styles`.
    """

    def __init__(self, version: ModelVersion, styles: Sequence[Style]) -> None:
        self.where = f"trace {version.label}"
        self.inputs = tuple(version.inputs)
        self.dtypes = tuple(declared.dtype for declared in version.inputs.values())
        self.style = styles[0]
        self._styles = tuple(styles)
        self.batched = version.max_batch_size > 0
        self.cast: torch.dtype | None = None
        self.outputs: tuple[Output, ...] | None = None
        self.left_out: tuple[str, ...] = ()
        self._declared = version.outputs

    def __deepcopy__(self, memo: object) -> Interface:
        """Copies of a model share its interface, so that what one measures holds for all."""
        return self

    @property
    def arguments(self) -> tuple[str, ...]:
        """The argument names of the TorchScript: the input names, or positions if one of them cannot be an argument."""
        if all(name.isidentifier() and not iskeyword(name) and name not in _RESERVED for name in self.inputs):
            return self.inputs
        return tuple(f"input_{i}" for i in range(len(self.inputs)))

    @property
    def sources(self) -> tuple[tuple[str, str], ...]:
        """Output name and path in the model's result, in served order; empty before the first call."""
        return tuple((output.name, output.leaf.path) for output in self.outputs or ())

    def first_call(self, module: nn.Module, tensors: Sequence[Tensor]) -> object:
        """Call forward in each way that may be meant until one does not raise; that one stays."""
        casts = [None, torch.bfloat16] if _is_bfloat16(module) else [None]
        first: Exception | None = None
        for cast, style in itertools.product(casts, self._styles):
            self.cast, self.style = cast, style
            try:
                return self.call(module, [x.clone() for x in tensors])
            except Exception as error:  # noqa: BLE001  the model's code may raise anything
                first = first or error
        self.style, self.cast = self._styles[0], None
        assert first
        raise first

    def call(self, module: Callable[..., object], tensors: Sequence[Tensor]) -> object:
        """Call the model's forward with the inputs, in declared order."""
        if self.cast is not None:
            tensors = [x.to(self.cast) if x.is_floating_point() else x for x in tensors]
        if self.style == "names":
            return module(**dict(zip(self.inputs, tensors, strict=True)))
        if self.style == "list":
            return module(list(tensors))
        if self.style == "tuple":
            return module(tuple(tensors))
        if self.style == "dict":
            return module(dict(zip(self.inputs, tensors, strict=True)))
        return module(*tensors)

    def flat(self, result: object) -> tuple[Tensor, ...]:
        """Return the outputs as tensors that Triton carries: as many as there are now; the proof sees a change."""
        found = list(leaves(result))
        if self.outputs is None:
            chosen = self._chosen(found)
            for name, leaf in chosen:
                self._check(name, leaf)
            self.outputs = tuple(
                Output(name, Leaf(leaf.steps, None), leaf.value.dtype, leaf.value.dim()) for name, leaf in chosen
            )
            taken = {leaf.path for _, leaf in chosen}
            self.left_out = tuple(leaf.path for leaf in found if leaf.path not in taken)
        names = {output.leaf.path: output.name for output in self.outputs}
        if self.left_out:
            found = [leaf for leaf in found if leaf.path in names]
        order = list(names)
        found.sort(key=lambda leaf: order.index(leaf.path) if leaf.path in names else len(order))
        tensors = []
        for leaf in found:
            self._check(names.get(leaf.path, "beyond the first call's"), leaf)
            tensor = leaf.value.float() if leaf.value.dtype is torch.bfloat16 else leaf.value
            tensors.append(tensor if tensor.dim() or self.batched else tensor.reshape(1))
        return tuple(tensors)

    def _chosen(self, found: list[Leaf]) -> tuple[tuple[str, Leaf], ...]:
        """Bind output names to entries: by key where the names are keys of the result, otherwise by order."""
        shown = ", ".join(leaf.path or "one value" for leaf in found)
        if not found:
            raise TraceError(self.where, "the model returns nothing", "forward must return at least one tensor")
        if not self._declared:
            return tuple((f"OUTPUT__{i}", leaf) for i, leaf in enumerate(found))
        named = {leaf.name: leaf for leaf in found if leaf.name is not None}
        names = [leaf.name for leaf in found]
        if all(names.count(name) == 1 for name in self._declared):  # what is not named may have names twice
            return tuple((name, named[name]) for name in self._declared)
        if len(self._declared) != len(found):
            raise TraceError(
                self.where,
                f"outputs declares {len(self._declared)} ({', '.join(self._declared)}), "
                f"the model returns {len(found)}: {shown}",
                "name all in this order, or leave outputs out; of a dict or dataclass, keys alone may be named",
            )
        for name, leaf in zip(self._declared, found, strict=True):
            if name in named and leaf.name != name:
                raise TraceError(
                    self.where,
                    f'output "{name}" would be {leaf.path or "the only value"} of the result, by order, '
                    f"but the result has {named[name].path}: {shown}",
                    "use the result's keys for all outputs, or for none",
                )
        return tuple(zip(self._declared, found, strict=True))

    def _check(self, name: str, leaf: Leaf) -> None:
        value, at = leaf.value, f" ({leaf.path} of the result)" if leaf.path else ""
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            advice = "a trace would freeze it to the example's; compute it with torch and return a tensor"
            if isinstance(value, (str, bytes, set, frozenset)) or callable(value):
                advice = "return tensors only, in a module of your own around this one"
            raise TraceError(self.where, f"output {name}{at} is {_article(kind)}, expected a tensor", advice)
        if value.layout is not torch.strided or value.is_nested:
            layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
            raise TraceError(
                self.where,
                f"output {name}{at} is a {layout} tensor, expected a dense one",
                "return y.to_padded_tensor(0.0)" if value.is_nested else "return y.to_dense()",
            )
        dtype = str(value.dtype).removeprefix("torch.")
        if value.is_quantized:
            raise TraceError(self.where, f"output {name}{at} is quantized ({dtype})", "return y.dequantize()")
        refusal = None if dtype == "bfloat16" else dtypes.refusal(dtype)
        if refusal:
            what, _, advice = refusal.rpartition("; ")
            raise TraceError(self.where, f"output {name}{at}: {what}", advice)


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0].lower() in "aeiou" else f"a {kind}"


class Flat(nn.Module):
    """A model whose forward takes the declared inputs, in order, and returns a flat tuple of tensors.

    Args:
        module: The eager model.
        interface: How it is called.
    """

    def __init__(self, module: nn.Module, interface: Interface) -> None:
        super().__init__()
        self.module = module
        self._interface = interface

    @property
    def interface(self) -> Interface:
        """How the model is called and what becomes of its result."""
        return self._interface

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs, in declared order."""
        interface = self._interface
        call = interface.call if interface.outputs else interface.first_call
        return interface.flat(call(self.module, tensors))


def flat(module: nn.Module, interface: Interface) -> Flat:
    """Return the model behind its interface, in the mode (eval) that it is in."""

    def forward(self: Flat, *tensors: Tensor) -> tuple[Tensor, ...]:
        return Flat.forward(self, *tensors)

    # torch.jit.trace names the TorchScript's arguments after this signature, and Triton binds inputs by those names.
    names = ("self", *interface.arguments)
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    made: Flat = type("Flat", (Flat,), {"forward": forward, "__module__": __name__})(module, interface)
    return made.train(module.training)


def _is_bfloat16(module: nn.Module) -> bool:
    kinds = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    return kinds == {torch.bfloat16}
