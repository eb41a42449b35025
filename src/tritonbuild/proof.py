"""Decides whether a TorchScript is its eager model: everywhere in the declared axes, at every call.

Running is the judge: every case, eager against the bytes that will be shipped, loaded as the server loads them, called
again and again. What monitors, the tracer's warnings and the graph say decides only how long is searched and what a
failure is called; a model fails because it was seen to be wrong, with the case that shows it.

Source: docs/hazards.md; the PyTorch backend's way of calling a model.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tritonbuild import cases, compare
from tritonbuild.compare import Tolerance
from tritonbuild.diagnose import TracerWarning
from tritonbuild.draws import Source
from tritonbuild.reference import Reference
from tritonbuild.scripting import schema_of
from tritonbuild.trial import Trial

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from tritonbuild.hazards import Hazard
    from tritonbuild.spec import ModelVersion

__all__ = ["Reference", "TracerWarning", "Verdict", "example", "prove", "report", "signature"]

_HARDLY = 4.0
"""An output that moves by less than so many tolerances between inputs hides errors."""

_LITTLE = "this proves little; load trained weights"

_ALONE = frozenset({"nondeterministic", "training-mode", "state", "eager-fails", "outputs-change"})
"""Hazards of eager after which a comparison with the TorchScript says nothing."""


@dataclass(frozen=True)
class Verdict:
    """What a proof found.

    Attributes:
        passed: Whether the TorchScript may be served.
        hazards: Why not; the simplest case of each.
        accepted: Hazards that were found and are accepted, each with the declared reason.
        arguments: Names of the arguments of the TorchScript's forward.
        cases: Cases at which TorchScript and eager were compared.
        max_abs_error: Output name -> largest absolute error of finite elements.
        seconds: Of this proof, eager included as far as it was not known before.
        notes: What a person should know although it fails nothing.
        cuts: What was not looked at although it was to be: a pass says nothing of that.
    """

    passed: bool
    hazards: list[Hazard]
    accepted: list[tuple[Hazard, str]]
    arguments: list[str]
    cases: int
    max_abs_error: dict[str, float]
    seconds: float
    notes: list[str]
    cuts: list[str]


def example(version: ModelVersion, device: str | torch.device, root: Path) -> tuple[Tensor, ...]:
    """Return the inputs that a model is traced with, in declared order, on the device.

    Raises:
        TraceError: The example data cannot be read.
    """
    first = cases.plan(version)[0]
    return Source(version, root).draw(first.sizes, first.draw, first.seed, str(device))


def prove(
    version: ModelVersion,
    build: Callable[[], nn.Module],
    candidate: Callable[[], torch.jit.ScriptModule],
    device: str | torch.device,
    warnings: Sequence[TracerWarning],
    reference: Reference,
    *,
    traced: bool = True,
) -> Verdict:
    """Compare a TorchScript with eager and return the verdict.

    Args:
        version: The declaration.
        build: Returns a fresh eager module behind its interface.
        candidate: Loads a fresh instance from the bytes that will be shipped.
        device: Where both run.
        warnings: What the tracer warned about.
        reference: Eager; shared by the candidates of one version.
        traced: Whether the candidate is a trace (with scripted parts, too), not a script as a whole.

    Raises:
        BuildError: The eager model cannot be called, or returns what cannot be served.
    """
    started = time.perf_counter()
    trial = Trial(version, build, candidate, str(device), warnings, reference, traced)
    accepted = version.trace.accept
    found = list(reference.hazards_of_eager)
    found = [trial.renamed(hazard) for hazard in found]
    if not {hazard.hazard for hazard in found} - accepted.keys() & _ALONE:
        found += trial.hazards()
        if not {hazard.hazard for hazard in found} - accepted.keys():
            found += [trial.renamed(hazard) for hazard in reference.further()]
    by_name = {hazard.hazard: hazard for hazard in reversed(found)}
    unique = list(reversed(by_name.values()))
    unique.sort(key=lambda hazard: hazard.hazard == "unproved")  # first what was seen to be wrong
    sensitive = [f"output {name} is sensitive to rounding" for name in sorted(reference.sensitive)]
    failing = [hazard for hazard in unique if hazard.hazard not in accepted]
    constant, hollow = ([], []) if failing else _unmoved(reference)
    return Verdict(
        passed=not failing,
        hazards=failing,
        accepted=[(hazard, accepted[hazard.hazard]) for hazard in unique if hazard.hazard in accepted],
        arguments=[argument.name for argument in schema_of(trial.module).arguments[1:]],
        cases=len(trial.compared),
        max_abs_error=trial.errors,
        seconds=time.perf_counter() - started,
        notes=[*reference.notes, *trial.notes, *sensitive, *constant],
        cuts=[*hollow, *trial.cuts, *reference.cuts],
    )


def _unmoved(reference: Reference) -> tuple[list[str], list[str]]:
    """Return what to note of outputs that never move, and of those that hardly do: errors could not be seen in them.

    With weights that nobody has trained, norms may drive each input to the same answer. If nothing moves, all of that
    is told as the second kind.
    """
    allowed = reference.tolerance
    loose = Tolerance(_HARDLY * allowed.rtol, _HARDLY * allowed.scaled, _HARDLY * allowed.atol)
    answers = [found for case in reference.cases if (found := reference.outputs(case)) is not None]
    constant: list[str] = []
    hollow: list[str] = []
    for i, name in enumerate(reference.output_names):
        first: dict[torch.Size, Tensor] = {}
        pairs = [
            (one, found[i]) for found in answers if (one := first.setdefault(found[i].shape, found[i])) is not found[i]
        ]
        differences = (compare.difference(one, other, loose) for one, other in pairs)
        # NaN comes through any weights, and says nothing of the values.
        if not pairs or any(difference and difference.kind == "values" for difference in differences):
            continue
        moved = max(compare.largest_error(one, other) for one, other in pairs)
        limit = allowed.atol + (allowed.rtol + allowed.scaled) * max(compare.largest(one) for one, _ in pairs)
        if not moved:
            constant.append(f"output {name} is the same for all inputs")
        elif moved < _HARDLY * limit:
            hollow.append(f"output {name} moves by {moved:.2g} between inputs, its tolerance is {limit:.2g}: {_LITTLE}")
    if len(constant) + len(hollow) == len(reference.output_names):
        return [], [*hollow, *(f"{text}: {_LITTLE}" for text in constant)]
    return constant, hollow


def signature(version: ModelVersion, reference: Reference, argument_names: Sequence[str]) -> dict[str, Any]:
    """Return names, dtypes and dims of inputs and outputs, measured on the cases.

    Args:
        version: The declaration.
        reference: Eager; its cases have run.
        argument_names: Arguments of the TorchScript's forward.

    Returns:
        What .build/signature/<model>/<version>.json holds; dims without the batch axis, -1 where one varies.
    """
    batched = bool(version.max_batch_size)
    inputs = [
        {
            "name": name,
            "dtype": declared.dtype,
            "dims": [-1 if isinstance(size, str) else size for size in declared.shape][batched:],
        }
        for name, declared in version.inputs.items()
    ]
    answers = [found for case in reference.cases if (found := reference.outputs(case)) is not None]
    outputs = []
    for i, name in enumerate(reference.output_names):
        shapes = [list(found[i].shape)[batched:] for found in answers]
        outputs.append(
            {
                "name": name,
                "dtype": str(answers[0][i].dtype).removeprefix("torch."),
                "dims": [sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*shapes, strict=True)],
                "source": reference.sources.get(name, ""),
            }
        )
    return {"inputs": inputs, "outputs": outputs, "forward": list(argument_names)}


def report(verdict: Verdict, reference: Reference) -> dict[str, Any]:
    """Return what .build/proof/<model>/<version>.json holds, but for the action key."""
    cuda = reference.device.startswith("cuda")
    tolerance = reference.tolerance if verdict.cases else None
    return {
        "verdict": "passed" if verdict.passed else "failed",
        "hazards": [hazard.record() for hazard in verdict.hazards],
        "accepted": [{**hazard.record(), "reason": reason} for hazard, reason in verdict.accepted],
        "cases": verdict.cases,
        "max_abs_error": verdict.max_abs_error,
        "tolerance": {"rtol": tolerance.rtol, "scaled": tolerance.scaled, "atol": tolerance.atol} if tolerance else {},
        "seconds": round(verdict.seconds, 3),
        "notes": verdict.notes,
        "cuts": verdict.cuts,
        "torch": torch.__version__,
        "device": reference.device,
        "settings": {"tf32": False, "cudnn_deterministic": True, "cudnn_benchmark": False} if cuda else {},
    }
