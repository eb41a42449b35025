"""Decides whether model code does something else where it is traced or scripted: it asks, and the answer counts.

Much code asks without consequence, to count its calls or to check an argument; torchvision's detectors ask and then
compute the scale of an image by other arithmetic, which is wrong at a few sizes. So eager is watched twice, once with
the true answers and once told that it is being traced (or scripted), and the instructions are compared. Accuses nobody:
where code goes another way, the proof looks at more sizes.

Source: torch.jit.is_tracing, torch.jit.is_scripting, torch._C._get_tracing_state; dis.stack_effect.
"""

from __future__ import annotations

import contextlib
import dis
import sys
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from tritonbuild import monitors
from tritonbuild.monitors import Site, first_party

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import CodeType

    from tritonbuild.monitors import Observation
    from tritonbuild.reference import Reference

_TRACED = ((torch._C, "_is_tracing"), (torch._C, "_get_tracing_state"))
_SCRIPTED = ((torch.jit, "is_scripting"), (torch._jit_internal, "is_scripting"))
_RELAY = getattr(torch.jit, "is_tracing").__code__  # noqa: B009 (torch does not declare that it exports it)
_ASKING = frozenset({"is_tracing", "_is_tracing", "_get_tracing_state", "is_scripting"})
_STAYS = ("STORE_", "DELETE_", "RETURN_", "YIELD_")
"""Instructions after which something is not as it was, whatever is on the stack."""


def runs_otherwise(reference: Reference, *, traced: bool) -> Site | None:
    """Return the first line of model code that is run only where it is traced, or only where not, if that counts.

    Args:
        reference: Eager; it is watched at its example.
        traced: Whether the question is tracing; else it is scripting.
    """
    if not any(not _ASKING.isdisjoint(code.co_names) for code in {code for code, _ in reference.seen.steps}):
        return None

    def watched() -> Observation:
        module, inputs = reference.fresh(), reference.inputs(reference.planned[0])
        return monitors.observe(module, inputs, lambda: reference.attempt(module, inputs))

    plain = watched()
    with _answered_yes(traced=traced):
        told = watched()
    return _other_way(plain, told)


@contextlib.contextmanager
def _answered_yes(*, traced: bool) -> Iterator[None]:
    """Tell model code that it is being traced, or else that it is TorchScript; torch itself hears the truth."""

    def forged(truth: Callable[[], Any]) -> Callable[[], Any]:
        def answer() -> Any:
            frame = sys._getframe(1)
            if frame.f_code is _RELAY and frame.f_back:  # it asks torch._C in its turn
                frame = frame.f_back
            return True if first_party(frame.f_code.co_filename) else truth()

        return answer

    with contextlib.ExitStack() as stack:
        for module, name in _TRACED if traced else _SCRIPTED:
            stack.enter_context(mock.patch.object(module, name, forged(getattr(module, name))))
        yield


def _other_way(plain: Observation, told: Observation) -> Site | None:
    """Return the first line that is run with one of the answers only, if that has consequences; else None.

    Without consequence is a statement of its own that leaves nothing behind, such as the call that counts calls: it
    stores and returns nothing, the stack is as it was, and torch computed as much as without it.
    """
    one, two = _executed(plain), _executed(told)
    for seen, own, other in ((told, two, one), (plain, one, two)):
        sides = {code: offsets - other[code] for code, offsets in own.items() if code in other}
        kept = {code for code, offsets in sides.items() if _leaves_something(code, offsets)}
        if plain.bytes != told.bytes:
            kept = set(sides)
        first = next((step for step in seen.steps if step[0] in kept and step[1] in sides[step[0]]), None)
        if first:
            return _line(*first)
    return None


def _executed(seen: Observation) -> dict[CodeType, set[int]]:
    found: dict[CodeType, set[int]] = {}
    for code, offset in seen.steps:
        found.setdefault(code, set()).add(offset)
    return found


def _leaves_something(code: CodeType, offsets: set[int]) -> bool:
    steps = [step for step in dis.get_instructions(code) if step.offset in offsets]
    return any(step.opname.startswith(_STAYS) for step in steps) or bool(
        sum(dis.stack_effect(step.opcode, step.arg, jump=False) for step in steps)
    )


def _line(code: CodeType, offset: int) -> Site:
    starts = [line for start, line in dis.findlinestarts(code) if start <= offset and line is not None]
    return Site(code.co_filename, starts[-1] if starts else code.co_firstlineno)
