"""Decides how a weights file becomes a model's state: its digest, its kind, its fit.

Hides the two kinds of file. A .pt or .pth file is read with `weights_only=True`, so it can run no code. A state dict
must fit exactly: what is missing, unexpected or of another shape is named.

Source: docs/pipeline.md, "weights"; torch.load and safetensors.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import zipfile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from tritonbuild.errors import TraceError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

    from tritonbuild.spec import ModelVersion

_SHOWN = 3
_CODE = re.compile(r"GLOBAL (\S+)")  # how torch names what weights_only refuses


def read(version: ModelVersion, root: Path) -> dict[str, Tensor]:
    """Return the state dict in the version's weights file, on the CPU.

    Raises:
        TraceError: There is no such file, its digest is another, or it holds no state dict.
    """
    assert version.weights
    where, name = f"trace {version.label}", version.weights.path
    path = root / name
    if not path.is_file():
        raise TraceError(where, f"weights {name}: no such file", "paths are relative to the folder of pipeline.yaml")
    if not os.access(path, os.R_OK):
        raise TraceError(where, f"weights {name}: may not be read by this user")
    expected = version.weights.sha256
    found = _digest(path) if expected else None
    if found != expected:
        raise TraceError(
            where,
            f"weights {name}: found sha256 {found}, expected {expected}",
            "the file is not the declared one; fetch it again, or declare the digest found if the change is wanted",
        )
    state = _safetensors(path, name, where) if path.suffix.lower() == ".safetensors" else _pickled(path, name, where)
    others = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if others or not state:
        what = f'"{others[0]}" is {type(state[others[0]]).__name__}, expected a tensor' if others else "it is empty"
        raise TraceError(where, f"weights {name}: no state dict: {what}", _ONLY_STATE)
    return state


_ONLY_STATE = "save it with torch.save(model.state_dict(), path), or as safetensors"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _safetensors(path: Path, name: str, where: str) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise TraceError(where, f"weights {name}: no safetensors file: {error}", _ONLY_STATE) from error


def _pickled(path: Path, name: str, where: str) -> dict[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        name_of_code = _CODE.search(str(error))
        what = "it is no file that torch.save wrote"
        if name_of_code:
            what = f"it holds more than tensors, which would run code when it is read ({name_of_code[1]})"

        raise TraceError(where, f"weights {name}: {what}", _ONLY_STATE) from error
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        what = f"cannot be read: {type(error).__name__}: {text}"
        raise TraceError(where, f"weights {name}: {what}", _ONLY_STATE) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise TraceError(where, f"weights {name}: found {type(loaded).__name__}, expected a state dict", _ONLY_STATE)
    return loaded


def load(module: nn.Module, state: Mapping[str, Tensor], version: ModelVersion) -> None:
    """Load the state dict into the module, strictly.

    Raises:
        TraceError: They do not fit; the first few differences of each kind are named.
    """
    assert version.weights
    where, name = f"trace {version.label}", version.weights.path
    problem: Exception | None = None
    try:
        # It decides: a module may know the names of its older versions, as torchvision's ViT and detectors do.
        found = module.load_state_dict(state)
        if found is not None and not any(found):
            return
    except Exception as error:  # noqa: BLE001  a module's own code may raise anything
        problem = error
    # A method of the model's own may be less strict.
    differences = _differences(module, state)
    if differences or problem:
        what, *advice = differences or [" ".join(str(problem).split())[:400]]
        raise TraceError(where, f"weights {name} do not fit {type(module).__name__}: {what}", *advice) from problem


def _differences(module: nn.Module, state: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Return what is missing, unexpected or of another shape, and what to do; None where nothing is."""
    own = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} is {list(state[key].shape)}, the model's is {list(own[key].shape)}"
        for key in own
        if key in state and not is_lazy(own[key]) and state[key].shape != own[key].shape
    ]
    problems = [*_some("missing", missing), *_some("unexpected", unexpected), *_some("of another shape", shapes)]
    if not problems:
        return None
    advice = f"the file holds {len(state)} tensors, the model has {len(own)}: same architecture, same kwargs?"
    if unexpected and all(key.startswith("module.") for key in state):
        advice = 'every name starts with "module.": save the state dict of the model inside DataParallel'
    return "; ".join(problems), advice


def _some(kind: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{more}"]
