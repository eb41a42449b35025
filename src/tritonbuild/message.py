"""Decides how a mapping from YAML becomes Triton's ModelConfig message, and how the message becomes text.

Hides protobuf: its own JSON parser stops at the first problem and speaks of Python types; here every problem is found,
each with its path. What is accepted is what the message's descriptor says, so a field that a newer tritonclient
knows is known here. One short form is added: a parameter may be plain text instead of `{string_value: ...}`.
protobuf is imported when it is needed, and without tritonclient.grpc, which would import grpc and numpy.

Source: model_config.proto of triton-inference-server/common, as shipped in tritonclient; protobuf's text format.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonbuild.yamlfile import closest, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tritonbuild.yamlfile import Location, Problem

_INTEGERS = {
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "uint32": (0, 2**32 - 1),
    "uint64": (0, 2**64 - 1),
}
_FEW = 12
_LARGEST_FLOAT = (2 - 2**-23) * 2.0**127


@cache
def model_config() -> Any:
    """Return the class of Triton's ModelConfig message."""
    name = "tritonclient.grpc.model_config_pb2"
    if name in sys.modules:
        return sys.modules[name].ModelConfig
    package = importlib.util.find_spec("tritonclient")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("tritonclient is not installed", name="tritonclient")
    path = Path(package.submodule_search_locations[0], "grpc", "model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("tritonbuild._model_config_pb2", path)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError("tritonclient was installed without grpc", name=name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ModelConfig


def fields() -> list[str]:
    """Return the names of ModelConfig's fields, in the order of the proto."""
    return [field.name for field in model_config().DESCRIPTOR.fields]


def read(mapping: Mapping[Any, Any], problems: list[Problem]) -> dict[str, Any]:
    """Return the mapping with short forms written out, and without what is not well-formed.

    Args:
        mapping: ModelConfig fields under their own names.
        problems: Takes the location, relative to the mapping, and the text of every unknown field, wrong type,
            number out of range, unknown enum name, and pair of fields of which Triton takes only one.
    """
    known = _message(mapping, model_config().DESCRIPTOR, (), problems)
    return known if isinstance(known, dict) else {}


def build(mapping: Mapping[str, Any]) -> Any:
    """Return the ModelConfig message of a mapping that `read` has no problem with."""
    from google.protobuf import json_format

    return json_format.ParseDict(mapping, model_config()())


def text(message: Any) -> str:
    """Return the message in protobuf's text format.

    Returns:
        Fields in the order of the proto, maps sorted by key, two spaces of indent, a newline at the end.
        `max_batch_size` is always there: text format leaves out a 0, and readers then guess. Equal messages
        give equal text, and the text parses back to an equal message.
    """
    names = fields()
    cut = names.index("max_batch_size")
    front, rest = _only(message, names[:cut]), _only(message, names[cut + 1 :])
    return f"{_plain_text(front)}max_batch_size: {message.max_batch_size}\n{_plain_text(rest)}"


def parse(content: str) -> Any:
    """Return the ModelConfig message of a config.pbtxt that `text` wrote."""
    from google.protobuf import text_format

    return text_format.Parse(content, model_config()())


def _only(message: Any, names: list[str]) -> Any:
    part = type(message)()
    part.CopyFrom(message)
    for field in message.DESCRIPTOR.fields:
        if field.name not in names:
            part.ClearField(field.name)
    return part


def _plain_text(message: Any) -> str:
    from google.protobuf import text_format

    return str(
        text_format.MessageToString(message, as_utf8=True, use_index_order=True, use_short_repeated_primitives=True)
    )


# Each of these returns the well-formed value, or _BAD after noting the problem.
_BAD: Any = object()


def _message(value: Any, descriptor: Any, at: Location, problems: list[Problem]) -> Any:
    if descriptor.full_name == "inference.ModelParameter" and not isinstance(value, dict):
        short = _one(value, descriptor.fields_by_name["string_value"], at, problems)
        return _BAD if short is _BAD else {"string_value": short}
    if not isinstance(value, dict):
        empty = "; write {} for all defaults" if value is None else ""
        problems.append((at, f"found {shown(value)}, expected a mapping{empty}"))
        return _BAD
    known = descriptor.fields_by_name
    taken: dict[str, str] = {}
    result = {}
    for name, content in value.items():
        here = (*at, str(name))
        field = known.get(name)
        if field is None:
            all_known = f"; expected one of {', '.join(known)}" if known else "; expected none"
            near = closest(str(name), known) or (all_known if len(known) <= _FEW else "")
            owner = descriptor.full_name.removeprefix("inference.")
            problems.append((here, f"Triton's {owner} has no such field{near}"))
            continue
        choice = field.containing_oneof
        if choice is not None and taken.setdefault(choice.name, name) != name:
            problems.append((here, f'"{taken[choice.name]}" is given, too; Triton takes only one of the two'))
            continue
        read = _field(content, field, here, problems)
        if read is not _BAD:
            result[name] = read
    return result


def _field(value: Any, field: Any, at: Location, problems: list[Problem]) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return _map(value, field.message_type, at, problems)
    if not _is_repeated(field):
        return _one(value, field, at, problems)
    if not isinstance(value, list):
        example = "" if isinstance(value, dict) or value is None else f": [{shown(value)}]"
        problems.append((at, f"found {shown(value)}, expected a list{example}"))
        return _BAD
    entries = [_one(entry, field, (*at, i), problems) for i, entry in enumerate(value)]
    return _BAD if any(entry is _BAD for entry in entries) else entries


def _is_repeated(field: Any) -> bool:
    # protobuf 6.31 brought is_repeated, later ones warn about label.
    return bool(field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED)


def _map(value: Any, entry: Any, at: Location, problems: list[Problem]) -> Any:
    if not isinstance(value, dict):
        problems.append((at, f"found {shown(value)}, expected a mapping"))
        return _BAD
    key_field, value_field = entry.fields_by_name["key"], entry.fields_by_name["value"]
    result = {}
    for key, content in value.items():
        here = (*at, str(key))
        # A mapping that went through JSON has text keys only.
        number = int(key) if isinstance(key, str) and key.isdecimal() else key
        plain = number if _kind(key_field) in _INTEGERS else key
        if _one(plain, key_field, here, problems) is _BAD:
            continue
        read = _one(content, value_field, here, problems)
        if read is not _BAD:
            result[str(plain)] = read
    return _BAD if len(result) < len(value) else result


def _kind(field: Any) -> str:
    """Return the field's type as model_config.proto writes it: int32, string, bool, ...; enum or message."""
    return _kinds()[field.type]


@cache
def _kinds() -> dict[int, str]:
    from google.protobuf.descriptor import FieldDescriptor

    prefix = "TYPE_"
    return {
        getattr(FieldDescriptor, name): name.removeprefix(prefix).lower()
        for name in dir(FieldDescriptor)
        if name.startswith(prefix)
    }


def _one(value: Any, field: Any, at: Location, problems: list[Problem]) -> Any:
    kind = _kind(field)
    if kind == "message":
        return _message(value, field.message_type, at, problems)
    problem = _scalar_problem(value, kind, field)
    if problem is None:
        return value
    problems.append((at, f"found {shown(value)}, expected {problem}"))
    return _BAD


def _scalar_problem(value: Any, kind: str, field: Any) -> str | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "enum":
        names = [entry.name for entry in field.enum_type.values if entry.name != "TYPE_INVALID"]
        near = closest(str(value), names) if value not in names else ""
        return None if value in names else f"one of {', '.join(names)}{near}"
    if kind == "bool":
        return None if isinstance(value, bool) else "true or false"
    if kind == "string":
        if not isinstance(value, str):
            return f"text{quoted(value)}"
        return None if _encodes(value) else "text that UTF-8 can hold"
    if kind in _INTEGERS:
        if not is_number or not isinstance(value, int):
            return "a whole number"
        low, high = _INTEGERS[kind]
        return None if low <= value <= high else f"a number from {low} to {high}"
    if not is_number or not math.isfinite(value):
        return "a number"
    return None if kind == "double" or abs(value) <= _LARGEST_FLOAT else "a number that 32 bits can hold"


def quoted(value: Any) -> str:
    """Return the advice to write a value in quotes, for what YAML read as a number or a bool."""
    if isinstance(value, bool):
        return f': write it in quotes, "{str(value).lower()}"'
    return f': write it in quotes, "{value}"' if isinstance(value, int | float) else ""


def _encodes(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
