"""What is read from a graph: operators, devices, training mode, constants, and how two traces differ."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from tritonbuild import releases
from tritonbuild.candidates import quiet
from tritonbuild.graphs import Graph, changes

HERE = str(Path(__file__))


def traced(forward: Any, *inputs: torch.Tensor) -> Any:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return forward(x)

    with torch.no_grad(), quiet():
        return torch.jit.trace(Net().eval(), inputs or (torch.ones(2, 4),), check_trace=False)


def graph(forward: Any, *inputs: torch.Tensor) -> Graph:
    return Graph(traced(forward, *inputs))


def reloaded(module: Any) -> Any:
    buffer = io.BytesIO()
    with quiet():
        torch.jit.save(module, buffer)
        buffer.seek(0)
        return torch.jit.load(buffer)


@pytest.mark.parametrize(
    ("forward", "kind"),
    [
        (lambda x: x.sum() * torch.arange(0, x.shape[0] * 0.1, 0.1), "aten::arange"),
        (lambda x: x[(torch.arange(2) * (x.shape[0] / 3)).long()], "aten::to"),
        (lambda x: x * (torch.arange(4) < x.shape[1] ** 0.5), "aten::lt"),
        (lambda x: F.interpolate(x[None], scale_factor=0.7, recompute_scale_factor=True), "aten::floor"),
        (lambda x: x * x.shape[1] ** -0.5 + torch.arange(x.shape[1]) / x.shape[1], None),
        (lambda x: x[:, : (x.shape[1] + 1) // 2].reshape(-1, 2 * x.shape[0]), None),
        (lambda x: x * x.mean().floor() + torch.div(x, 0.3, rounding_mode="floor"), None),
    ],
)
def test_the_part_of_a_size_that_is_rounded_is_found(forward: Any, kind: str | None) -> None:
    for module in (traced(forward), reloaded(traced(forward))):
        found = Graph(module).rounded_size()
        assert (found.kind if found else None) == kind


def test_devices_are_found_with_their_line() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x + torch.zeros(4, device=x.device)

    found = graph(forward).devices()
    assert list(found) == ["cpu"]
    site = found["cpu"]
    assert site is None or (site.file, site.line) == (HERE, forward.__code__.co_firstlineno + 1)
    assert list(Graph(reloaded(traced(forward))).devices()) == ["cpu"]
    assert graph(lambda x: x * 2).devices() == {}


@pytest.mark.parametrize(
    ("forward", "random", "training"),
    [
        (lambda x: x + torch.rand_like(x), ["aten::rand_like"], []),
        (lambda x: F.dropout(x, 0.5, training=True), ["aten::dropout"], ["aten::dropout"]),
        (lambda x: F.dropout(x, 0.0, training=True), [], []),
        (lambda x: F.dropout(x, 0.5, training=False), [], []),
        (lambda x: F.batch_norm(x, None, None, training=True), ["aten::batch_norm"], ["aten::batch_norm"]),
        (lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4)), [], []),
        (lambda x: F.instance_norm(x[None]), [], []),
        (lambda x: F.rrelu(x, training=True), ["aten::rrelu"], ["aten::rrelu"]),
    ],
)
def test_chance_and_training_mode(forward: Any, random: list[str], training: list[str]) -> None:
    for found in (graph(forward), Graph(reloaded(traced(forward)))):
        assert [node.kind for node in found.random()] == random
        assert [node.kind for node in found.training()] == training


@torch.jit.script
def absolute(x: torch.Tensor) -> torch.Tensor:
    return x if bool(x.sum() > 0) else -x


@torch.jit.script
def doubled(x: torch.Tensor) -> torch.Tensor:
    while bool(x.sum() < 1):
        x = 2 * x + 1
    return x


@pytest.mark.parametrize(("forward", "branches"), [(absolute, True), (doubled, True), (torch.abs, False)])
def test_branches_and_loops(forward: Any, branches: bool) -> None:
    assert graph(forward).branches() is branches


def test_operators_that_a_server_needs_more_for() -> None:
    @torch.library.custom_op("graphs::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    found = graph(lambda x: twice(x))
    assert [node.kind for node in found.custom()] == ["graphs::twice"]
    boxes = graph(lambda x: torchvision.ops.nms(x, x[:, 0], 0.5))
    assert boxes.custom() == []
    plain = graph(lambda x: F.conv1d(x[None], torch.ones(3, 2, 1)).softmax(-1))
    assert plain.custom() == []
    assert "aten::softmax" in plain.operators
    assert graph(lambda x: nn.LSTM(4, 4)(x)[0]).has_lstm()


@pytest.mark.parametrize(
    ("forward", "kinds"),
    [
        (lambda x: x.view(x.shape[0], 2, 2), []),
        (lambda x: x.view(int(x.shape[0]), 2, 2), ["number"]),
        (lambda x: x + torch.tensor([float(i) for i in range(len(x))])[:, None], ["tensor"]),
        (lambda x: torch.stack(list(x.unbind(0))), ["repeated"]),
        (lambda x: torch.stack([x[i] for i in range(x.shape[0])]), ["repeated"]),
        (lambda x: x.sin() if x.shape[0] > 2 else x.cos(), ["other"]),
    ],
    ids=["none", "number", "tensor", "unbind", "loop", "branch"],
)
def test_how_two_traces_differ(forward: Any, kinds: list[str]) -> None:
    found = changes(graph(forward, torch.ones(2, 4)), graph(forward, torch.ones(5, 4)))
    assert sorted({change.kind for change in found}) == kinds
    for change in found:
        assert change.site
        assert (change.site.file, change.site.line) == (HERE, forward.__code__.co_firstlineno)
    if kinds == ["number"]:
        assert [(change.before, change.after) for change in found] == [(2, 5)]


# ---------------------------------------------------------------------------------------------------------- releases


def test_every_release_says_what_backs_it() -> None:
    table = json.loads((Path(releases.__file__).parent / "releases.json").read_text())
    assert next(iter(table["releases"])) == "23.01"
    assert releases.latest() == "26.10"
    for name, row in table["releases"].items():
        found = releases.find(name)
        assert found
        assert set(row["sources"]) <= set(table["sources"])
        assert row["unconfirmed"] or "recalled" not in row["sources"]
        assert found.torch is None or found.minor
        year, month = map(int, name.split("."))
        assert found.server == "2.59.1" if name == "25.07" else True
        assert int(found.server.split(".")[1]) == 30 + (year - 23) * 12 + month - 1 - ((year, month) >= (25, 7))


def test_the_month_before_is_in_the_images_of_may_and_june_2026() -> None:
    found = releases.find("26.05")
    assert found
    assert (found.torch, found.server, found.unconfirmed) == ("2.12.0a0+0291f960b6", "2.69.0", False)
    assert releases.find("19.01") is None


def test_a_newer_pytorch_is_a_warning() -> None:
    assert releases.newer_torch("26.08", "2.14.1") is None
    assert releases.newer_torch("26.07", "2.13.0") is None
    assert releases.newer_torch("26.07", "2.14.1+cu130") == (
        "PyTorch 2.14.1+cu130 traces for release 26.07, which has 2.13.0a0+9186a08b2c: an operator newer than that "
        "fails to load; trace with PyTorch 2.13"
    )
    assert releases.newer_torch("23.08", "2.6.0") == (
        "PyTorch 2.6.0 traces for release 23.08, which has 2.1.0a0+29c30b1, unconfirmed: an operator newer than that "
        "fails to load; trace with PyTorch 2.1"
    )
    assert releases.newer_torch("29.01", "2.14.1") == (
        "release 29.01 is not in the table (the newest there is 26.10): its PyTorch is not known"
    )
    assert releases.newer_torch("26.10", "2.14.1") == "the PyTorch of release 26.10 is not known"


def test_operators_that_a_release_lacks() -> None:
    polar = {"aten::linalg_polar", "aten::add"}
    assert releases.lacking("26.07", polar) == [("aten::linalg_polar", "2.14", False)]
    # 2.14.0a0 is a snapshot before 2.14: it may have the operator.
    assert releases.lacking("26.08", polar) == [("aten::linalg_polar", "2.14", True)]
    assert releases.lacking("26.07", {"aten::add"}) == []
    assert releases.lacking("29.01", polar) == []
