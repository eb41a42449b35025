"""Whether model code does something else where it is traced or scripted, and what a proof makes of it."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torchvision
from test_reference import Proved, version
from torch import nn

from tritonbuild import questions
from tritonbuild.reference import Reference
from tritonbuild.spec import Axis

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def line(forward: Callable[..., Any], root: Path, *, traced: bool = True) -> int | None:
    """Return the line of `forward`, from its first, that runs otherwise when it is traced; None for none."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept: list[float] = []
            self.half = False

    Net.forward = forward
    reference = Reference(version(axes={"t": Axis(example=6, min=2, max=12)}), Net, "cpu", root)
    found = questions.questions(reference, traced=traced)
    if not found:
        return None
    assert found[0].site.file == __file__
    return found[0].site.line - forward.__code__.co_firstlineno


def test_what_does_not_ask_runs_as_eager(tmp_path: Path) -> None:
    assert line(lambda _, x: x + 1, tmp_path) is None


def test_asking_without_consequence_does_not_count(tmp_path: Path) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting() and not torch.jit.is_tracing():
            torch._C._log_api_usage_once("forward")
        if not torch.jit.is_tracing() and x.dim() != 3:
            raise ValueError
        if not torchvision._is_tracing() and self.half:
            x = x.half()
        return x + 1

    assert line(forward, tmp_path) is None
    assert line(forward, tmp_path, traced=False) is None


def test_the_first_line_that_is_run_otherwise_is_named(tmp_path: Path) -> None:
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        if torchvision._is_tracing():
            x = x + 1
        return x

    assert line(forward, tmp_path) == 2
    assert line(forward, tmp_path, traced=False) is None


def test_a_line_that_eager_alone_runs_is_named(tmp_path: Path) -> None:
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            x = x + 1
        return x

    assert line(forward, tmp_path, traced=False) == 2
    assert line(forward, tmp_path) is None


def test_a_statement_without_consequence_is_not_named_for_another(tmp_path: Path) -> None:
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_tracing():
            torch._C._log_api_usage_once("forward")
        x = x + 1
        if not torch.jit.is_tracing():
            x = x * 2
        return x

    assert line(forward, tmp_path) == 5


def test_a_value_chosen_by_the_answer_counts(tmp_path: Path) -> None:
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        size = len(x) if torch.jit.is_tracing() else int(x.shape[0])
        return x + size

    assert line(forward, tmp_path) == 1


def test_what_torch_does_in_a_statement_counts(tmp_path: Path) -> None:
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        if torch.jit.is_tracing():
            x.mul_(2)
        return x

    assert line(forward, tmp_path) == 3


def test_a_path_that_raises_outside_a_trace_counts(tmp_path: Path) -> None:
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_tracing():
            x.shape[1].add(1)  # type: ignore[attr-defined]
        return x

    assert line(forward, tmp_path) == 2


@pytest.mark.parametrize("name", ["densenet121", "efficientnet_b0", "swin_t", "squeezenet1_1"])
def test_common_networks_run_as_eager(name: str, tmp_path: Path) -> None:
    """All but the last ask, and more than ten times."""

    def build() -> nn.Module:
        return torchvision.models.get_model(name, weights=None).eval()

    class Picture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = build()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x[:, :, :, None].expand(-1, 32, 32, 3).permute(0, 3, 1, 2))

    reference = Reference(version(axes={"t": Axis(example=32, min=32, max=32)}), Picture, "cpu", tmp_path)
    assert questions.questions(reference, traced=True) == []
    assert questions.questions(reference, traced=False) == []


# ------------------------------------------------------------------------------------------- what a proof makes of it


class Rounded(nn.Module):
    """Wrong at one of many sizes, and only where it is traced."""

    seconds = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        size = torch._shape_as_tensor(x)[1] if torch.jit.is_tracing() else x.shape[1]
        return x * size


class Slow(Rounded):
    seconds = 0.02


ASKS = Rounded.forward.__code__.co_firstlineno + 2


def test_all_sizes_and_many_values_are_compared(tmp_path: Path) -> None:
    few = Axis(example=6, min=1, max=12)
    proved = Proved(Slow, version(batch=0, axes={"t": few}, cases=1), tmp_path)
    assert proved.names == []
    assert proved.verdict.cuts == []
    assert proved.verdict.cases >= 64


def test_nothing_is_missing_where_values_were_tried_at_joint_sizes_too(tmp_path: Path) -> None:
    axes = {"t": Axis(example=6, min=1, max=12), "u": Axis(example=5, min=1, max=9)}
    proved = Proved(Rounded, version(batch=3, axes=axes), tmp_path)
    assert proved.names == []
    assert proved.verdict.cuts == []
    assert {case.sizes["t"] for case in proved.reference._answers} == set(range(1, 13))


def test_the_sizes_of_a_few_are_compared_whatever_the_budget(tmp_path: Path) -> None:
    few = Axis(example=6, min=1, max=12)
    proved = Proved(Slow, version(batch=0, axes={"t": few}, cases=1, budget_s=1e-3), tmp_path)
    [hazard] = proved.verdict.hazards
    assert ": the trace runs other code than eager, and only 12 cases at 12 of 12 sizes were compared (" in str(hazard)


class OfTwo(nn.Module):
    """Asks twice: the first answer is without fault, the second is wrong for large values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.scaled(x)
        if torchvision._is_tracing():
            return x
        return x.clamp(max=3.0)

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_tracing():
            return torch.mul(x, 2)
        return x * 2


def test_the_question_is_named_whose_answer_makes_the_difference(tmp_path: Path) -> None:
    [hazard] = Proved(OfTwo, version(), tmp_path).verdict.hazards
    assert hazard.hazard == "asks-if-traced"
    assert hazard.where == f"tests/test_questions.py:{OfTwo.forward.__code__.co_firstlineno + 3}"
    reference = Reference(version(), OfTwo, "cpu", tmp_path)
    assert [found.code.co_name for found in questions.questions(reference, traced=True)] == ["forward", "scaled"]


def test_a_pass_on_few_of_many_sizes_is_none(tmp_path: Path) -> None:
    many = Axis(example=6, min=1, max=400)
    proved = Proved(Slow, version(batch=0, axes={"t": many}, cases=1, budget_s=1e-3), tmp_path)
    [hazard] = proved.verdict.hazards
    assert re.sub(r"about \d+ s", "about # s", str(hazard)) == (
        f"unproved: tests/test_questions.py:{ASKS}: the trace runs other code than eager, "
        "and only 16 cases at 16 of 400 sizes were compared (budget_s: 0.001; all take about # s)"
    )


def test_a_pass_on_few_sizes_can_be_accepted(tmp_path: Path) -> None:
    many = Axis(example=6, min=1, max=400)
    trace = {"cases": 1, "budget_s": 1e-3, "accept": {"unproved": "checked by hand"}}
    proved = Proved(Slow, version(batch=0, axes={"t": many}, **trace), tmp_path)
    assert proved.verdict.passed
    assert [(hazard.hazard, reason) for hazard, reason in proved.verdict.accepted] == [("unproved", "checked by hand")]


def test_a_pass_on_enough_of_many_sizes_says_how_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritonbuild.trial._OTHERWISE_ENOUGH", 16)
    many = Axis(example=6, min=1, max=400)
    proved = Proved(Slow, version(batch=0, axes={"t": many}, cases=1, budget_s=1e-3), tmp_path)
    assert proved.verdict.passed
    [cut] = proved.report["cuts"]
    assert re.sub(r"about \d+ s", "about # s", cut) == (
        f"the trace runs other code than eager at tests/test_questions.py:{ASKS}, "
        "and 16 cases at 16 of 400 sizes were compared (budget_s: 0.001; all take about # s)"
    )


def test_time_leaves_the_budget_alone_where_the_model_does_not_ask(tmp_path: Path) -> None:
    class Still(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.02)
            return x * x.shape[1]

    many = Axis(example=6, min=1, max=400)
    proved = Proved(Still, version(batch=0, axes={"t": many}, cases=1, budget_s=1e-3), tmp_path)
    assert proved.verdict.passed
    assert proved.verdict.cuts == []


def test_a_search_that_time_ended_says_for_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Escapes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.abs() + 1
            assert x.min() > 0
            return x

    axes = {"t": Axis(example=6, min=2, max=12)}
    proved = Proved(Escapes, version(axes=axes, budget_s=1e-9), tmp_path)
    assert proved.verdict.passed
    [cut] = proved.verdict.cuts
    where = f"tests/test_questions.py:{Escapes.forward.__code__.co_firstlineno + 2}"
    said = rf"\d further cases were tried for the value that leaves torch at {where}, then time ended \(\d+\.\d s\)"
    assert re.fullmatch(said, cut)
    # Where not the declared budget ended it, nothing is said aloud.
    monkeypatch.setattr("tritonbuild.trial._SEARCH_S", 0.0)
    proved = Proved(Escapes, version(axes=axes), tmp_path)
    assert proved.verdict.passed
    assert proved.verdict.cuts == []
    [note] = [note for note in proved.verdict.notes if "further cases" in note]
    assert re.fullmatch(said, note)
