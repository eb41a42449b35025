"""Decides how a model's forward takes the declared inputs: by name, by order, or all in one list, tuple or dict.

Hides Python's signatures. By name where every declared input is an argument and every required argument is declared,
so that arguments with defaults may be left out; otherwise by order. What Triton cannot feed is refused here: an
argument that is no tensor, a wrong number, a name that would land on another argument than its own.

Source: Triton binds inputs of a TorchScript by argument name or by order in the same way (measured on the C++ backend).
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tritonbuild.errors import TraceError
from tritonbuild.scripting import schema_of

if TYPE_CHECKING:
    from tritonbuild.spec import ModelVersion
    from tritonbuild.wrap import Style

_WRAPPER = "write a module of your own around this one, whose forward takes tensors only"
_EMPTY = inspect.Parameter.empty
_NEVER_TENSORS = (bool, int, float, complex, str, bytes)


def styles(module: nn.Module, version: ModelVersion) -> tuple[Style, ...]:
    """Return how forward may take the inputs, the likeliest first; the first that does not raise is right.


    Raises:
        TraceError: There is no forward, or it does not fit the declared inputs.
    """
    where = f"trace {version.label}"
    owner = type(module).__name__
    if getattr(module.forward, "__func__", None) is nn.Module.forward:
        raise TraceError(where, f"{owner} has no forward", "define forward(self, ...) on the module that is served")
    call = _Forward(where, module)
    names = list(version.inputs)
    if container := call.sole_container(names):
        return (container,)
    if call.takes_by_name(names):
        call.refuse_other_than_tensors([call.named[name] for name in names if name in call.named], by_name=True)
        return ("names", *call.unannotated_list())
    bound = call.bound_by_order(names)
    call.refuse_other_than_tensors(bound, by_name=False)
    return ("order", *call.unannotated_list())


class _Forward:
    """A forward's signature."""

    def __init__(self, where: str, module: nn.Module) -> None:
        self._where = where
        self._owner = type(module).__name__
        parameters, self._hints = _parameters(module)
        kinds = inspect.Parameter
        self.positional = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
        self.keywords = [p for p in parameters if p.kind is kinds.KEYWORD_ONLY]
        self.named = {p.name: p for p in [*self.positional, *self.keywords] if p.kind is not kinds.POSITIONAL_ONLY}
        self.any_number = any(p.kind is kinds.VAR_POSITIONAL for p in parameters)
        self.any_name = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
        self.required = [p for p in [*self.positional, *self.keywords] if p.default is _EMPTY]
        plain = [parameter.replace(annotation=_EMPTY) for parameter in parameters]
        self.shown = f"{self._owner}.forward{inspect.Signature(plain)}"

    def sole_container(self, names: list[str]) -> Style | None:
        """Return the kind of container that takes all inputs, where it is the only argument that must be given."""
        if len(self.required) != 1 or self.required[0] in self.keywords:
            return None
        kind = self._container(self.required[0])
        others = set(self.named) - {self.required[0].name}
        return None if others & set(names) else kind

    def unannotated_list(self) -> tuple[Style, ...]:
        """Return `list` where the only argument that must be given says nothing of its type: it may want a list."""
        sole = self.required[0] if len(self.required) == 1 and self.required[0] in self.positional else None
        return ("list",) if sole is not None and sole.name not in self._hints else ()

    def takes_by_name(self, names: list[str]) -> bool:
        """Return whether all inputs are arguments and all required arguments are inputs."""
        known = [name for name in names if name in self.named]
        if not known or not (len(known) == len(names) or self.any_name):
            return False
        return all(p.name in names for p in self.required) and all(p.name in self.named for p in self.required)

    def bound_by_order(self, names: list[str]) -> list[inspect.Parameter]:
        """Return the parameters that the inputs land on."""
        least = [p for p in self.positional if p in self.required]
        must = [p.name for p in self.keywords if p in self.required]
        few, many = len(names) < len(least), len(names) > len(self.positional) and not self.any_number
        if few or many or must:
            declared = f"{len(names)} input{'s' if len(names) != 1 else ''} ({', '.join(names)})"
            more = "" if not must else f", and {', '.join(must)} by name"
            takes = f"{self._count(len(least))}{more}"
            raise TraceError(
                self._where,
                f"declares {declared}, but {self.shown} takes {takes}",
                "declare one input per tensor that forward needs; with forward's own names they bind by name",
            )
        bound = self.positional[: len(names)]
        for i, (name, parameter) in enumerate(zip(names, bound, strict=False)):
            own = self.named.get(name)
            if own is not None and own is not parameter:
                raise TraceError(
                    self._where,
                    f'input "{name}" is declared in place {i}, which is "{parameter.name}" of {self.shown}: '
                    "not all names are forward's, so they bind by order",
                    f"name all inputs as forward does ({', '.join(p.name for p in bound)}), or none",
                )
        return bound

    def refuse_other_than_tensors(self, bound: list[inspect.Parameter], *, by_name: bool) -> None:
        """Refuse arguments that no tensor can be."""
        for parameter in bound:
            if self._container(parameter):
                raise TraceError(
                    self._where,
                    f'"{parameter.name}" of {self.shown} is {_hint(self._hints[parameter.name])}, '
                    "beside other arguments; Triton carries tensors only",
                    _WRAPPER,
                )
            kinds = [kind for kind in _alternatives(self._hints.get(parameter.name)) if kind is not type(None)]
            never = bool(kinds) and all(_never_a_tensor(kind) for kind in kinds)
            if never:
                reason = f"is {_hint(self._hints[parameter.name])}"
            elif not by_name and isinstance(parameter.default, _NEVER_TENSORS):
                reason = f"has the default {parameter.default!r}"
            else:
                continue
            raise TraceError(
                self._where,
                f'"{parameter.name}" of {self.shown} {reason}; Triton carries tensors only',
                f"fix it when the model is built (kwargs), or {_WRAPPER}",
            )

    def _container(self, parameter: inspect.Parameter) -> Style | None:
        for kind in _alternatives(self._hints.get(parameter.name)):
            origin = typing.get_origin(kind) or kind
            if not isinstance(origin, type) or hasattr(origin, "_fields"):
                continue
            inner = [x for x in typing.get_args(kind) if x not in (Ellipsis, str)]
            if inner and not all(x is torch.Tensor for x in inner):
                continue
            if issubclass(origin, tuple):
                return "tuple"
            if issubclass(origin, list) or origin is Sequence:
                return "list"
            if issubclass(origin, dict) or origin is Mapping:
                return "dict"
        return None

    def _count(self, least: int) -> str:
        most = len(self.positional)
        if self.any_number:
            return f"at least {least}"
        return f"{least}" if least == most else f"{least} to {most}"


def _parameters(module: nn.Module) -> tuple[list[inspect.Parameter], dict[str, Any]]:
    if isinstance(module, torch.jit.ScriptModule):
        arguments = schema_of(module).arguments[1:]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [
            inspect.Parameter(x.name, kind, default=x.default_value if x.has_default_value() else _EMPTY)
            for x in arguments
        ]
        return parameters, {x.name: _PYTHON[str(x.type)] for x in arguments if str(x.type) in _PYTHON}
    forward = module.forward
    try:
        hints = typing.get_type_hints(forward)
    except Exception:  # noqa: BLE001  a hint that is imported for type checkers only is no reason to refuse a model
        hints = getattr(forward, "__annotations__", {})
    return list(inspect.signature(forward).parameters.values()), hints


_PYTHON: dict[str, Any] = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "List[Tensor]": list[torch.Tensor],
    "Dict[str, Tensor]": dict[str, torch.Tensor],
}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the hint itself."""
    if hint is None or isinstance(hint, str):
        return ()
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _never_a_tensor(kind: Any) -> bool:
    if not isinstance(kind, type):
        return False
    return kind in _NEVER_TENSORS or kind.__module__.partition(".")[0] in {"numpy", "PIL"}


def _hint(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
