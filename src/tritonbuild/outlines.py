"""Decides which functions of a source file differ between two texts of it, and when only comments do.

Hides that the old text is not kept: of each text that a task has read, `.build/outlines/` holds a digest a function,
made from its syntax tree without docstrings. Only words for people come from it, never whether a task runs.

Source: https://docs.python.org/3/library/ast.html.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

_TOP = "the statements outside of functions"


def keep(root: Path, files: Mapping[str, str | None]) -> None:
    """Keep the outlines of Python files.

    Args:
        root: The project's folder.
        files: Path relative to root -> sha256 of the text that was read.
    """
    folder = root / ".build" / "outlines"
    for path, digest in files.items():
        if not path.endswith(".py") or digest is None or (folder / f"{digest}.json").exists():
            continue
        with contextlib.suppress(OSError):
            text = (root / path).read_bytes()
            if sha256(text).hexdigest() != digest:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            new = folder / f".{digest}.{os.getpid()}"
            new.write_text(json.dumps(outline(text)))
            new.replace(folder / f"{digest}.json")


def outline(text: bytes) -> dict[str, str]:
    """Return `PNet.forward` -> digest of its syntax for each function and class; nothing for what cannot be read."""
    try:
        tree = ast.parse(text)
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and _is_text(body[0].value):
                del body[0]
        return dict(_digests(tree, ""))
    except (SyntaxError, ValueError, RecursionError):  # hundreds of elif lie in each other
        return {}


def _is_text(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _digests(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str]]:
    rest = []
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _digests(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{child.name}", _digest([child])
        else:
            rest.append(child)
    if isinstance(node, ast.ClassDef):
        head = [*node.bases, *node.keywords, *node.decorator_list]
        yield prefix.removesuffix("."), _digest([*head, *rest])
    else:
        yield _TOP, _digest(rest)


def _digest(nodes: Sequence[ast.AST]) -> str:
    return sha256("\n".join(map(ast.dump, nodes)).encode()).hexdigest()[:12]


def changed(root: Path, path: str, before: str | None, after: str | None) -> str | None:
    """Return in words what differs between two texts of a file, or None when that cannot be told.

    Args:
        root: The project's folder.
        path: The file, which has the later text, relative to root.
        before: sha256 of the earlier text.
        after: sha256 of the later text.
    """
    if not path.endswith(".py") or before is None or after is None:
        return None
    try:
        old = json.loads((root / ".build" / "outlines" / f"{before}.json").read_text())
        new = outline((root / path).read_bytes())
    except (OSError, ValueError):
        return None
    if not old or not new:
        return None
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(names) if names else "comments, docstrings or formatting only"
