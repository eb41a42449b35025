"""TorchScript as a server gets it, made here with torch alone: the build's own way is tested elsewhere."""

from __future__ import annotations

import copy
import io
import warnings
from typing import TYPE_CHECKING, Any, Protocol

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn


class Saved(Protocol):
    def __call__(
        self, module: nn.Module, example: tuple[Tensor, ...], script: Sequence[str] = ()
    ) -> torch.jit.ScriptModule: ...


@pytest.fixture(scope="session")
def saved() -> Saved:
    """Trace a copy of the module with the named submodules scripted, save it, load it."""

    def make(module: nn.Module, example: tuple[Tensor, ...], script: Sequence[str] = ()) -> torch.jit.ScriptModule:
        fresh = copy.deepcopy(module)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated")
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            for name in script:
                setattr(fresh, name, torch.jit.script(fresh.get_submodule(name)))
            traced = torch.jit.trace(fresh, example, check_trace=False, strict=False)
            file = io.BytesIO()
            torch.jit.save(traced, file)
            file.seek(0)
            return torch.jit.load(file)

    return make


@pytest.fixture(scope="session")
def built() -> Callable[..., Any]:
    """Build a module as the build does: the seed set before, ready to serve after."""

    def make(entry_point: Callable[..., nn.Module], seed: int = 0, **kwargs: object) -> nn.Module:
        torch.manual_seed(seed)
        return entry_point(**kwargs).eval().requires_grad_(False)

    return make
