"""Decides what eager answers: the truth of every case, and the hazards that the model has before any TorchScript.

Hides fresh copies, seeds and settings of torch, and what is remembered between candidates. A model that leaves nothing
behind is called again and again; one that does is called on a fresh copy for every case, so that the truth does not
depend on the order of the cases. What is wrong with the model itself is found here, by running it: chance
(`chance`), memory of earlier calls (`history`), changed inputs, rows that are mixed (`batching`).

Source: docs/hazards.md, "What is run".
"""

from __future__ import annotations

import math
import time
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tritonbuild import batching, calls, cases, chance, compare, draws, hazards, history, memory, monitors
from tritonbuild.calls import Answer, Failure
from tritonbuild.errors import BuildError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from tritonbuild.cases import Case
    from tritonbuild.compare import Tolerance
    from tritonbuild.hazards import Hazard
    from tritonbuild.monitors import Observation
    from tritonbuild.spec import ModelVersion

_REMEMBERED_BYTES = 2**30
_SMALL_BYTES = 2**16
_EXTRA_S = 0.25
"""Seconds for planned cases beyond the kept ones; a model whose kept cases take longer gets a quarter of theirs."""

_KEPT_S = 6.0
"""Seconds of eager after which only the most telling of the cases to keep are run."""

_DEAR_S = 0.05
"""Seconds of one call from which a model is dear: it is run on the cases to keep, and not twice on each."""

_NO_ROWS = frozenset(
    {"outputs-change", "rank-changes", "batch-not-first", "scalar-output", "eager-fails"}
    | {"nondeterministic", "training-mode", "state"}
)
"""Hazards after which a row cannot be compared with the row alone."""

_LONG_S = 2.0
_MUST_S = 60.0
"""Seconds of one call from which a case is left out, unless `budget_s` is as large; of an essential case."""


class Reference:
    """Eager, on every case of one model version; shared by all candidates.

    Args:
        version: The declaration.
        build: Returns a fresh eager module behind its interface, on the device.
        device: A torch device.
        root: The project's folder.

    Raises:
        TraceError: The example data cannot be read.
    """

    def __init__(
        self, version: ModelVersion, build: Callable[[], nn.Module], device: str | torch.device, root: Path
    ) -> None:
        self.version = version
        self.device = str(device)
        self.build = build
        self.source = draws.Source(version, root)
        self.planned = cases.plan(version)
        self.notes: list[str] = []
        self.sensitive: set[str] = set()
        self.cuts: list[str] = []
        self._unproved = ""
        self.found: dict[Case, tuple[Tensor, ...]] = {}
        self.forward_s = 0.0
        self._answers: dict[Case, Answer] = {}
        self._bytes = 0
        self._mutated: Hazard | None = None
        self._drawn: list[Case] = []
        self._looked_further = False
        self.touched: list[str] = []  # what a call changes of the model and leaves so

    # ------------------------------------------------------------------------------------------------ running eager

    def inputs(self, case: Case) -> tuple[Tensor, ...]:
        """Return the inputs of a case, drawn anew: nothing that a call does to them stays."""
        if case not in self.found:
            drawn = self.source.draw(case.sizes, case.draw, case.seed, self.device)
            if sum(tensor.nbytes for tensor in drawn) > _SMALL_BYTES:
                return drawn
            self.found[case] = drawn
        return tuple(tensor.clone() for tensor in self.found[case])

    def fresh(self) -> nn.Module:
        """Return a module that has never run, in a process in which none has."""
        pristine = self._pristine
        self.forget()
        # Building is always right; copying is for entry points that read large weights.
        copied = memory.copied(pristine) if self._build_s > 0.05 else None
        return self.build() if copied is None else copied

    def forget(self) -> None:
        """Put back what calls have left outside the module: attributes of classes, globals."""
        if self.touched:
            self._shared.restore(self.touched)

    @cached_property
    def _pristine(self) -> nn.Module:
        started = time.perf_counter()
        module = self.build()
        self._build_s = time.perf_counter() - started
        return module

    @cached_property
    def _used(self) -> nn.Module:
        return self.fresh()

    def usable(self) -> nn.Module:
        """Return a module to call: the one that has been called before, unless calls leave something behind."""
        return self.fresh() if self.touched else self._used

    def attempt(self, module: nn.Module, inputs: Sequence[Tensor]) -> Answer:
        """Call eager once; return what it raises instead of raising it."""
        try:
            return calls.eager(module, inputs, self.device)
        except Exception as error:  # noqa: BLE001 (the model's code may raise anything)
            return calls.failure(error)

    def answer(self, case: Case) -> Answer:
        """Return eager's outputs for the case, computed once."""
        if case in self._answers:
            return self._answers[case]
        inputs = self.inputs(case)
        unchanged = calls.Unchanged(inputs)
        found = self.attempt(self.usable(), inputs)
        if not isinstance(found, Failure) and memory.drawn(calls.SEED):
            self._drawn.append(case)
        which = unchanged.broken(inputs)
        if which is not None and self._mutated is None:
            self._mutated = self._mutation(case, which)
        size = 0 if isinstance(found, Failure) else sum(x.numel() * x.element_size() for x in found)
        if self._bytes + size <= _REMEMBERED_BYTES:
            self._bytes += size
            self._answers[case] = found
        return found

    def outputs(self, case: Case) -> tuple[Tensor, ...] | None:
        """Return eager's outputs for the case, or None where eager raises."""
        found = self.answer(case)
        return None if isinstance(found, Failure) else found

    def same(self, one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
        """Return whether two results of eager are equal but for rounding."""
        return len(one) == len(two) and not any(
            compare.difference(a, b, self.tolerance) for a, b in zip(one, two, strict=True)
        )

    def note(self, text: str) -> None:
        """Remember a line for proof.json that fails nothing."""
        if text not in self.notes:
            self.notes.append(text)

    def cut(self, text: str) -> None:
        """Remember what was not looked at although it was to be."""
        if text not in self.cuts:
            self.cuts.append(text)

    # ------------------------------------------------------------------------------------------- what is known of it

    @cached_property
    def example(self) -> tuple[Tensor, ...]:
        """Eager's outputs for the example.

        Raises:
            Exception: Whatever the model raises for its own example.
        """
        case = self.planned[0]
        first = self._used
        self._shared = memory.Shared(first)
        before = memory.state(first)
        memory.seed_all(calls.SEED)
        chance_before = memory.random_state()
        inputs = self.inputs(case)
        unchanged = calls.Unchanged(inputs)
        outputs = calls.eager(first, inputs, self.device)
        self._drew = memory.random_state() != chance_before
        self._state = memory.state(first)
        self.touched = memory.changed(before, self._state)
        which = unchanged.broken(inputs)
        self._mutated = None if which is None else self._mutation(case, which)
        started = time.perf_counter()
        self.attempt(self.usable(), self.inputs(case))
        self.forward_s = time.perf_counter() - started
        self._answers[case] = outputs
        return outputs

    @cached_property
    def seen(self) -> Observation:
        """What the example's call did, watched, on a copy of its own."""
        return self.observe(self.planned[0])

    def observe(self, case: Case) -> Observation:
        """Return what eager does on a case; what it raises is not of interest here."""
        module, inputs = self.fresh() if self.touched else self._used, self.inputs(case)
        return monitors.observe(module, inputs, lambda: self.attempt(module, inputs))

    @cached_property
    def tolerance(self) -> Tolerance:
        """How far outputs may be apart: from the coarsest dtype and the depth of the example's call, or as declared."""
        trace = self.version.trace
        kinds = [getattr(torch, declared.dtype) for declared in self.version.inputs.values()]
        kinds += [p.dtype for p in self._pristine.parameters()] + [self.seen.dtype or torch.float64]
        # Dynamic quantization rounds to 1/255 of the largest activation of the batch: each layer counts for several.
        rounding = sum("quantized.dynamic" in type(part).__module__ for part in self._pristine.modules())
        kinds += [torch.bfloat16] * min(rounding, 1)
        floats = [kind for kind in kinds if kind.is_floating_point]
        coarsest = max(floats, key=lambda kind: torch.finfo(kind).eps)
        return compare.tolerance(coarsest, self.seen.depth + 8 * rounding, trace.rtol, trace.atol)

    @cached_property
    def output_names(self) -> tuple[str, ...]:
        """The names that the interface has bound; without one, the declared names, or Triton's by order."""
        count = len(self.example)
        if len(self.sources) == count:
            return tuple(self.sources)
        declared = self.version.outputs
        return declared if len(declared) == count else tuple(f"OUTPUT__{i}" for i in range(count))

    @cached_property
    def sources(self) -> dict[str, str]:
        """Output name -> path in the model's own result; empty for a module without an interface."""
        _ = self.example
        return dict(getattr(getattr(self._used, "interface", None), "sources", ()))

    @property
    def dear(self) -> bool:
        """Whether calls take so long that their number must be kept down."""
        return self.forward_s > _DEAR_S

    def cheap(self, sizes: Mapping[str, int], limit_s: float = 0.1) -> bool:
        """Return whether a call at these sizes is expected to be quick and to fit into memory."""
        return self._expected_s(sizes) < limit_s and self._fits(sizes)

    def _elements(self, sizes: Mapping[str, int]) -> float:
        shapes = [declared.shape for declared in self.version.inputs.values()]
        return sum(math.prod(sizes[s] if isinstance(s, str) else s for s in shape) for shape in shapes)

    def _expected_s(self, sizes: Mapping[str, int]) -> float:
        return self.forward_s * self._elements(sizes) / self._elements(self.planned[0].sizes)

    def _fits(self, sizes: Mapping[str, int]) -> bool:
        example = self.planned[0].sizes
        # Attention grows with the square of a length: allow for the longest axis twice.
        longest = max((sizes[name] / example[name] for name in example if name != "batch"), default=1.0)
        wanted = self.seen.bytes * self._elements(sizes) / self._elements(example) * max(longest, 1.0)
        return wanted < self._available

    @cached_property
    def _available(self) -> float:
        return calls.available_bytes(self.device)

    # ---------------------------------------------------------------------------------------- the model's own hazards

    @cached_property
    def cases(self) -> list[Case]:
        """The cases that eager answers, in planned order; a candidate is proved on these."""
        self.hazards_of_eager  # noqa: B018 (runs them)
        return self._ran

    @cached_property
    def hazards_of_eager(self) -> list[Hazard]:
        """The hazards that the model has without any TorchScript.

        Raises:
            BuildError: The model cannot be called, or returns what cannot be served.
        """
        self._ran: list[Case] = []
        first = self.planned[0]
        try:
            _ = self.example
        except BuildError:
            raise
        except Exception as error:  # noqa: BLE001
            raised = calls.failure(error)
            return [hazards.found("eager-fails", raised.text, case=str(first), where=raised.where)]
        repeated = self._repeated()
        found = [repeated] if repeated else []
        fails = self._sweep()
        late = [] if self.touched else memory.changed(self._state, memory.state(self._used))
        if late:  # only some cases leave something behind: the answers so far may depend on it
            self.touched = late
            self._answers.clear()
            self._bytes = 0
            found += [hazard for hazard in [history.reaches(self, late)] if hazard]
            fails = self._sweep()
        found += [fails] if fails else []
        answers = [(case, outputs) for case in self._ran if (outputs := self.outputs(case)) is not None]
        found += batching.structure(self, answers, self.output_names)
        if self.version.max_batch_size and not _NO_ROWS & {hazard.hazard for hazard in found}:
            found += batching.rows(self, self.output_names)
        if self._mutated:
            found.append(self._mutated)
        if self._unproved:
            found.append(hazards.found("unproved", self._unproved))
        return found

    def further(self) -> list[Hazard]:
        """Return the hazards that only some cases show: chance on a rare way, rows mixed by rare values or sizes.

        To be asked when nothing else is wrong: also what a search for the TorchScript's faults has run is looked at.
        What is found belongs to `hazards_of_eager` from then on.
        """
        if self._looked_further or not self._ran:
            return []
        self._looked_further = True
        names, ran = {hazard.hazard for hazard in self.hazards_of_eager}, set(self._ran)
        searched = [(c, answer) for c, answer in self._answers.items() if c not in ran and isinstance(answer, tuple)]
        beyond = batching.structure(self, [(self.planned[0], self.example), *searched], self.output_names)
        found = [hazard for hazard in beyond if hazard.hazard not in names]
        if not names & {"nondeterministic", "training-mode", "state"}:
            found += chance.further(self, self._drawn)
        if self.version.max_batch_size and not _NO_ROWS & {*names, *(hazard.hazard for hazard in found)}:
            found += batching.further(self, self.output_names, [case for case, _ in searched])
        self.hazards_of_eager.extend(found)
        return found

    def _repeated(self) -> Hazard | None:
        """Return the first way in which outputs differ from call to call."""
        found = history.reaches(self, self.touched) if self.touched else None
        return found or chance.found(self, self.planned[0], self.seen, drew=self._drew)

    def _sweep(self) -> Hazard | None:
        """Run eager on the planned cases; return the first declared input for which it raises."""
        kept = self.version.trace.cases
        watch = calls.Watch()
        limit_s = math.inf
        telling = min(kept, 6 + 4 * len(self.version.all_axes))
        essential = cases.essential_sizes(self.version)
        ended = 0
        fails: Hazard | None = None
        self._ran = []
        for i, case in enumerate(self.planned):
            spent = watch.s
            if i == kept:
                limit_s = min(self.version.trace.budget_s, max(_EXTRA_S, spent / 4)) + spent
            over = (i >= kept and (spent > limit_s or self.dear)) or (i >= telling and spent > _KEPT_S)
            if over and not ended:
                ended = i
            must = case.draw == draws.PLAIN and case.axes in essential
            if ended and not must:
                continue
            if not self._fits(case.sizes):
                self.cut(f"case {case} was left out: it may not fit into memory")
                continue
            expected_s, budget_s = self._expected_s(case.sizes), self.version.trace.budget_s
            limits = (_MUST_S, budget_s) if must else (_LONG_S, budget_s / 4)
            if i and expected_s > max(limits):
                left_out = f"case {case} was left out: it would take {expected_s:.0f} s"
                self.cut(f"{left_out} (budget_s)")
                if must and not self._unproved:
                    self._unproved = f"{left_out}, more than {_MUST_S:g} s and budget_s ({budget_s:g})"
                continue
            essential.discard(case.axes)
            found = self.answer(case)
            if not isinstance(found, Failure):
                self._ran.append(case)
            elif found.memory:
                self.cut(f"case {case} was left out: {found.text}")
            elif self._declared(case, found):
                fails = fails or hazards.found("eager-fails", found.text, case=str(case), where=found.where)
            else:
                self.note(f"case {case} was left out: eager refuses its values: {found.text}")
        if ended:
            say = self.cut if ended < kept else self.note
            say(f"time ended the planned cases after {ended} of {len(self.planned)}")
        return fails

    def _declared(self, case: Case, found: Failure) -> bool:
        """Return whether eager had to take this case: any size with plain values, any integer in its range."""
        if case.draw == draws.PLAIN:
            return True
        integers = any(
            not getattr(torch, declared.dtype).is_floating_point for declared in self.version.inputs.values()
        )
        return integers and found.text.startswith("IndexError")

    def _mutation(self, case: Case, which: int) -> Hazard:
        name = list(self.version.inputs)[which]
        lines = [site for i, site in self.observe(case).in_place if i == which]
        detail = f"input {name} is changed in place"
        return hazards.found("input-mutation", detail, case=str(case), where=lines[0] if lines else None)
