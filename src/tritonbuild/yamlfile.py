"""Decides how a YAML file is read and how a problem in it is placed: `pipeline.yaml:9: models.pnet.x: ...`.

Hides PyYAML: duplicate keys are problems, `1e-4` is a number (YAML 1.2; PyYAML alone reads YAML 1.1, where it is
text), and pydantic's errors become one line each with file, line, the value found and the value expected. Lines are
looked up in a second, slower pass that runs only when there is something to report.

Source: https://yaml.org/spec/1.2.2/ section 10.3.2 (floats); pydantic's list of error types.
"""

from __future__ import annotations

import contextlib
import difflib
import marshal
import os
import re
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tritonbuild.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pydantic_core import ErrorDetails

Location = tuple["str | int", ...]
Problem = tuple[Location, str]

if TYPE_CHECKING:
    _Base = yaml.SafeLoader
else:
    _Base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C loader is ten times as fast, where it is built


class _Loader(_Base):
    """PyYAML's safe loader, which reads numbers as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read(path: Path) -> Any:
    """Return the content of the YAML file.

    Raises:
        SpecError: The file is missing, not UTF-8, not YAML, or a mapping holds a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError([f"{path.name}: no such file in {path.parent.resolve()}"]) from None
    except IsADirectoryError:
        raise SpecError([f"{path.name}: is a folder, expected a file"]) from None
    except PermissionError:
        raise SpecError([f"{path.name}: may not be read by this user"]) from None
    except UnicodeDecodeError as error:
        raise SpecError([f"{path.name}: not UTF-8 text: byte {error.start} is {error.reason}"]) from None
    except OSError as error:
        raise SpecError([f"{path.name}: cannot be read: {error.strerror}"]) from None
    return _parse(path, text)


def _parse(path: Path, text: str) -> Any:
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            # Before anything is constructed: that puts what is merged (<<) into the nodes.
            duplicates = list(_duplicates(root))
            data = _constructed(path, loader, root)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        context = f" {error.context}" if error.context else ""
        raise SpecError([f"{path.name}:{line}: not YAML: {error.problem}{context}"]) from None
    except yaml.YAMLError as error:
        raise SpecError([f"{path.name}: not YAML: {str(error).splitlines()[0]}"]) from None
    except RecursionError:
        raise SpecError([f"{path.name}: lists and mappings are nested too deeply"]) from None
    if duplicates:
        raise SpecError([f"{path.name}:{line}: duplicate key: {what}" for line, what in duplicates])
    return data


def _nodes(root: yaml.Node | None) -> Iterator[yaml.Node]:
    """Yield each node once, in the order of the text."""
    seen: set[int] = set()
    stack = [root] if root is not None else []
    while stack:
        node = stack.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            stack += [part for pair in reversed(node.value) for part in reversed(pair)]
        elif isinstance(node, yaml.SequenceNode):
            stack += reversed(node.value)


def _duplicates(root: yaml.Node | None) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each key that a mapping holds twice."""
    for node in _nodes(root):
        seen: dict[object, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if key.value in seen:
                    yield line, f'"{key.value}" is already set on line {seen[key.value]}'
                seen.setdefault(key.value, line)


def _constructed(path: Path, loader: _Loader, root: yaml.Node | None) -> Any:
    if root is None:
        return None
    try:
        return loader.construct_document(root)
    except (yaml.YAMLError, RecursionError):
        raise
    except Exception:
        # PyYAML lets through what Python says of a date such as 2024-13-45: without a place.
        loader.recursive_objects.clear()
        for node in _nodes(root):
            if isinstance(node, yaml.ScalarNode):
                try:
                    loader.construct_object(node)
                except Exception as error:  # noqa: BLE001  ValueError, but others too for tags such as !!bool
                    where, kind = f"{path.name}:{node.start_mark.line + 1}", node.tag.rpartition(":")[2]
                    what = f"found {shown(node.value)}, no valid YAML {kind}: {_cut(str(error))}"
                    raise SpecError([f"{where}: {what}; write text in quotes"]) from None
        raise


class Memory:
    """A file that keeps the content of a YAML file that was found valid, while its text and the rules are the same.

    PyYAML takes a fifth of a second for a thousand models, the rules a twentieth.

    Args:
        memory: The file that keeps it; its folder must be there.
        path: The YAML file.
        rules: The files whose text decides what is valid, beside this one.
    """

    def __init__(self, memory: Path, path: Path, rules: Iterable[str | None]) -> None:
        self.memory = memory
        self._files = [str(path), __file__, *filter(None, rules)]
        self._key = self._digest()

    def _digest(self) -> bytes:
        hasher = sha256()
        with contextlib.suppress(OSError):  # a file that cannot be read is not remembered either
            for file in self._files:
                hasher.update(sha256(Path(file).read_bytes()).digest())
        return hasher.digest()

    def recall(self) -> Any:
        """Return the content, or None."""
        with contextlib.suppress(OSError):
            kept = self.memory.read_bytes()
            if kept[:32] == self._key and kept[32:64] == sha256(kept[64:]).digest():
                return marshal.loads(kept[64:])  # noqa: S302  written by us: the digest says so
        return None

    def keep(self, content: Any) -> None:
        """Keep the content, unless the text has changed meanwhile."""
        if self._digest() != self._key:
            return
        with contextlib.suppress(OSError, ValueError):
            kept = marshal.dumps(content)
            new = self.memory.with_name(f"{self.memory.name}.{os.getpid()}")
            new.write_bytes(self._key + sha256(kept).digest() + kept)
            new.replace(self.memory)


def place(path: Path, location: Location) -> str:
    """Return `pipeline.yaml:9: models.pnet.config` for a location, or its nearest parent that is in the file."""
    return Lines(path).place(location)


def render(path: Path, problems: Iterable[Problem]) -> list[str]:
    """Return one line a problem, in the order of the file's lines."""
    lines = Lines(path)
    placed = sorted((lines.line(location), f"{lines.place(location)}: {what}") for location, what in problems)
    return list(dict.fromkeys(text for _, text in placed))


class Lines:
    """Where things stand in a YAML file."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.root = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)

    def line(self, location: Location) -> int:
        """Return the line of a location, or of its nearest parent that is in the file."""
        node: Any = self.root
        line = 1
        for step in location:
            found = None
            if isinstance(node, yaml.MappingNode):
                for key, value in node.value:
                    if key.value == str(step):
                        line, found = key.start_mark.line + 1, value
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
                found = node.value[step]
                line = found.start_mark.line + 1
            if found is None:
                break
            node = found
        return line

    def place(self, location: Location) -> str:
        """Return `pipeline.yaml:9: models.pnet.config`."""
        where = f"{self.name}:{self.line(location)}"
        return f"{where}: {dotted(location)}" if location else where


def dotted(location: Location) -> str:
    """Return `models.pnet.inputs.image.shape[0]`; version numbers are keys: `models.pnet.versions.2`."""
    text = ""
    for depth, step in enumerate(location):
        is_version = depth == 3 and location[2] == "versions"
        text += f"[{step}]" if isinstance(step, int) and not is_version else f".{step}"
    return text.removeprefix(".")


def closest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean "x"?`, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f'; did you mean "{near[0]}"?' if near else ""


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "invalid_key": "text",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "list_type": "a list",
    "tuple_type": "a list",
    "dataclass_type": "a mapping",
}


def explain(error: ErrorDetails, known: Sequence[str]) -> str:
    """Return a pydantic error in our words.

    Args:
        error: One entry of `ValidationError.errors()`.
        known: The keys that are allowed beside the one the error is about.
    """
    kind, found = error["type"], error["input"]
    if kind == "extra_forbidden":
        key = str(error["loc"][-1])
        return "unknown key" + (closest(key, known) or f"; expected one of {', '.join(known)}")
    if kind == "missing":
        return "missing, and there is no default"
    if kind in _EXPECTED:
        return f"found {shown(found)}, expected {_EXPECTED[kind]}"
    context = error.get("ctx", {})
    if kind == "literal_error":
        return f"found {shown(found)}, expected one of {context['expected'].replace(chr(39), '')}"
    if kind in {"greater_than_equal", "greater_than", "less_than_equal", "less_than"}:
        (name, bound), *_ = context.items()
        words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
        return f"found {shown(found)}, expected {words[name]} {bound}"
    if kind in {"too_short", "too_long"}:
        return (
            f"found {context['actual_length']} entries, expected {context.get('min_length', context.get('max_length'))}"
        )
    return (
        f"found {shown(found)}, expected {error['msg'].removeprefix('Input should be ').removeprefix('Value error, ')}"
    )


def shown(value: object) -> str:
    """Return a value as a person would write it in YAML, cut to 60 characters."""
    if value is None:
        return "nothing"
    return _cut({True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value).replace("'", '"'))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
