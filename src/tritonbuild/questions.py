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
import itertools
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from tritonbuild import monitors
from tritonbuild.calls import Failure
from tritonbuild.monitors import Site, first_party

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import CodeType

    from tritonbuild.calls import Answer
    from tritonbuild.cases import Case
    from tritonbuild.monitors import Observation
    from tritonbuild.reference import Reference

_TRACED = ((torch._C, "_is_tracing"), (torch._C, "_get_tracing_state"))
_SCRIPTED = ((torch.jit, "is_scripting"), (torch._jit_internal, "is_scripting"))
_ASKING = frozenset({"is_tracing", "_is_tracing", "_get_tracing_state", "is_scripting"})
_STAYS = ("STORE_", "DELETE_", "RETURN_", "YIELD_")
"""Instructions after which something is not as it was, whatever is on the stack."""


@dataclass(frozen=True)
class Question:
    """One place that asks, and where the answer counts.

    Attributes:
        code: The function that asks.
        traced: Whether it is told that it is being traced; else that it is TorchScript.
        site: The first line that is run with one of the answers only.
    """

    code: CodeType
    traced: bool
    site: Site

    def answer(self, reference: Reference, case: Case) -> Answer:
        """Return what eager returns for a case where this function, and no other, is told yes."""
        with _answered_yes(traced=self.traced, only=self.code):
            return reference.attempt(reference.fresh(), reference.inputs(case))


def questions(reference: Reference, *, traced: bool) -> list[Question]:
    """Return the places at which model code asks whether it is traced (or else scripted), if the answer counts.

    Args:
        reference: Eager; it is watched at its example.
        traced: Whether the question is tracing; else it is scripting.
    """
    codes = [code for code in dict.fromkeys(code for code, _ in reference.seen.steps) if _asks(code)]
    if not codes:
        return []

    def watched() -> Observation:
        module, inputs = reference.fresh(), reference.inputs(reference.planned[0])
        return monitors.observe(module, inputs, lambda: reference.attempt(module, inputs))

    plain = watched()
    with _answered_yes(traced=traced):
        if not _other_way(plain, watched()):
            return []
    found = []
    for code in codes:
        with _answered_yes(traced=traced, only=code):
            site = _other_way(plain, watched(), code)
        found += [Question(code, traced, site)] if site else []
    return found


def blamed(found: Sequence[Question], reference: Reference, case: Case, got: Answer) -> Site | None:
    """Return the line because of which a TorchScript answers a case otherwise; None if no answer to a question counts.

    Eager gives the TorchScript's answer where the guilty function is told yes; what raises then is the next to suspect.
    """
    answers = [(question, question.answer(reference, case)) for question in found]
    for question, answer in answers:
        if not isinstance(answer, Failure) and not isinstance(got, Failure) and reference.same(answer, got):
            return question.site
    raised = [question.site for question, answer in answers if isinstance(answer, Failure)]
    return next(iter([*raised, *(question.site for question in found)]), None)


def _asks(code: CodeType) -> bool:
    return not _ASKING.isdisjoint(code.co_names) and code.co_name not in _ASKING


@contextlib.contextmanager
def _answered_yes(*, traced: bool, only: CodeType | None = None) -> Iterator[None]:
    """Tell model code, or one function of it, that it is being traced, or else TorchScript; torch hears the truth."""

    def forged(truth: Callable[[], Any]) -> Callable[[], Any]:
        def answer() -> Any:
            frame = sys._getframe(1)
            while frame.f_code.co_name in _ASKING and frame.f_back:  # it asks in its turn: torchvision._is_tracing
                frame = frame.f_back
            told = frame.f_code is only if only else first_party(frame.f_code.co_filename)
            return True if told else truth()

        return answer

    with contextlib.ExitStack() as stack:
        for module, name in _TRACED if traced else _SCRIPTED:
            stack.enter_context(mock.patch.object(module, name, forged(getattr(module, name))))
        yield


def _other_way(plain: Observation, told: Observation, asks: CodeType | None = None) -> Site | None:
    """Return the first line that is run with one of the answers only, if that has consequences; else None.

    In the code that asks, if it has one; what is called from there, and what it raises through, comes after.

    Without consequence is a statement of its own that leaves nothing behind, such as the call that counts calls: it
    stores and returns nothing, the stack is as it was, and torch computed as much as without it.
    """
    one, two = _executed(plain), _executed(told)
    parts = [
        (code, part)
        for own, other in ((two, one), (one, two))
        for code, offsets in own.items()
        if code in other
        for part in _parts(code, offsets - other[code])
    ]
    kept = [(code, part) for code, part in parts if _leaves_something(part)]
    if not kept and plain.bytes != told.bytes:
        kept = parts
    kept.sort(key=lambda pair: pair[0] is not asks)
    return _line(kept[0][0], kept[0][1][0].offset) if kept else None


def _executed(seen: Observation) -> dict[CodeType, set[int]]:
    found: dict[CodeType, set[int]] = {}
    for code, offset in seen.steps:
        found.setdefault(code, set()).add(offset)
    return found


def _parts(code: CodeType, offsets: set[int]) -> list[list[dis.Instruction]]:
    """Return the instructions at these offsets, each run of neighbours by itself."""
    if not offsets:
        return []
    runs = itertools.groupby(dis.get_instructions(code), lambda step: step.offset in offsets)
    return [list(steps) for among, steps in runs if among]


def _leaves_something(steps: Sequence[dis.Instruction]) -> bool:
    return any(step.opname.startswith(_STAYS) for step in steps) or bool(
        sum(dis.stack_effect(step.opcode, step.arg, jump=False) for step in steps)
    )


def _line(code: CodeType, offset: int) -> Site:
    starts = [line for start, line in dis.findlinestarts(code) if start <= offset and line is not None]
    return Site(code.co_filename, starts[-1] if starts else code.co_firstlineno)
