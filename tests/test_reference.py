"""One proof from end to end: what is accepted, noted, measured, reported, and what it costs."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from tritonbuild import calls, cases, proof
from tritonbuild.candidates import quiet
from tritonbuild.errors import TraceError
from tritonbuild.hazards import HAZARDS
from tritonbuild.reference import Reference
from tritonbuild.spec import Axis, Input, ModelVersion, Trace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tritonbuild.proof import Verdict

T = Axis(example=6, min=2, max=12)


def version(batch: int = 4, triton: str = "26.08", axes: dict[str, Axis] | None = None, **trace: Any) -> ModelVersion:
    shape = (*(["batch"] if batch else []), *(axes or {}), 8)
    return ModelVersion.model_construct(
        model="m",
        version=1,
        entry_point="m:M",
        kwargs={},
        seed=0,
        weights=None,
        device="cpu",
        triton=triton,
        max_batch_size=batch,
        axes=axes or {},
        inputs={"x": Input(dtype="float32", shape=shape)},
        outputs=(),
        trace=Trace(**trace),
    )


class Proved:
    """A proof of one module, traced or made otherwise."""

    def __init__(self, make: Callable[[], nn.Module], declared: ModelVersion, root: Path, script: Any = None) -> None:
        def build() -> nn.Module:
            torch.default_generator.manual_seed(0)
            return make().eval().requires_grad_(False)

        example = proof.example(declared, "cpu", root)
        with torch.no_grad(), quiet():
            made = script() if script else torch.jit.trace(build(), example, check_trace=False)
            buffer = io.BytesIO()
            torch.jit.save(made, buffer)

        def load() -> Any:
            buffer.seek(0)
            with quiet():
                return torch.jit.load(buffer)

        self.reference = Reference(declared, build, "cpu", root)
        self.verdict: Verdict = proof.prove(declared, build, load, "cpu", [], self.reference, traced=script is None)
        self.report = proof.report(self.verdict, self.reference)

    @property
    def names(self) -> list[str]:
        return [hazard.hazard for hazard in self.verdict.hazards]


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.linear(x), x.argmax(-1)


class Dropped(Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return F.dropout(self.linear(x), 0.5, training=True)


class Noisy(Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return self.linear(x) + torch.randn(4)


class NoisyBranch(Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return Noisy.forward(self, x) * (2 if x.shape[0] > 3 else 1)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1
        return x * self.calls


# -------------------------------------------------------------------------------------------------------- accepting


def test_an_accepted_hazard_passes_and_stays_visible(tmp_path: Path) -> None:
    assert Proved(Noisy, version(), tmp_path).names == ["nondeterministic"]
    proved = Proved(Noisy, version(accept={"nondeterministic": "sampling is wanted"}), tmp_path)
    assert proved.verdict.passed
    assert proved.verdict.cases > 20
    assert proved.report["hazards"] == []
    [accepted] = proved.report["accepted"]
    assert (accepted["hazard"], accepted["reason"]) == ("nondeterministic", "sampling is wanted")
    cases.save(proved.reference, tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        assert file.metadata()["compare"] == "shapes"


class Mixed(Linear):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.linear(x)
        return y - y.mean(0)


class Cancelling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 64), nn.Linear(64, 1)
        self.a.weight.data *= 1000

    def forward(self, x: torch.Tensor) -> Any:
        y = self.a(x)
        return x, self.b(y) - self.b(y + 1e-3)


def test_what_the_smoke_test_may_compare_is_kept_with_the_cases(tmp_path: Path) -> None:
    kept = {}
    for model, accept in ((Linear, {}), (Mixed, {"rows-mixed": "offline"}), (Cancelling, {})):
        proved = Proved(model, version(accept=accept), tmp_path)
        assert proved.verdict.passed
        cases.save(proved.reference, tmp_path / "c.safetensors")
        with safe_open(tmp_path / "c.safetensors", "pt") as file:
            kept[model.__name__] = [file.metadata()[key] for key in ("compare", "rows", "sensitive")]
    assert kept == {
        "Linear": ["values", "apart", "[]"],
        "Mixed": ["values", "mixed", "[]"],
        "Cancelling": ["values", "apart", '["OUTPUT__1"]'],
    }
    assert "output OUTPUT__1 is sensitive to rounding" in proved.verdict.notes


class Untrained(Linear):
    def forward(self, x: torch.Tensor) -> Any:
        return torch.sigmoid(1e-6 * self.linear(x.clamp(-9, 9))), x.sign().sum(-1), torch.ones(x.shape[0], 2)


class Untouched(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return 0 * x.nan_to_num(0.0, 0.0, 0.0)


def test_an_output_that_hardly_moves_is_said_to_prove_little(tmp_path: Path) -> None:
    proved = Proved(Untrained, version(), tmp_path)
    assert proved.verdict.passed
    [cut] = proved.report["cuts"]
    assert re.sub(r"[0-9.]+e-0\d", "#", cut) == (
        "output OUTPUT__0 moves by # between inputs, its tolerance is #: this proves little; load trained weights"
    )
    assert "output OUTPUT__2 is the same for all inputs" in proved.report["notes"]


def test_a_model_whose_outputs_never_move_is_said_to_prove_little(tmp_path: Path) -> None:
    proved = Proved(Untouched, version(axes={"t": T}), tmp_path)
    assert proved.verdict.passed
    assert proved.report["cuts"] == [
        "output OUTPUT__0 is the same for all inputs: this proves little; load trained weights"
    ]


def test_outputs_that_move_are_not_said_to_prove_little(tmp_path: Path) -> None:
    assert Proved(Linear, version(axes={"t": T}), tmp_path).report["cuts"] == []


def test_what_is_not_accepted_still_fails(tmp_path: Path) -> None:
    proved = Proved(NoisyBranch, version(accept={"nondeterministic": "sampling is wanted"}), tmp_path)
    assert proved.names == ["branch-on-shape"]


def test_training_mode_has_its_own_name(tmp_path: Path) -> None:
    assert Proved(Dropped, version(), tmp_path).names == ["training-mode"]
    assert Proved(Dropped, version(accept={"training-mode": "Monte Carlo dropout"}), tmp_path).verdict.passed


def test_where_state_is_accepted_shapes_are_compared(tmp_path: Path) -> None:
    assert Proved(Counting, version(), tmp_path).names == ["state"]
    assert Proved(Counting, version(accept={"state": "it counts"}), tmp_path).verdict.passed


# --------------------------------------------------------------------------------------------------- the whole message


def test_the_message_names_case_line_error_and_way_out(tmp_path: Path) -> None:
    class Branch(Linear):
        def forward(self, x: torch.Tensor) -> Any:
            if x.shape[1] > 6:
                return self.linear(x) * 2
            return self.linear(x)

    [hazard] = Proved(Branch, version(axes={"t": T}), tmp_path).verdict.hazards
    line = Branch.forward.__code__.co_firstlineno + 1
    assert re.sub(r"-?\d+\.\d+(e-\d+)?|\d+e-\d+", "#", str(hazard)) == (
        f"branch-on-shape: case batch=2 t=7 draw=plain seed=112: tests/test_reference.py:{line}: "
        "output OUTPUT__0: max abs error #, at the worst element found #, expected # within #"
    )
    assert hazard.way_out == HAZARDS["branch-on-shape"].way_out


def test_what_torchscript_raises_is_told_in_one_line(tmp_path: Path) -> None:
    class Frozen(Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return self.linear(x.view(int(x.shape[0]), 8))

    [hazard] = Proved(Frozen, version(), tmp_path).verdict.hazards
    assert hazard.hazard == "frozen-batch"
    assert hazard.detail == "RuntimeError: shape '[2, 8]' is invalid for input of size 8"
    assert hazard.case == "batch=1 draw=plain seed=100"


# ------------------------------------------------------------------------------------------------ what is reported


def test_report_and_signature(tmp_path: Path) -> None:
    proved = Proved(Linear, version(axes={"t": T}), tmp_path)
    report = json.loads(json.dumps(proved.report))
    assert report["verdict"] == "passed"
    assert report["max_abs_error"] == {"OUTPUT__0": 0.0, "OUTPUT__1": 0.0}
    assert report["torch"] == torch.__version__
    assert report["device"] == "cpu"
    assert report["settings"] == {}
    assert report["cases"] >= 24
    assert set(report["tolerance"]) == {"rtol", "scaled", "atol"}
    assert proof.signature(proved.reference.version, proved.reference, ["x"]) == {
        "inputs": [{"name": "x", "dtype": "float32", "dims": [-1, 8]}],
        "outputs": [
            {"name": "OUTPUT__0", "dtype": "float32", "dims": [-1, 4], "source": ""},
            {"name": "OUTPUT__1", "dtype": "int64", "dims": [-1], "source": ""},
        ],
        "forward": ["x"],
    }
    failed = Proved(Noisy, version(), tmp_path).report
    assert failed["verdict"] == "failed"
    assert set(failed["hazards"][0]) == {"hazard", "case", "where", "detail", "way_out"}


def test_a_newer_pytorch_than_the_release_has_is_a_note(tmp_path: Path) -> None:
    proved = Proved(Linear, version(triton="23.10"), tmp_path)
    assert proved.verdict.passed
    assert [note for note in proved.verdict.notes if "traces for release 23.10" in note]


# ------------------------------------------------------------------------------------------------ time and memory


class Slow(Linear):
    def forward(self, x: torch.Tensor) -> Any:
        time.sleep(0.02)
        return self.linear(x)


def test_time_cuts_what_is_planned_beyond_the_kept_cases_and_says_so(tmp_path: Path) -> None:
    proved = Proved(Slow, version(cases=3, budget_s=0.01), tmp_path)
    assert proved.verdict.passed
    assert 3 <= proved.verdict.cases < 12
    assert any(re.fullmatch(r"time ended the planned cases after \d+ of \d+", note) for note in proved.verdict.notes)


def test_a_model_too_slow_for_its_budget_is_proved_at_the_essential_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tritonbuild.reference._LONG_S", 0.0)
    proved = Proved(Linear, version(cases=3, budget_s=1e-9, axes={"t": T}), tmp_path)
    assert proved.verdict.passed
    sizes = {tuple(case.sizes.values()) for case in proved.reference.cases}
    assert sizes == {(2, 6), (1, 6), (4, 6), (3, 6), (2, 2), (2, 12), (1, 2), (4, 12)}
    assert any("was left out: it would take 0 s (budget_s)" in cut for cut in proved.verdict.cuts)


def test_a_model_too_slow_for_its_essential_sizes_is_unproved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritonbuild.reference._LONG_S", 0.0)
    monkeypatch.setattr("tritonbuild.reference._MUST_S", 0.0)
    [hazard] = Proved(Linear, version(cases=3, budget_s=1e-9), tmp_path).verdict.hazards
    assert str(hazard) == (
        "unproved: case batch=1 draw=plain seed=100 was left out: it would take 0 s, more than 0 s and budget_s (1e-09)"
    )
    accepted = version(cases=3, budget_s=1e-9, accept={"unproved": "only the example is ever sent"})
    assert Proved(Linear, accepted, tmp_path).verdict.passed


def test_sizes_that_do_not_fit_into_memory_are_left_out_and_said(tmp_path: Path) -> None:
    endless = Axis(example=6, min=2, max=10**12)
    proved = Proved(Linear, version(axes={"t": endless}), tmp_path)
    assert proved.verdict.passed
    assert any("may not fit into memory" in cut for cut in proved.verdict.cuts)


def test_a_size_at_which_memory_ends_is_left_out_and_said(tmp_path: Path) -> None:
    class Hungry(Linear):
        def forward(self, x: torch.Tensor) -> Any:
            if x.shape[0] > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.linear(x)

    proved = Proved(Hungry, version(), tmp_path)
    assert proved.verdict.passed
    assert any("was left out: OutOfMemoryError: CUDA out of memory" in cut for cut in proved.verdict.cuts)


def test_a_proof_costs_less_than_fifteen_calls_per_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = {"eager": 0, "torchscript": 0}
    for name in count:
        before = getattr(calls, name)

        def counted(*args: Any, before: Any = before, name: str = name, **more: Any) -> Any:
            count[name] += 1
            return before(*args, **more)

        monkeypatch.setattr(calls, name, counted)
    proved = Proved(Linear, version(axes={"t": T}), tmp_path)
    planned = len(proved.reference.cases)
    assert planned <= proved.verdict.cases <= planned + 100
    # Once a case, at most 100 further cases, and what is spent on calls, chance and rows. TorchScript: twice.
    assert count["eager"] <= planned + 100 + 40
    assert count["torchscript"] <= 2 * planned + 100 + 20
    assert sum(count.values()) < 15 * planned


class Branching(Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if x.shape[0] > 1000:
            x = x * 2
        return self.linear(x), x.argmax(-1)


class CountingTensor(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.add_(1)
        return self.linear(x), x.argmax(-1)


@pytest.mark.parametrize(
    ("make", "script", "everything"),
    [(Linear, False, False), (Branching, False, False), (Branching, True, True), (CountingTensor, False, True)],
)
def test_what_does_not_depend_on_values_is_run_in_another_order_at_each_size(
    make: type[Linear], script: bool, everything: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[object, ...]] = []
    before = calls.torchscript

    def counted(module: Any, inputs: Any, *args: Any) -> Any:
        ran.append((module, tuple(inputs[0].shape), inputs[0].sum().item()))
        return before(module, inputs, *args)

    def scripted() -> torch.jit.ScriptModule:
        torch.default_generator.manual_seed(0)
        return torch.jit.script(make().eval())

    monkeypatch.setattr(calls, "torchscript", counted)
    proved = Proved(make, version(), tmp_path, script=scripted if script else None)
    assert proved.verdict.passed
    planned = [case.axes for case in proved.reference.cases]
    modules = list(dict.fromkeys(module for module, _, _ in ran))
    assert len(modules) == 2
    again = [shape[0] for module, shape, _ in ran if module is modules[1]]
    reverse = [size for ((_, size),) in reversed(planned)]
    wanted = reverse if everything else [size for i, size in enumerate(reverse) if reverse[:i].count(size) < 2]
    assert len(wanted) == len(planned) if everything else 2 * len(set(planned)) >= len(wanted) < len(planned) / 2
    assert again[: len(wanted)] == wanted
    # What follows is the search, one case of a size at a time.
    assert len(again) - len(wanted) <= 64


def test_eager_is_run_once_for_all_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Proved(Linear, version(), tmp_path)
    count = 0
    before = calls.eager

    def counted(*args: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        return before(*args, **more)

    monkeypatch.setattr(calls, "eager", counted)
    with torch.no_grad(), quiet():
        again = torch.jit.trace(first.reference.build(), first.reference.inputs(first.reference.planned[0]))
    verdict = proof.prove(first.reference.version, first.reference.build, lambda: again, "cpu", [], first.reference)
    assert verdict.passed
    assert count == 0


# ------------------------------------------------------------------------------------- what only a candidate can be


class ScriptedCounting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * 2 if self.calls < 3 else x * 3


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class NamesGpu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() > 8:
            return x.to(torch.device("cuda"))
        return x * 2


class Mutating(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        x.add_(1)
        return y


def test_an_answer_that_changes_from_call_to_call(tmp_path: Path) -> None:
    [hazard] = Proved(Double, version(), tmp_path, lambda: torch.jit.script(ScriptedCounting())).verdict.hazards
    assert hazard.hazard == "unstable-calls"
    assert hazard.detail.startswith("call 3: output OUTPUT__0: max abs error ")


def test_a_device_that_the_server_does_not_have(tmp_path: Path) -> None:
    [hazard] = Proved(Double, version(), tmp_path, lambda: torch.jit.script(NamesGpu())).verdict.hazards
    assert hazard.hazard == "frozen-device"
    assert hazard.detail == "the TorchScript names cuda, it is served on cpu"


def test_a_candidate_that_changes_its_input(tmp_path: Path) -> None:
    assert Proved(Double, version(), tmp_path, lambda: torch.jit.script(Mutating())).names == ["input-mutation"]


# ---------------------------------------------------------------------------------------------------------- eager


def test_a_model_that_raises_for_its_example_fails_and_our_own_errors_pass_through(tmp_path: Path) -> None:
    class Raises(nn.Module):
        error: type[Exception] = KeyError

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise self.error("no", "such", "word") if self.error is TraceError else self.error("word")

    reference = Reference(version(), Raises, "cpu", tmp_path)
    [hazard] = reference.hazards_of_eager
    line = f"tests/test_reference.py:{Raises.forward.__code__.co_firstlineno + 1}"
    assert str(hazard) == f"eager-fails: case batch=2 draw=plain seed=0: {line}: KeyError: 'word'"
    Raises.error = TraceError
    with pytest.raises(TraceError):
        _ = Reference(version(), Raises, "cpu", tmp_path).hazards_of_eager


def test_the_truth_of_a_model_that_remembers_is_that_of_a_fresh_copy(tmp_path: Path) -> None:
    reference = Reference(version(), Counting, "cpu", tmp_path)
    assert [hazard.hazard for hazard in reference.hazards_of_eager] == ["state"]
    for case in reference.cases[:8]:
        outputs = reference.outputs(case)
        assert outputs
        assert torch.equal(outputs[0], reference.inputs(case)[0])


def test_the_default_dtype_of_an_entry_point_is_not_the_servers(tmp_path: Path) -> None:
    class Zeros(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(x.shape[0], 3)

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        proved = Proved(Zeros, version(), tmp_path, lambda: torch.jit.script(Zeros()))
    finally:
        torch.set_default_dtype(before)
    assert proved.names == ["differs"]
    assert proved.verdict.hazards[0].detail == "output OUTPUT__0: found float32, expected float64"


_TF32 = """\
import os, sys, warnings
from torch import backends
from tritonbuild import calls

def seen():
    cudnn, found = backends.cudnn, [backends.cudnn.deterministic, backends.cudnn.benchmark]
    for part in (backends, cudnn, backends.cuda.matmul, cudnn.conv, cudnn.rnn):
        found.append(part.fp32_precision)
    for part in (backends.cuda.matmul, cudnn):
        try:
            found.append(part.allow_tf32)
        except RuntimeError:
            found.append("they disagree")
    return found

warnings.simplefilter("ignore")
for line in sys.argv[1:]:
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    exec(line)
    before = seen()
    with calls.settings("cuda:0"):
        inside = seen()
    print(inside == [True, False, *["ieee"] * 5, False, False], seen() == before, flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="PyTorch has it from 2.9 on")
def test_a_gpu_proves_without_tensorfloat_32_whatever_the_models_code_has_set() -> None:
    """The settings of a GPU can be read and set where there is none."""
    lines = [
        "",
        "backends.cuda.matmul.allow_tf32 = True",
        "backends.cudnn.allow_tf32 = False",
        "backends.fp32_precision = 'tf32'",
        "backends.cudnn.fp32_precision = 'tf32'",
        "backends.cuda.matmul.fp32_precision = 'tf32'",
        "backends.cudnn.conv.fp32_precision = 'ieee'",
    ]
    ran = subprocess.run([sys.executable, "-c", _TF32, *lines], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["True True"] * len(lines)
