"""Decides what the action keys of traces, configs and the repository are made of, before they run.

What a trace reads is added when it has run (`keys.UpToDate.complete`). Where a server is needed, see `serving`.

Source: docs/architecture.md; a test holds the lists of modules complete.
"""

from __future__ import annotations

import os
from hashlib import sha256
from typing import TYPE_CHECKING

from tritonbuild import keys

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tritonbuild.spec import ModelVersion, Pipeline

# All that the stage imports of ours, but for what only words depend on; a test holds these lists complete.
TRACE_RECIPE = (
    "archive.py",
    "batching.py",
    "calling.py",
    "calls.py",
    "candidates.py",
    "cases.py",
    "chance.py",
    "climb.py",
    "compare.py",
    "diagnose.py",
    "draws.py",
    "dtypes.py",
    "entry.py",
    "graphs.py",
    "hazards.py",
    "history.py",
    "memory.py",
    "monitors.py",
    "proof.py",
    "questions.py",
    "reference.py",
    "releases.py",
    "scripting.py",
    "trace.py",
    "trial.py",
    "weights.py",
    "wrap.py",
    "releases.json",
)
CONFIG_RECIPE = ("config.py", "config_rules.py", "config_tensors.py", "message.py", "dtypes.py")


def check(pipeline: Pipeline) -> keys.Parts:
    """Return a digest of what is declared; comments do not count."""
    return {"declaration": sha256(pipeline.model_dump_json().encode()).hexdigest()}


def same_while(pipeline: Pipeline) -> str:
    """Return a digest of all that the parts of traces and configs are made from."""
    recipe = keys.recipe(*TRACE_RECIPE, *CONFIG_RECIPE)
    return keys.digest({**check(pipeline), "recipe": recipe, "device": keys.device_kind()})[:16]


def trace(version: ModelVersion) -> keys.Parts:
    """Return the parts of a trace's action key that are known before it runs.

    The name is not among them: a renamed model is not traced again.
    """
    device = version.device if version.device != "auto" else keys.device_kind()
    declaration = version.model_dump(mode="json", exclude={"model", "version"})
    declaration["device"] = device
    return {"declaration": declaration, "recipe": keys.recipe(*TRACE_RECIPE)}


def config(pipeline: Pipeline, name: str) -> keys.Parts:
    """Return the parts of a config's action key beside the signatures."""
    model = pipeline.models[name]
    declaration = model.model_dump(mode="json", include={"max_batch_size", "axes", "inputs", "outputs", "config"})
    return {
        # With device: cpu the instances are pinned to the CPU.
        "declaration": {**declaration, "versions": sorted(model.versions), "device": pipeline.device},
        "recipe": keys.recipe(*CONFIG_RECIPE),
    }


def repository(pipeline: Pipeline) -> keys.Parts:
    """Return what is declared and what is there."""
    declared = {name: sorted(model.versions) for name, model in pipeline.models.items()}
    return {"declared": declared, "folders": sorted(_names(str(pipeline.root / "models")))}


def _names(models: str) -> Iterator[str]:
    """Yield the path, from models/, of every file and folder there: Triton loads a backend that lies beside a model."""
    below = [(models, "")] if os.path.isdir(models) else []
    while below:
        folder, above = below.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                name = above + entry.name
                yield name
                if entry.is_dir(follow_symlinks=False):
                    below.append((entry.path, f"{name}/"))
