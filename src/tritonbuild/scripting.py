"""Decides how a scripted model gets the interface of the eager one: by a forward of generated TorchScript.

Hides what TorchScript needs beyond Python: results are reached by their static types, optional entries are unwrapped,
and the lengths of lists and dicts are held to what eager returned, so that nothing is lost without a word.

Source: torch/jit/_script.py (`ScriptModule.define`); torchvision's detection models, googlenet and inception, which
return more when they are scripted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import nn

from tritonbuild.errors import TraceError

if TYPE_CHECKING:
    from tritonbuild.wrap import Flat, Interface, Leaf, Step

# What torchvision's detection models return scripted; eager, in eval mode, they return the detections alone.
_LOSSES_AND_DETECTIONS = "Tuple[Dict[str, Tensor], List[Dict[str, Tensor]]]"


class Scripted(torch.jit.ScriptModule):
    """The scripted module behind the interface; its forward is defined from generated TorchScript."""

    def __init__(self, module: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.module = module


def scripted(eager: Flat) -> torch.jit.ScriptModule:
    """Return the module scripted as a whole, with the interface of the eager one.

    Args:
        eager: A fresh module whose interface is measured.

    Raises:
        TraceError: What the scripted forward takes or returns cannot be adapted.
        Exception: Whatever `torch.jit.script` raises for code that is not TorchScript.
    """
    module = torch.jit.script(eager.module)
    made = Scripted(module)
    made.define(_Source(eager.interface, schema_of(module)).text())
    made.eval()
    return made


def _eager_part(kind: Any, leaf: Leaf) -> int | None:
    """Return which element of a scripted result is the eager one, where torchvision returns more when scripted."""
    if kind.kind() != "TupleType":
        return None
    if str(kind) == _LOSSES_AND_DETECTIONS and leaf.steps and leaf.steps[0].siblings == 1:
        return 1
    kinds = [element.kind() for element in kind.elements()]
    # GoogLeNet and Inception: the logits, and auxiliary ones that are None in eval mode.
    if not leaf.steps and kinds.count("TensorType") == 1 and kinds.count("OptionalType") == len(kinds) - 1:
        return kinds.index("TensorType")
    return None


def schema_of(module: nn.Module) -> Any:
    """Return the schema of a ScriptModule's forward: `arguments` (the first is self) and `returns`."""
    return cast("Any", module).forward.schema


class _Source:
    """The TorchScript source of a forward that calls a scripted module and flattens its result."""

    def __init__(self, interface: Interface, schema: Any) -> None:
        self._interface = interface
        self._returns = schema.returns[0].type
        self._lines: list[str] = []
        taken = interface.arguments
        self._prefix = next(name for name in ("r", "r_", "r__") if not any(x.startswith(name) for x in taken))

    def text(self) -> str:
        """Return the source."""
        interface = self._interface
        assert interface.outputs
        root, kind = self._prefix, self._returns
        self._lines = [f"{root} = self.module({self._call()})"]
        if (index := _eager_part(kind, interface.outputs[0].leaf)) is not None:
            root, kind = f"{root}[{index}]", kind.elements()[index]
        values = [self._value(i, root, kind) for i in range(len(interface.outputs))]
        head = f"def forward(self, {', '.join(f'{name}: Tensor' for name in interface.arguments)}):"
        return "\n    ".join([head, *self._lines, f"return ({', '.join(values)},)"]) + "\n"

    def _call(self) -> str:
        interface = self._interface
        values = list(interface.arguments)
        if interface.cast is not None:
            floats = [declared.startswith("float") for declared in interface.dtypes]
            values = [f"{x}.to({interface.cast})" if cast else x for x, cast in zip(values, floats, strict=True)]
        pairs = list(zip(interface.inputs, values, strict=True))
        if interface.style == "names":
            return ", ".join(f"{name}={value}" for name, value in pairs)
        if interface.style == "dict":
            return "{" + ", ".join(f"{name!r}: {value}" for name, value in pairs) + "}"
        joined = ", ".join(values)
        return {"list": f"[{joined}]", "tuple": f"({joined},)"}.get(interface.style, joined)

    def _value(self, i: int, place: str, kind: Any) -> str:
        """Return the expression of an output, after the statements that it needs."""
        assert self._interface.outputs
        output = self._interface.outputs[i]
        for turn, step in enumerate((*output.leaf.steps, None)):
            if kind.kind() == "OptionalType":
                variable = f"{self._prefix}_{i}_{turn}"
                self._lines += [f"{variable} = {place}", f"assert {variable} is not None"]
                place, kind = variable, kind.getElementType()
            if step is None:
                break
            place, kind = self._step(place, kind, step)
        if kind.kind() != "TensorType":
            self._refuse(output.leaf)
        if output.dtype is torch.bfloat16:
            place += ".to(torch.float32)"
        return place if output.axes or self._interface.batched else f"{place}.reshape(1)"

    def _step(self, place: str, kind: Any, step: Step) -> tuple[str, Any]:
        is_a = kind.kind()
        if is_a == "TupleType" and step.position is not None and len(kind.elements()) == step.siblings:
            return f"{place}[{step.position}]", kind.elements()[step.position]
        if (is_a == "ListType" and step.how == "index") or (is_a == "DictType" and step.how == "key"):
            # Eager had this many; more would be lost without a word.
            count = f"assert len({place}) == {step.siblings}"
            if count not in self._lines and not (is_a == "DictType" and self._interface.left_out):
                self._lines.append(count)
            element = kind.getElementType() if is_a == "ListType" else kind.getValueType()
            return f"{place}[{step.at!r}]", element
        return self._refuse(None)

    def _refuse(self, leaf: Leaf | None) -> NoReturn:
        found = f"the scripted model returns {self._returns}"
        raise TraceError(
            self._interface.where,
            f"{found}, which has no tensor {leaf.path}" if leaf else f"{found}, not the structure of the eager result",
            "return the same from forward whether it is scripted or not; tuples and dicts of tensors can be scripted",
        )
