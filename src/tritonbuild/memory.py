"""Decides what a call left behind: attributes, buffers, globals, and the state of the random generators.

Hides how each is found and compared. A change alone is harmless (a cache for one size, a count that nobody reads);
`reference` finds out whether it reaches an output.

Source: torch.nn.Module's own storage; the generators of torch, numpy and Python.
"""

from __future__ import annotations

import copy
import itertools
import operator
import random
import sys
from collections import deque
from collections.abc import Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn

from tritonbuild.monitors import first_party

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_ITEMS = 64
"""Items of one container that are looked at."""

_SEEDED: dict[int, Tensor] = {}
_END = 624

_KEPT_ITEMS = 4096
"""Items up to which a shared container is put back; a longer one is a table, no cache."""


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


def drawn(seed: int) -> bool:
    """Return whether a global random generator has moved since `seed_all(seed)`; quicker than two `random_state`."""
    if seed not in _SEEDED:
        _SEEDED[seed] = torch.Generator().manual_seed(seed).get_state()
    if not torch.equal(torch.default_generator.get_state(), _SEEDED[seed]):
        return True
    if _cuda() and any(generator.get_offset() for generator in torch.cuda.default_generators):
        return True
    # Both are twisters, whose position is at the end after seeding.
    kept: Any = numpy.random.get_state()
    return bool(kept[2] != _END or kept[3]) or random.getstate()[1][-1] != _END


def state(module: nn.Module) -> dict[str, object]:
    """Return a digest of all that a call of the module could leave behind.

    Returns:
        Name -> a value that differs after a change: `counter`, `encoder.mask`, `zoo.text._CACHE`.
    """
    found: dict[str, object] = {}
    for name, part in module.named_modules():
        label = f"{name}." if name else ""
        for key, value in vars(part).items():
            if key in ("_parameters", "_buffers"):
                found.update({f"{label}{inner}": _digest(tensor) for inner, tensor in value.items()})
            elif not key.startswith(("_modules", "_forward", "_backward", "_state_dict", "_load_state")):
                found[f"{label}{key}"] = _digest(value)
    for name, (holder, key) in shared(module).items():
        found[name] = _digest(vars(holder)[key], of_global=True)
    return found


def shared(module: nn.Module) -> dict[str, tuple[Any, str]]:
    """Return what copies of the module share: attributes of its classes and globals of their files.

    Returns:
        Name, as in `state` -> who holds it, under which key.
    """
    owners: dict[str, Any] = {}
    for part in module.modules():
        for owner in type(part).__mro__:
            home = sys.modules.get(owner.__module__)
            if first_party(getattr(home, "__file__", None) or "<none>"):
                owners[owner.__qualname__] = owner
                owners[owner.__module__] = home
    return {
        f"{name}.{key}": (holder, key)
        for name, holder in owners.items()
        for key in list(vars(holder))
        if not key.startswith("__")
    }


class Shared:
    """What copies of a module share, as it was: a model that has never run has not filled its class's cache either."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._was = {name: (holder, key, vars(holder)[key]) for name, (holder, key) in shared(module).items()}
        self._contents = {name: back for name, (*_, value) in self._was.items() if (back := _putting_back(value))}

    def restore(self, names: Iterable[str]) -> None:
        """Put these names back, as far as they are shared: what they are bound to, and what their containers hold."""
        now: dict[str, tuple[Any, str]] | None = None
        for name in names:
            if name in self._was:
                holder, key, value = self._was[name]
                if vars(holder).get(key) is not value:
                    setattr(holder, key, value)
                if name in self._contents:
                    self._contents[name]()
                continue
            now = shared(self._module) if now is None else now
            if name in now:  # it did not exist
                delattr(*now[name])


def _putting_back(value: object, depth: int = 3) -> Callable[[], None] | None:
    """Return what makes a container hold again what it holds now; None for what holds nothing."""
    if isinstance(value, Tensor):
        return _refilled(value)
    cleared = getattr(value, "cache_clear", None)
    if callable(cleared) and callable(getattr(value, "cache_info", None)):
        return cleared  # type: ignore[no-any-return]
    if not depth:
        return None
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        return _together([_putting_back(item, depth - 1) for item in (*(value.__defaults__ or ()), *cells)])
    if isinstance(value, (list, set, deque, dict)):
        if len(value) > _KEPT_ITEMS:
            return None
        kept = copy.copy(value)
        items = list(value.values()) if isinstance(value, dict) else list(value)
        inner = _together([_putting_back(item, depth - 1) for item in items])

        def back() -> None:
            value.clear()
            if isinstance(value, (dict, set)):
                value.update(kept)
            else:
                value.extend(kept)
            if inner:
                inner()

        return back
    if not isinstance(value, (type, nn.Module)) and first_party(_file(type(value))):
        own = getattr(value, "__dict__", None)
        return _putting_back(own, depth) if isinstance(own, dict) else None
    return None


def _together(parts: list[Callable[[], None] | None]) -> Callable[[], None] | None:
    real = [part for part in parts if part]

    def back() -> None:
        for part in real:
            part()

    return back if real else None


def _refilled(value: Tensor) -> Callable[[], None] | None:
    if value.is_inference() or value.numel() > 2**16:
        return None
    kept, version = value.detach().clone(), value._version

    def back() -> None:
        if value._version != version:
            with torch.no_grad():
                value.copy_(kept)

    return back


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
    if isinstance(value, itertools.count):
        return repr(value)
    if isinstance(value, Iterator):
        return (id(value), operator.length_hint(value, -1))
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


def copied(module: nn.Module) -> nn.Module | None:
    """Return a deep copy of a module, or None where a copy may not be what the module is."""
    if _entangled(module):
        return None
    try:
        made = copy.deepcopy(module)
    except Exception:  # noqa: BLE001 (locks, open files: whatever the attributes raise)
        return None
    modes = {name: part.training for name, part in module.named_modules()}
    for name, part in made.named_modules():
        part.training = modes.get(name, False)  # torch.fx copies its modules into training mode
    return made


def _entangled(module: nn.Module) -> bool:
    """Return whether a function holds on to the module, in a hook or an attribute: copies would share it."""
    for part in module.modules():
        kept = [value for name, value in vars(part).items() if name not in ("_modules", "_parameters", "_buffers")]
        kept += [hook for value in kept if isinstance(value, dict) for hook in value.values()]
        if any(isinstance(value, FunctionType) and value.__closure__ for value in kept):
            return True
    return False


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _file(owner: type) -> str:
    return getattr(sys.modules.get(owner.__module__), "__file__", None) or "<none>"
