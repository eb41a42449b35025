"""Model versions to test the torch side with: declared in a pipeline.yaml, built from a module of the test's own."""

from __future__ import annotations

import json
import textwrap
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from tritonbuild import proof, spec
from tritonbuild.candidates import quiet
from tritonbuild.entry import Builder

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tritonbuild.spec import ModelVersion

HEAD = "import torch\nfrom torch import Tensor, nn\nfrom typing import *\n"


@dataclass(frozen=True)
class Declared:
    """One declared model version in a project folder of its own."""

    root: Path
    version: ModelVersion
    module: str

    def builder(self) -> Builder:
        """Return what builds the eager model; its interface is not measured yet."""
        return Builder(self.version, self.root, torch.device("cpu"))

    def measured(self) -> Builder:
        """Return what builds the eager model, with its interface measured on the example."""
        build = self.builder()
        with torch.no_grad():
            build()(*self.example())
        return build

    def example(self) -> tuple[Tensor, ...]:
        """Return the inputs at the example sizes."""
        return proof.example(self.version, "cpu", self.root)


@dataclass(frozen=True)
class Project:
    """Makes model versions in a folder."""

    root: Path
    _count: list[int] = field(default_factory=list)

    def declare(self, source: str = "", entry_point: str = "Net", **model: Any) -> Declared:
        """Write the source as a module with a name of its own, and declare a model named m on it.

        Args:
            source: Python; torch, nn, Tensor and typing's names are imported. Empty: `entry_point` is complete.
            entry_point: The attribute.
            model: Other keys of the model; `inputs` may be shapes alone, then float32.
        """
        module = f"net_{uuid.uuid4().hex[:8]}"
        if source:
            (self.root / f"{module}.py").write_text(HEAD + textwrap.dedent(source))
            entry_point = f"{module}:{entry_point}"
        model.setdefault("inputs", {"x": ["batch", 4]})
        model["inputs"] = {
            name: declared if isinstance(declared, dict) else {"dtype": "float32", "shape": declared}
            for name, declared in model["inputs"].items()
        }
        if any("batch" in declared["shape"] for declared in model["inputs"].values()):
            model.setdefault("max_batch_size", 4)
        pipeline = {"triton": "26.08", "device": model.pop("device", "cpu")}
        path = self.root / "pipeline.yaml"
        path.write_text(json.dumps({**pipeline, "models": {"m": {"entry_point": entry_point, **model}}}))
        return Declared(self.root, spec.load(path).versions["m"][1], module)


def loaded(path: Path) -> torch.jit.ScriptModule:
    """Return the TorchScript in a file."""
    with quiet():
        return torch.jit.load(path, map_location="cpu")
