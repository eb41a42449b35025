"""The judge, judged: by models whose truth brute force checks here, and by random models with one planted fault."""

from __future__ import annotations

import importlib
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import nn

from tritonbuild import archive, proof
from tritonbuild.candidates import candidates, quiet
from tritonbuild.entry import Builder
from tritonbuild.hazards import HAZARDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from tritonbuild.proof import Verdict
    from tritonbuild.spec import ModelVersion

CORPUS = Path(__file__).parent / "proof_corpus"
sys.path.insert(0, str(CORPUS))  # entry points are imported from there, by their names

import corpus  # noqa: E402
import truth  # noqa: E402

for _file in sorted(CORPUS.glob("*_*.py")):
    importlib.import_module(_file.stem)

WRONG = [model for model in corpus.MODELS if model.hazards]
RIGHT = [model for model in corpus.MODELS if not model.hazards]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Traced:
    """One model version, traced as the build traces it, with its bytes as they would be shipped."""

    def __init__(self, version: ModelVersion) -> None:
        self.version = version
        self.build = Builder(version, CORPUS, torch.device("cpu"))
        self.example = proof.example(version, "cpu", CORPUS)
        self.reference = proof.Reference(version, self.build, "cpu", CORPUS)
        _ = self.reference.example
        self.reference.forget()
        _, self.make = next(iter(candidates(version, self.build, self.example)))
        self.bytes = archive.canonical(self.make())

    def load(self) -> Any:
        return torch.jit.load(io.BytesIO(self.bytes))

    def proved(self) -> Verdict:
        warnings, traced = self.make.warnings, self.make.traced
        return proof.prove(self.version, self.build, self.load, "cpu", warnings, self.reference, traced=traced)


@pytest.mark.parametrize("model", WRONG, ids=lambda model: model.name)
def test_every_wrong_model_fails_with_its_hazard(model: corpus.Model) -> None:
    traced = Traced(model.version)
    verdict = traced.proved()
    assert not verdict.passed
    assert set(model.hazards) & {hazard.hazard for hazard in verdict.hazards}, list(map(str, verdict.hazards))
    for hazard in verdict.hazards:
        assert hazard.way_out == HAZARDS[hazard.hazard].way_out
        assert hazard.detail
    assert _wrong_by_brute_force(model, traced)


@pytest.mark.parametrize("model", RIGHT, ids=lambda model: model.name)
def test_every_right_model_passes(model: corpus.Model) -> None:
    traced = Traced(model.version)
    verdict = traced.proved()
    assert list(map(str, verdict.hazards)) == []
    assert verdict.passed
    assert verdict.cases >= 5
    assert truth.wrongs(model, traced.build, traced.load, rows=not model.delicate) == set()


def _wrong_by_brute_force(model: corpus.Model, traced: Traced) -> bool:
    if model.make.__name__ == "LstmFrozenState":  # running it at a larger batch ends the process
        with torch.backends.mkldnn.flags(enabled=False):
            return bool(truth.wrongs(model, traced.build, traced.load))
    if truth.wrongs(model, traced.build, traced.load):
        return True
    example = [tensor.clone() for tensor in traced.example]
    if model.by:
        return model.by(truth.Run(traced.build, example))
    assert model.shows, "random draws do not show it"
    shown = model.shows(*example)
    return not truth.equal(truth.call(traced.build(), shown), truth.call(traced.load(), shown))


def test_the_corpus_is_large_enough_and_names_most_hazards() -> None:
    named = {model.hazards[0] for model in WRONG}
    assert len(WRONG) >= 100
    assert len(RIGHT) >= 100
    assert len({model.name for model in corpus.MODELS}) == len(corpus.MODELS)
    # The rest needs another machine, another PyTorch or a bug of torch.jit; they have tests of their own.
    assert set(HAZARDS) - named == {
        "frozen-device",
        "torchscript-fails",
        "unstable-calls",
        "not-finite",
        "numeric-drift",
        "unknown-operator",
        "custom-operator",
        "unproved",
        "crash",
    }


# --------------------------------------------------------------------------------------------- random models, one fault

SAFE: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "linear": lambda m, x: m.linear(x),
    "norm": lambda m, x: m.norm(x),
    "relu": lambda m, x: x.relu() + 0.1 * x,
    "softmax": lambda m, x: x.softmax(-1),
    "attention": lambda m, x: (x @ x.transpose(1, 2) / 8).softmax(-1) @ x,
    "cumsum": lambda m, x: x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None],
    "convolution": lambda m, x: m.conv(x.transpose(1, 2)).transpose(1, 2),
    "centre": lambda m, x: x - x.mean(1, keepdim=True),
    "sort": lambda m, x: x.sort(-1).values,
    "roll": lambda m, x: torch.roll(x, 1, 1),
    "places": lambda m, x: x + m.table[: x.shape[1]],
    "heads": lambda m, x: x.view(x.shape[0], x.shape[1], 2, 4).flip(2).flatten(2),
    "mask": lambda m, x: torch.where(x > 0, x, 0.5 * x),
    "pool": lambda m, x: x + x.amax(1, keepdim=True),
    "gru": lambda m, x: m.gru(x)[0],
    "pad": lambda m, x: nn.functional.pad(x, (0, 0, 1, 1))[:, 1:-1],
    "half": lambda m, x: x[..., :4].repeat(1, 1, 2),
}


def _counted(m: nn.Module, x: Tensor) -> Tensor:
    m.calls += 1
    return x * m.calls


def _noise(m: nn.Module, x: Tensor) -> Tensor:
    return x + torch.rand(8)


FAULTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "branch-on-values": lambda m, x: x * 2 if x[0, 0, 0] > 0 else x * 3,
    "branch-on-shape": lambda m, x: x * 2 if x.shape[1] > 9 else x * 3,
    "loop-over-length": lambda m, x: sum(x[:, i : i + 1] * (i + 1) for i in range(x.shape[1])) + 0 * x,
    "frozen-batch": lambda m, x: x * int(x.shape[0]),
    "frozen-size": lambda m, x: x + torch.arange(int(x.shape[1]))[:, None],
    "frozen-value": lambda m, x: x / (1 + x[0].abs().max().item()),
    "training-mode": lambda m, x: nn.functional.dropout(x, 0.2, training=True),
    "nondeterministic": _noise,
    "state": _counted,
    "rows-mixed": lambda m, x: x - x.mean(0),
}


class Random(nn.Module):
    """Safe operations in a random order, and perhaps one fault, whose result is an output of its own."""

    def __init__(self, names: list[str], fault: str | None, at: int) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.table = nn.Parameter(torch.randn(16, 8))
        self.names, self.fault, self.at, self.calls = names, fault, at, 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        start = beside = x
        for i, name in enumerate(self.names):
            if self.fault and i == self.at % len(self.names):
                beside = FAULTS[self.fault](self, start + 0.01 * x.tanh())
            x = SAFE[name](self, x)
        return x, beside * 1.5


def _random_verdict(names: list[str], fault: str | None, at: int, weights: int) -> Verdict:
    version = corpus.declared(Random, {"x": "float32 batch t 8"}, {"t": (5, 1, 16)}, batch=6)

    def build() -> nn.Module:
        torch.default_generator.manual_seed(weights)
        return Random(names, fault, at).eval().requires_grad_(False)

    example = proof.example(version, "cpu", CORPUS)
    with torch.no_grad(), quiet():
        made = archive.canonical(torch.jit.trace(build(), example, check_trace=False))
    reference = proof.Reference(version, build, "cpu", CORPUS)
    return proof.prove(version, build, lambda: torch.jit.load(io.BytesIO(made)), "cpu", [], reference)


RANDOM = {
    "names": st.lists(st.sampled_from(sorted(SAFE)), min_size=1, max_size=7),
    "at": st.integers(0, 6),
    "weights": st.integers(0, 99),
}


@seed(0)
@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(**RANDOM)
def test_safe_operations_in_any_order_pass(names: list[str], at: int, weights: int) -> None:
    verdict = _random_verdict(names, None, at, weights)
    assert list(map(str, verdict.hazards)) == []


@seed(0)
@settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(fault=st.sampled_from(sorted(FAULTS)), **RANDOM)
def test_one_planted_fault_always_fails_under_its_name(fault: str, names: list[str], at: int, weights: int) -> None:
    verdict = _random_verdict(names, fault, at, weights)
    assert fault in {hazard.hazard for hazard in verdict.hazards}, list(map(str, verdict.hazards))
