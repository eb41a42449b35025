"""Decides what a call left behind: attributes, buffers, globals, and the state of the random generators.

Hides how each is found and compared. A change alone is harmless (a cache for one size, a count that nobody reads);
`reference` finds out whether it reaches an output.

Source: torch.nn.Module's own storage; the generators of torch, numpy and Python.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from types import FunctionType
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn

from tritonbuild.monitors import first_party

if TYPE_CHECKING:
    from collections.abc import Iterable

_ITEMS = 64
"""Items of one container that are looked at."""


def random_state() -> tuple[object, ...]:
    """Return the state of every global random generator: torch's on every device, numpy's, Python's."""
    states: list[object] = [torch.get_rng_state().numpy().tobytes()]
    if _cuda():
        states += [state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()]
    kept: Any = numpy.random.get_state()
    return (*states, str(kept[2]), kept[1].tobytes(), random.getstate())


def _cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def seed_all(seed: int) -> None:
    """Seed every global random generator."""
    # torch.manual_seed formats the stack for each kind of device that has not been touched: a millisecond a call.
    torch.default_generator.manual_seed(seed)
    if _cuda():
        torch.cuda.manual_seed_all(seed)
    numpy.random.seed(seed % 2**32)
    random.seed(seed)


def state(module: nn.Module) -> dict[str, object]:
    """Return a digest of all that a call of the module could leave behind.

    Returns:
        Name -> a value that differs after a change: `counter`, `encoder.mask`, `zoo.text._CACHE`.
    """
    found: dict[str, object] = {}
    owners: dict[str, object] = {}
    for name, part in module.named_modules():
        label = f"{name}." if name else ""
        for key, value in vars(part).items():
            if key in ("_parameters", "_buffers"):
                found.update({f"{label}{inner}": _digest(tensor) for inner, tensor in value.items()})
            elif not key.startswith(("_modules", "_forward", "_backward", "_state_dict", "_load_state")):
                found[f"{label}{key}"] = _digest(value)
        for owner in type(part).__mro__:
            home = sys.modules.get(owner.__module__)
            if first_party(getattr(home, "__file__", None) or "<none>"):
                owners[owner.__qualname__] = owner
                owners[owner.__module__] = home
    for name, holder in owners.items():
        found.update(
            {
                f"{name}.{key}": _digest(value, of_global=True)
                for key, value in list(vars(holder).items())
                if not key.startswith("__")
            }
        )
    return found


def changed(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Return the names whose digest differs, sorted."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def _digest(value: object, depth: int = 3, *, of_global: bool = False) -> object:
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return repr(value)  # nan equals itself so
    if isinstance(value, Tensor):
        return ("tensor", id(value), 0 if value.is_inference() else value._version, tuple(value.shape))
    if isinstance(value, numpy.ndarray):
        return ("array", id(value), value.shape, value.tobytes() if value.nbytes < 65536 else None)
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, numpy.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, numpy.random.RandomState):
        return str(value.get_state(legacy=False)["state"])
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return (type(value).__name__, len(value), _first(value, depth))
    if isinstance(value, dict):
        return ("dict", len(value), _first(value, depth), _first(value.values(), depth))
    cache = getattr(value, "cache_info", None)
    if callable(cache):
        return ("cache", cache().currsize)
    if isinstance(value, FunctionType):  # a mutable default argument, a counter in a closure
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        return (_first(value.__defaults__ or (), depth), _first(cells, depth))
    if depth and not isinstance(value, (type, nn.Module)) and first_party(_file(type(value))):
        own = getattr(value, "__dict__", {})
        return (id(value), _first(own, depth), _first(own.values(), depth))
    if depth and isinstance(value, type) and first_party(_file(value)):
        return _first((item for name, item in vars(value).items() if not name.startswith("__")), 1)
    return None if of_global else id(value)


def _first(values: Iterable[object], depth: int) -> tuple[object, ...]:
    if not depth:
        return ()
    return tuple(_digest(value, depth - 1) for _, value in zip(range(_ITEMS), values, strict=False))


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _file(owner: type) -> str:
    return getattr(sys.modules.get(owner.__module__), "__file__", None) or "<none>"
