"""Writes the JSON Schema of pipeline.yaml, for editors: `python -m tritonbuild.schema > docs/pipeline.schema.json`.

Source: the models of `spec`, and the text below each of their fields.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonbuild import spec

if TYPE_CHECKING:
    from collections.abc import Iterator


def text() -> str:
    """Return the JSON Schema of pipeline.yaml, for editors; docs/pipeline.schema.json is this text."""
    document: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **spec.Pipeline.model_json_schema(),
        "title": "pipeline.yaml of tritonbuild",
    }
    for owner, field, found in _field_texts():
        properties = (document if owner == "Pipeline" else document["$defs"].get(owner, {})).get("properties", {})
        if field in properties:
            properties[field] = dict(sorted({**properties[field], "description": found}.items()))
    return json.dumps(document, indent=2) + "\n"


def _field_texts() -> Iterator[tuple[str, str, str]]:
    """Yield class, field and the text below it. pydantic can do that too, at every import of `spec`."""
    for owner in ast.parse(Path(spec.__file__).read_text(encoding="utf-8")).body:
        if isinstance(owner, ast.ClassDef):
            for field, below in itertools.pairwise(owner.body):
                if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                    continue
                if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                    yield owner.name, field.target.id, inspect.cleandoc(str(below.value.value))


if __name__ == "__main__":
    sys.stdout.write(text())
