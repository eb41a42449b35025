"""Decides where one TorchScript is not its eager model: reads its graph, runs it on every case, searches further.

Hides the order of calls: three in a row, since the profiling executor changes the code after the first; then the other
cases in another order on a module that has not run; then, where Python's code depends on sizes or values, a search
among further cases. What was found wrong is explained by `diagnose`.

Source: docs/hazards.md, "What is run"; torch/csrc/jit/runtime/profiling_graph_executor_impl.cpp.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from tritonbuild import batching, calls, cases, climb, compare, hazards, questions, releases
from tritonbuild.calls import Failure
from tritonbuild.diagnose import Evidence, Mismatch, explain
from tritonbuild.draws import PLAIN
from tritonbuild.graphs import Graph
from tritonbuild.monitors import Site, first_party

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor, nn

    from tritonbuild.cases import Case
    from tritonbuild.diagnose import TracerWarning
    from tritonbuild.hazards import Hazard
    from tritonbuild.reference import Reference
    from tritonbuild.spec import ModelVersion

_REPEATED = 3
"""Cases that are called three times in a row: the profiling executor changes the code after the first call."""

_VALUES_AGAIN = 2
"""Cases of one size that are run in the other order, where code does not depend on values."""

_EVIDENCE = 6
_EVIDENCE_S = 2.0
"""Further mismatches that are collected to find the simplest, and seconds that this may take."""

_SEARCH_CASES = 1000
_SEARCH_LEAST = 8
_SEARCH_S = 2.0
"""Most and fewest cases of the search, and its seconds, where Python was seen to decide by sizes or values."""

_LOOK_CASES = 64
_LOOK_S = 0.1
"""The same for a model of which nothing of that kind is known: some branches on sizes leave no trace of themselves."""

_OTHERWISE_LEAST = 16
_OTHERWISE_ENOUGH = 64
"""Sizes that are looked at whatever the budget where the TorchScript was made by other code than eager runs, and how
many cases are a proof: of 64 random ones, at least one is wrong with a probability of 96 % if every twentieth is.
"""


@dataclass
class Trial:
    """One candidate before the judge.

    Attributes:
        load: Loads a fresh instance from the bytes that will be shipped.
        compared: Cases at which it was compared with eager.
        errors: Output name -> largest absolute error.
        notes: What a person should know although it fails nothing.
        cuts: What was not looked at although it was to be.
    """

    version: ModelVersion
    build: Callable[[], nn.Module]
    load: Callable[[], torch.jit.ScriptModule]
    device: str
    warnings: Sequence[TracerWarning]
    reference: Reference
    traced: bool
    compared: set[Case] = field(default_factory=set)
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    cuts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.module = self.load()
        self.calls = 0
        self.graph = Graph(self.module)
        self._guard = False

    def hazards(self) -> list[Hazard]:
        """Return what is wrong with the candidate."""
        found = list(self._read())
        self.errors = dict.fromkeys(self.reference.output_names, 0.0)
        mismatches = self._run()
        if mismatches:
            found.append(explain(self._evidence(), mismatches))
        return found + self._changed

    def _evidence(self) -> Evidence:
        def passes(case: Case) -> bool:
            return self.reference.outputs(case) is not None and not self._compare(case, 1)

        def otherwise(case: Case) -> Site | None:
            got = self._call(self.load(), self.reference.inputs(case))
            return questions.blamed(self._questions, self.reference, case, got)

        return Evidence(self.reference, self.build, self.graph, self.warnings, self.traced, passes, otherwise)

    @cached_property
    def _questions(self) -> list[questions.Question]:
        return questions.questions(self.reference, traced=self.traced)

    def renamed(self, hazard: Hazard) -> Hazard:
        """Return a hazard of eager with the name that the graph gives it: batch norm in training mode mixes rows."""
        training = self.graph.training()
        if training and hazard.hazard in ("nondeterministic", "rows-mixed", "state"):
            graph = self._evidence().retraced(self.reference.planned[0])
            site = next((node.site for node in (graph.training() if graph else training)), None)
            return hazards.found("training-mode", hazard.detail, case=hazard.case, where=str(site or hazard.where))
        return hazard

    # ------------------------------------------------------------------------------------------------ what is read

    def _read(self) -> Iterator[Hazard]:
        """Yield what the server cannot load, and note what a person should know."""
        for node in self.graph.custom()[:1]:
            yield hazards.found("custom-operator", f"the TorchScript calls {node.kind}", where=node.site)
        for operator, since, unconfirmed in releases.lacking(self.version.triton, self.graph.operators):
            text = f"{operator} came with PyTorch {since}, release {self.version.triton} has an older one"
            if unconfirmed:
                self.notes.append(f"{text} (unconfirmed)")
            else:
                yield hazards.found("unknown-operator", text)
        newer = releases.newer_torch(self.version.triton, torch.__version__)
        self.notes += [newer] if newer else []
        yield from self._devices()

    def _devices(self) -> Iterator[Hazard]:
        kind = torch.device(self.device).type
        for name, site in self.graph.devices().items():
            named = torch.device(name)
            if named.type in ("meta", kind) and ":" not in name:
                if kind == "cpu" and self.version.device == "auto":
                    self.cuts.append("the TorchScript names the device cpu: it cannot be served on a GPU")
                continue
            if named.type == "cuda" and kind == "cpu":
                yield hazards.found(
                    "frozen-device", f"the TorchScript names {name}, it is served on {kind}", where=site
                )
            elif named.type == "cuda":
                self.cuts.append(f"the TorchScript names {name}: serve it on that GPU only (instance_group gpus)")

    # ------------------------------------------------------------------------------------------------- what is run

    def _run(self) -> list[Mismatch]:
        self._changed: list[Hazard] = []
        reference = self.reference
        mismatches: list[Mismatch] = []
        planned = reference.cases
        if self.graph.has_lstm() and self.device == "cpu":
            self._guard = True
            mismatches = self._first_of_each_size(planned)
            if mismatches:
                return mismatches
            self._guard = False
        failed = 0.0
        for i, case in enumerate(planned):
            mismatches += self._compare(case, _REPEATED if i < _REPEATED else 1)
            failed = failed or (time.perf_counter() if mismatches else 0.0)
            if len(mismatches) > _EVIDENCE or (failed and time.perf_counter() - failed > _EVIDENCE_S):
                return mismatches
        if mismatches:
            return mismatches
        # Another order of sizes for the profiling executor, on a module that has not run.
        self.module, self.calls = self.load(), 0
        for case in self._in_another_order(planned):
            mismatches += self._compare(case, 1)
        return mismatches or self._search()

    def _in_another_order(self, planned: Sequence[Case]) -> list[Case]:
        reverse = list(reversed(planned[:: 8 if self.reference.dear else 1]))
        if self.graph.branches() or self.reference.touched:
            return reverse
        # Code without branches is specialized to sizes, not to values: what every value gives has been seen.
        of_size: dict[tuple[tuple[str, int], ...], list[Case]] = {}
        for case in reverse:
            of_size.setdefault(case.axes, []).append(case)
        return [case for case in reverse if case in of_size[case.axes][:_VALUES_AGAIN]]

    def _first_of_each_size(self, planned: Sequence[Case]) -> list[Mismatch]:
        """Run each size once without oneDNN, whose LSTM writes past an initial state that is too small."""
        mismatches: list[Mismatch] = []
        seen: set[tuple[tuple[str, int], ...]] = set()
        for case in planned:
            if case.axes not in seen and len(mismatches) <= _EVIDENCE:
                seen.add(case.axes)
                mismatches += self._compare(case, 1)
        return mismatches

    def _call(self, module: torch.jit.ScriptModule, inputs: Sequence[Tensor]) -> calls.Answer:
        with torch.backends.mkldnn.flags(enabled=False) if self._guard else contextlib.nullcontext():
            return calls.torchscript(module, inputs, self.device)

    def _search(self) -> list[Mismatch]:
        """Look further where Python's code depends on sizes or values, as far as the budget allows."""
        reference = self.reference
        mismatches = self._everywhere() if self._questions else []
        if mismatches:
            return mismatches
        suspicious = self._suspicion()
        places, numbers = self._places(suspicious)
        streams = [cases.more_sizes(self.version, _whole(numbers))]
        if places:
            streams += [
                cases.more_values(numbers, reference.source.bounds, places),
                climb.found(reference, places[0]),
            ]
        most, limit_s = (_SEARCH_CASES, _SEARCH_S) if suspicious else (_LOOK_CASES, _LOOK_S)
        # What the declared budget cuts is said aloud; our own limit is part of what a proof is.
        cuts = self.cuts if self.version.trace.budget_s < limit_s else self.notes
        limit_s = min(self.version.trace.budget_s, limit_s)
        done = set(reference.cases) | self.compared
        before = len(self.compared)
        watch = calls.Watch()
        for tried, case in enumerate(_in_turn(streams)):
            if tried >= most or (watch.s > limit_s and (tried >= _SEARCH_LEAST or not suspicious)):
                if suspicious and tried < most:
                    text = f"further cases were tried for {suspicious}, then time ended ({watch.s:.1f} s)"
                    cuts.append(f"{len(self.compared) - before} {text}")
                break
            if case in done or not reference.cheap(case.sizes, limit_s=max(0.5, 4 * reference.forward_s)):
                continue
            done.add(case)
            mismatches = self._compare(case, 1)
            if mismatches:
                return mismatches
        return []

    def _places(self, suspicious: str) -> tuple[list[dict[str, int]], set[float]]:
        """Return the sizes at which values leave torch for Python, and the numbers of the code that is run there."""
        reference = self.reference
        numbers = set(reference.seen.numbers)
        places = cases.value_sizes(self.version)
        *near, largest = places
        if reference.seen.escapes:
            found = near + ([largest] if reference.cheap(largest) else [])
        else:
            found = []
            for sizes in places[1:] if suspicious else ():
                seen = reference.observe(cases.case(sizes)) if reference.cheap(sizes) else None
                if seen and seen.escapes:
                    found.append(sizes)
                    numbers |= seen.numbers
        return found, {n for n in numbers if n == n and abs(n) < 1e30}

    def _suspicion(self) -> str:
        """Return what makes it likely that Python decides by sizes or values; "" for nothing."""
        escape = next(iter(self.reference.seen.escapes), None)
        if escape:
            return f"the value that leaves torch{f' at {escape.site}' if escape.site else ''}"
        warned = next((warning for warning in self.warnings if first_party(warning.filename)), None)
        if warned:
            return f"the tracer's warning at {Site(warned.filename, warned.lineno)}"
        rounded = self.graph.rounded_size()
        return f"the size that is rounded{f' at {rounded.site}' if rounded.site else ''}" if rounded else ""

    def _everywhere(self) -> list[Mismatch]:
        """Look at all sizes, as far as the budget allows: the TorchScript was made by other code than eager runs.

        What it does may be right for most sizes and values. If the budget ends before enough were looked at, that is
        found `unproved`.
        """
        reference, budget_s = self.reference, self.version.trace.budget_s
        sizes: dict[tuple[tuple[str, int], ...], Case] = {}
        for case in cases.more_sizes(self.version, _whole(reference.seen.numbers)):
            sizes.setdefault(case.axes, case)
        looked_at = {case.axes for case in self.compared}
        before, wanted = len(self.compared), sizes.keys() | looked_at
        longest_s = max(0.5, 4 * reference.forward_s, budget_s / 4)
        started, spent = time.perf_counter(), 0.0
        draws = itertools.islice(cases.more_draws(self.version), 4 * _OTHERWISE_ENOUGH)
        for case in (*(case for axes, case in sizes.items() if axes not in looked_at), *draws):
            spent = time.perf_counter() - started
            fresh = case.axes not in looked_at
            if not fresh and len(self.compared) >= _OTHERWISE_ENOUGH:
                continue
            if spent > budget_s and not (fresh and len(looked_at) < _OTHERWISE_LEAST):
                break
            if not reference.cheap(case.sizes, limit_s=longest_s):
                continue
            looked_at.add(case.axes)
            mismatches = self._compare(case, 1)
            if mismatches:
                return mismatches
        compared = len(self.compared)
        if compared >= _OTHERWISE_ENOUGH and wanted <= looked_at:
            return []
        total = len(wanted | looked_at)  # values were tried at joint sizes, too
        each_s = spent / max(1, compared - before)
        budget = f"budget_s: {budget_s:g}; all take about {each_s * max(total, _OTHERWISE_ENOUGH):.0f} s"
        found = f"{compared} cases at {len(looked_at)} of {total} sizes were compared ({budget})"
        what, site = f"the {'trace' if self.traced else 'script'} runs other code than eager", self._questions[0].site
        if compared < _OTHERWISE_ENOUGH:
            self._changed.append(hazards.found("unproved", f"{what}, and only {found}", where=site))
        else:
            self.cuts.append(f"{what} at {site}, and {found}")
        return []

    def _compare(self, case: Case, repeats: int) -> list[Mismatch]:
        """Run the candidate on a case as often as asked; return the first way in which it is not eager."""
        expected = self.reference.outputs(case)
        if expected is None:
            return []
        self.compared.add(case)
        for _ in range(repeats):
            self.calls += 1
            inputs = self.reference.inputs(case)
            unchanged = calls.Unchanged(inputs)
            got = self._call(self.module, inputs)
            which = unchanged.broken(inputs)
            if which is not None and not self._changed:
                name = list(self.version.inputs)[which]
                self._changed.append(
                    hazards.found("input-mutation", f"input {name} is changed in place", case=str(case))
                )
            mismatch = self._mismatch(case, expected, got)
            if mismatch:
                return [mismatch]
        return []

    def _mismatch(self, case: Case, expected: Sequence[Tensor], got: calls.Answer) -> Mismatch | None:
        if isinstance(got, Failure):
            return None if got.memory else Mismatch(case, self.calls, "", None, got.text, alone=self._alone(case))
        if len(got) != len(expected):
            return Mismatch(case, self.calls, "", None, f"{len(got)} outputs, expected {len(expected)}")
        for name, e, g in zip(self.reference.output_names, expected, got, strict=True):
            difference = compare.difference(e, g, self.reference.tolerance)
            # Without oneDNN values are rounded otherwise, and accepted state changes them: shapes are looked at.
            shapes_only = self._guard or "state" in self.version.trace.accept
            if difference is None or (shapes_only and difference.kind in ("values", "not-finite")):
                self.errors[name] = max(self.errors[name], compare.largest_error(e, g))
                continue
            if difference.kind == "values" and self._rounding(case, compare.mean_error(e, g), name):
                continue
            relative = difference.error / (compare.largest(e) or 1.0)
            return Mismatch(case, self.calls, name, difference, difference.text, relative, self._alone(case))
        return None

    def _alone(self, case: Case) -> bool:
        """Return whether a module that has never run is wrong for the case, too."""
        if self.calls == 1:
            return True
        expected = self.reference.outputs(case)
        got = self._call(self.load(), self.reference.inputs(case))
        assert expected is not None
        return isinstance(got, Failure) or not self.reference.same(expected, got)

    def _rounding(self, case: Case, error: float, name: str) -> bool:
        """Return whether rounding explains an error: eager moves as far when its inputs move in their last bits.

        Not where numbers leave torch, which the last bits may change altogether. And special values may sit on a
        threshold, where a branch is what is looked for: there, Python must have gone the same way as for plain ones.
        """
        reference = self.reference
        if any(escape.kind != "bool" for escape in reference.seen.escapes):
            return False
        moved = batching.sensitivity(reference, reference.inputs(case))
        i = reference.output_names.index(name)
        if moved is None or error > moved[i]:
            return False
        if case.draw != PLAIN and not reference.observe(case).same_way(reference.observe(cases.case(case.sizes))):
            return False
        reference.sensitive.add(name)
        return True


def _whole(numbers: Iterable[float]) -> set[int]:
    return {int(n) for n in numbers if abs(n) < 1e30 and n == int(n) and n > 2}


def _in_turn(streams: Sequence[Iterator[Case]]) -> Iterator[Case]:
    live = list(streams)
    while live:
        for stream in list(live):
            case = next(stream, None)
            if case is None:
                live.remove(stream)
            else:
                yield case
