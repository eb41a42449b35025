"""Decides whether a server has a model in the form that its config.pbtxt says.

Hides that a server completes what it is given: only what config.pbtxt writes is compared, field by field of Triton's
own message, and the tensors of the metadata, which is what clients read.

Source: model_config.proto; Triton's docs/protocol/extension_model_configuration.md; KServe's metadata of a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tritonbuild import dtypes, message

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass(frozen=True)
class Tensor:
    """An input or output of config.pbtxt.

    Attributes:
        dtype: Its element type.
        dims: Its dims, without the batch; -1 for any.
        reshaped: Whether clients see other dims than the model: a number for each item is [] in torch, [1] outside.
    """

    dtype: dtypes.Dtype
    dims: tuple[int, ...]
    reshaped: bool


class Config:
    """A config.pbtxt.

    Attributes:
        inputs: By name, in order.
        outputs: By name, in order.
        max_batch_size: 0 where requests are not batched.
        mixes: Whether the server may put rows of several requests into one batch.
    """

    def __init__(self, path: Path) -> None:
        from google.protobuf import text_format

        self._message = text_format.Parse(path.read_text(), message.model_config()())
        self.inputs = _tensors(self._message.input)
        self.outputs = _tensors(self._message.output)
        self.max_batch_size = int(self._message.max_batch_size)
        self.mixes = self.max_batch_size > 1 and self._message.HasField("dynamic_batching")

    def differences(self, served: dict[str, Any], metadata: dict[str, Any]) -> Iterator[str]:
        """Yield what the server has otherwise.

        Args:
            served: Its answer to `/v2/models/<model>/config`.
            metadata: Its answer to `/v2/models/<model>`.
        """
        from google.protobuf import json_format

        # A newer server has fields that our copy of the message does not know; nothing of ours can be in them.
        found = json_format.ParseDict(served, message.model_config()(), ignore_unknown_fields=True)
        if found.max_batch_size != self.max_batch_size:
            yield f"config: max_batch_size: found {found.max_batch_size}, expected {self.max_batch_size}"
        yield from _missing(self._message, found, "config: ")
        rows = [-1] if self.max_batch_size else []
        for kind, tensors in (("inputs", self.inputs), ("outputs", self.outputs)):
            seen = {tensor["name"]: f"{tensor['datatype']} {_dims(tensor['shape'])}" for tensor in metadata[kind]}
            wanted = {name: f"{tensor.dtype.kserve} {[*rows, *tensor.dims]}" for name, tensor in tensors.items()}
            for name in sorted(seen.keys() | wanted.keys()):
                if seen.get(name) != wanted.get(name):
                    one, other = seen.get(name, "none"), wanted.get(name, "none")
                    yield f"metadata: {kind}: {name}: found {one}, expected {other}"


def _tensors(declared: Any) -> dict[str, Tensor]:
    tensors = {}
    for tensor in declared:
        numbers = tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
        dtype = dtypes.BY_TRITON[numbers[tensor.data_type].name]
        tensors[tensor.name] = Tensor(dtype, tuple(tensor.dims), tensor.HasField("reshape"))
    return tensors


def _dims(shape: list[Any]) -> list[int]:
    return [int(dim) for dim in shape]


def _missing(declared: Any, found: Any, at: str) -> Iterator[str]:
    """Yield each field that is set in one message and has another value in the other."""
    for descriptor, value in declared.ListFields():
        if descriptor.name == "max_batch_size":
            continue
        other, path = getattr(found, descriptor.name), f"{at}{descriptor.name}"
        if hasattr(value, "items"):
            for key in value:
                if key not in other:
                    yield f"{path}[{key}]: missing"
                else:
                    yield from _missing(value[key], other[key], f"{path}[{key}].")
        elif hasattr(value, "add"):
            if len(value) != len(other):
                yield f"{path}: found {len(other)} entries, expected {len(value)}"
            else:
                for i, (ours, theirs) in enumerate(zip(value, other, strict=True)):
                    yield from _missing(ours, theirs, f"{path}[{i}].")
        elif hasattr(value, "append"):
            if list(value) != list(other):
                yield f"{path}: found {list(other)}, expected {list(value)}"
        elif hasattr(value, "ListFields"):
            if found.HasField(descriptor.name):
                yield from _missing(value, other, f"{path}.")
            else:
                yield f"{path}: missing"
        elif value != other:
            if names := descriptor.enum_type and descriptor.enum_type.values_by_number:
                value, other = names[value].name, names[other].name  # noqa: PLW2901
            yield f"{path}: found {other!r}, expected {value!r}"
