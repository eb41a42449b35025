"""Decides which hazard explains that a TorchScript differs from eager, and on which line of the user's code.

The evidence, in this order: random operators and training mode in the graph; the line at which Python took another way
for the failing case than for the example; a second trace at the failing sizes, whose constants differ; values that left
torch for Python; what the tracer warned about. Nothing here decides whether a model fails.

Source: docs/hazards.md.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from tritonbuild import calls, cases, graphs, hazards, memory, monitors
from tritonbuild.draws import PLAIN
from tritonbuild.graphs import Graph
from tritonbuild.monitors import Site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

    from tritonbuild.cases import Case
    from tritonbuild.compare import Difference
    from tritonbuild.hazards import Hazard
    from tritonbuild.reference import Reference

_DRIFT = 1e-3
"""Errors below this part of the largest element look like rounding, not like another path."""


class TracerWarning(Protocol):
    """What torch.jit.trace warned about: its text, the file and the line."""

    @property
    def message(self) -> str: ...
    @property
    def filename(self) -> str: ...
    @property
    def lineno(self) -> int: ...


@dataclass(frozen=True)
class Mismatch:
    """One case at which the TorchScript is not eager.

    Attributes:
        case: The case.
        call: Which call of the module it was, from 1.
        output: Name of the output; "" when the call raised.
        difference: What was found; None when the call raised or changed an input.
        text: What was found, as text.
        relative: Error relative to the largest element.
        alone: Whether a module that has never run differs, too.
    """

    case: Case
    call: int
    output: str
    difference: Difference | None
    text: str
    relative: float = float("inf")
    alone: bool = True


@dataclass
class Evidence:
    """What is known of one candidate.

    Attributes:
        reference: Eager.
        build: Returns a fresh eager module.
        graph: The candidate's graph, as loaded.
        warnings: What the tracer warned about.
        traced: Whether the candidate is a trace; scripted code follows Python's control flow.
        passes: Whether the candidate is eager at a case.
        otherwise: Returns the line at which a case goes another way because the TorchScript was made by other code
            than eager runs, which had asked; None if there is no such code.
    """

    reference: Reference
    build: Callable[[], nn.Module]
    graph: Graph
    warnings: Sequence[TracerWarning]
    traced: bool
    passes: Callable[[Case], bool]
    otherwise: Callable[[Case], Site | None]
    _graphs: dict[Case, Graph | None] = field(default_factory=dict)

    def retraced(self, case: Case) -> Graph | None:
        """Return the graph of a second trace, on the inputs of a case; None if the model cannot be traced there."""
        if case not in self._graphs:
            self._graphs[case] = self._retraced(case)
        return self._graphs[case]

    def _retraced(self, case: Case) -> Graph | None:
        memory.seed_all(calls.SEED)
        self.reference.forget()
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = torch.jit.trace(self.build(), self.reference.inputs(case), check_trace=False)  # type: ignore[no-untyped-call]
        except Exception:  # noqa: BLE001 (only evidence: whatever it raises, there is none)
            return None
        return Graph(made)


def explain(evidence: Evidence, mismatches: Sequence[Mismatch]) -> Hazard:
    """Return the hazard that explains the mismatches, with the simplest case."""
    reference = evidence.reference
    mismatch = min(mismatches, key=lambda m: (_moved_axes(reference, m.case), _plainness(m)))
    if not mismatch.alone:
        return _named("unstable-calls", mismatch, None)
    accepted = reference.version.trace.accept  # both ran with one seed: what is accepted explains no difference
    training, random = evidence.graph.training(), evidence.graph.random()
    seen = monitors.called_random(reference.seen)
    if not evidence.traced and not (reference.seen.random or reference.seen.dropout):
        random = []  # a script holds both sides of `if self.training`, and eager took the one without chance
    if training and "training-mode" not in accepted:
        return _named("training-mode", mismatch, training[0].site)
    if random and "nondeterministic" not in accepted:
        return _named("nondeterministic", mismatch, seen[0][1] if seen else random[0].site)
    if not evidence.traced:
        return _unexplained(evidence, mismatch)
    # A case of the same sizes that passes: only the values tell the two apart.
    same_sizes = [cases.case(mismatch.case.sizes, PLAIN, seed) for seed in (0, 1, 2)]
    control = next((case for case in same_sizes if case != mismatch.case and evidence.passes(case)), None)
    if control:
        return _by_values(evidence, control, mismatch)
    return _by_sizes(evidence, mismatch)


def _plainness(mismatch: Mismatch) -> tuple[bool, bool, int]:
    return (mismatch.case.draw != PLAIN, mismatch.difference is None, sum(mismatch.case.sizes.values()))


def _moved_axes(reference: Reference, case: Case) -> int:
    return sum(size != reference.planned[0].sizes[axis] for axis, size in case.axes)


def _by_values(evidence: Evidence, control: Case, mismatch: Mismatch) -> Hazard:
    """Explain a mismatch by its values: a case of the same sizes passes."""
    expected, seen = evidence.reference.observe(control), evidence.reference.observe(mismatch.case)
    fork = monitors.fork(expected, seen)
    if fork:
        return _named("branch-on-values", mismatch, fork.site)
    pairs = zip(seen.escapes, expected.escapes, strict=False)
    moved = [escape for escape, other in pairs if escape.value is None or escape.value != other.value]
    if moved:
        name = "branch-on-values" if moved[0].kind == "bool" else "frozen-value"
        return _named(name, mismatch, moved[0].site)
    for change in _changes(evidence, control, mismatch.case):
        name = {"tensor": "frozen-tensor", "number": "frozen-value"}.get(change.kind, "branch-on-values")
        return _named(name, mismatch, change.site)
    return _unexplained(evidence, mismatch)


def _by_sizes(evidence: Evidence, mismatch: Mismatch) -> Hazard:
    """Explain a mismatch by its sizes."""
    reference = evidence.reference
    first = reference.planned[0]
    if mismatch.case.sizes == first.sizes:
        return _unexplained(evidence, mismatch)
    fork = monitors.fork(reference.observe(first), reference.observe(mismatch.case))
    if fork:
        return _named("loop-over-length" if fork.kind == "loop" else "branch-on-shape", mismatch, fork.site)
    changes = _changes(evidence, first, mismatch.case)
    frozen = "frozen-batch" if _only_batch(first, mismatch.case) else "frozen-size"
    kinds = {"repeated": "loop-over-length", "other": "branch-on-shape", "number": frozen, "tensor": "frozen-tensor"}
    for kind, name in kinds.items():
        for change in changes:
            if change.kind == kind:
                return _named(name, mismatch, change.site or _warned(evidence))
    return _unexplained(evidence, mismatch)


def _only_batch(first: Case, case: Case) -> bool:
    return [axis for axis, size in case.axes if size != first.sizes[axis]] == ["batch"]


def _changes(evidence: Evidence, first: Case, case: Case) -> Sequence[graphs.Change]:
    one, two = evidence.retraced(first), evidence.retraced(case)
    return graphs.changes(one, two) if one and two else []


def _warned(evidence: Evidence) -> Site | None:
    found = next(_warnings(evidence), None)
    return Site(found.filename, found.lineno) if found else None


def _rounded(evidence: Evidence) -> Site | None:
    """Return the line at which a part of a size is rounded; what is shipped knows no lines, a second trace does."""
    graph = evidence.retraced(evidence.reference.planned[0]) if evidence.graph.rounded_size() else None
    found = graph.rounded_size() if graph else None
    return found.site if found else None


def _warnings(evidence: Evidence) -> Iterator[TracerWarning]:
    for warning in evidence.warnings:
        if monitors.first_party(warning.filename):
            yield warning


def _unexplained(evidence: Evidence, mismatch: Mismatch) -> Hazard:
    difference = mismatch.difference
    if difference is None:
        return _named("torchscript-fails", mismatch, _warned(evidence))
    if difference.kind == "not-finite":
        return _named("not-finite", mismatch, _warned(evidence))
    otherwise = evidence.otherwise(mismatch.case)
    if otherwise:
        return _named("asks-if-traced", mismatch, otherwise)
    if difference.kind == "values" and mismatch.relative < _DRIFT:
        return _named("numeric-drift", mismatch, None)
    warned = next(_warnings(evidence), None)
    if warned and evidence.traced and "constants in the trace" in warned.message:
        return _named("frozen-tensor", mismatch, Site(warned.filename, warned.lineno))
    return _named("differs", mismatch, _warned(evidence) or _rounded(evidence))


def _named(name: str, mismatch: Mismatch, site: Site | None) -> Hazard:
    call = "" if mismatch.alone else f"call {mismatch.call}: "
    output = f"output {mismatch.output}: " if mismatch.output else ""
    return hazards.found(name, f"{call}{output}{mismatch.text}", case=str(mismatch.case), where=site)
