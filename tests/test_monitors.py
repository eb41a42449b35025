"""What is seen while eager runs: escapes, ways, chance, and what a call leaves behind."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import sys
import threading
import time
from collections import deque
from datetime import date, datetime
from pathlib import Path
from typing import Any, ClassVar

import numpy
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from tritonbuild import cases, chance, memory, monitors
from tritonbuild.monitors import first_party, fork, observe

HERE = str(Path(__file__))
_GLOBAL: list[int] = []


def seen(forward: Any, *inputs: torch.Tensor) -> monitors.Observation:
    class Net(nn.Module):
        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            return forward(*args)

    module = Net()
    return observe(module, inputs, lambda: module(*inputs))


def test_model_code_is_not_torch_numpy_python_or_ours() -> None:
    assert first_party(HERE)
    assert first_party(torchvision.__file__)
    for file in (torch.__file__, numpy.__file__, random.__file__, cases.__file__, "<string>", "<frozen importlib>"):
        assert not first_party(str(file)), file


def test_what_leaves_torch_is_seen_with_its_line() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            x = x * x.max().item()
        torch.equal(x, x)
        x.numpy()
        return x + float(x[0]) + x.shape[0] + len(x) + x.dim()

    found = seen(forward, torch.ones(3)).escapes
    assert [(escape.kind, escape.name, escape.value) for escape in found] == [
        ("bool", "__bool__", True),
        ("number", "item", 1.0),
        ("bool", "equal", True),
        ("array", "numpy", None),
        ("number", "__float__", 1.0),
    ]
    first = forward.__code__.co_firstlineno
    assert [escape.site.line - first for escape in found if escape.site] == [1, 2, 3, 4, 5]
    assert found[0].site
    assert found[0].site.file == HERE


def test_sizes_read_in_python_are_no_escape() -> None:
    assert seen(lambda x: x.view(x.shape[0], x.numel() // len(x)), torch.ones(3, 2)).escapes == []


def test_numbers_of_the_code_are_collected() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        limit = torch.tensor(0.25)
        return torch.where(x > 0.75, x, limit) if x.shape[0] in (31, 37) else (x == limit)

    assert {0.75, 31, 37, 0.25} <= seen(forward, torch.ones(3)).numbers


def test_calls_of_chance_are_seen() -> None:
    found = seen(
        lambda x: nn.functional.dropout(x + torch.rand(3) + time.time(), 0.1, training=True) + torch.empty(3),
        torch.ones(3),
    )
    assert [name for name, _ in found.random] == ["rand"]
    assert [name for name, _ in found.dropout] == ["dropout"]
    assert [name for name, _ in found.unfilled] == ["empty"]
    assert [name for name, _ in found.clocks] == ["time"]


def test_reading_the_date_is_seen() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x + datetime.now().hour + date.today().year + time.localtime().tm_hour  # noqa: DTZ005, DTZ011

    found = seen(forward, torch.ones(3))
    assert [name for name, _ in found.clocks] == ["now", "today", "localtime"]


def test_variables_that_model_code_reads_are_seen() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        if "FIRST" in os.environ or os.getenv("SECOND") == "sum" or os.environ.get("THIRD", "no") == "yes":
            return x
        os.path.expandvars("$HOME")  # Python's own reading of it
        return x * 2

    found = seen(forward, torch.ones(3))
    assert [name for name, _ in found.environment] == ["FIRST", "SECOND", "THIRD"]
    assert {"sum", "yes"} <= found.texts


def test_an_input_changed_in_place_is_seen_with_its_line() -> None:
    def forward(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = x + 1
        y.view(-1)[0] = 3
        return z

    found = seen(forward, torch.ones(3), torch.ones(3)).in_place
    assert [i for i, _ in found] == [1]
    assert found[0][1]
    assert found[0][1].line == forward.__code__.co_firstlineno + 2


def test_depth_and_the_coarsest_dtype() -> None:
    linear = nn.Linear(3, 3)
    found = seen(lambda x: (linear(linear(x)).half() @ torch.ones(3, dtype=torch.float16)).double(), torch.ones(2, 3))
    assert found.depth == 3
    assert found.dtype == torch.float16


@pytest.mark.parametrize(
    ("forward", "kind", "line"),
    [
        (lambda x: x * 2 if x[0] > 0 else x * 3, "branch", 0),
        (lambda x: sum(x * i for i in range(int(x[0]) + 2)), "loop", 0),
        (lambda x: [x, x * 2][int(x[0]) // 2 + 1] * 2, None, 0),
        (lambda x: {1: torch.sin, -1: torch.cos}[int(x[0])](x), None, 0),
    ],
)
def test_the_line_where_two_calls_part(forward: Any, kind: str | None, line: int) -> None:
    found = fork(seen(forward, torch.tensor([1.0])), seen(forward, torch.tensor([-1.0])))
    if kind is None:
        assert found is None
        return
    assert found
    assert (found.kind, found.site.line) == (kind, forward.__code__.co_firstlineno + line)


def test_what_the_collector_runs_is_not_the_way_of_the_model() -> None:
    def collected(_phase: str, _info: dict[str, int]) -> None:
        pass

    def forward(x: torch.Tensor) -> torch.Tensor:
        for i in range(100):
            x = x + len([[i]])
        return x

    thresholds = gc.get_threshold()
    gc.callbacks.append(collected)
    gc.set_threshold(1)
    try:
        found = seen(forward, torch.ones(1))
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(collected)
    assert gc.isenabled()
    assert {code.co_name for code, _ in found.steps} == {"<lambda>", "forward"}


def test_a_while_loop_is_a_loop_and_an_exception_is_a_branch() -> None:
    def loop(x: torch.Tensor) -> torch.Tensor:
        while x.sum() < 10:
            x = x * 2
        return x

    def attempt(x: torch.Tensor) -> torch.Tensor:
        try:
            return x.view(2, -1)
        except RuntimeError:
            return x

    found = fork(seen(loop, torch.tensor([4.0])), seen(loop, torch.tensor([1.0])))
    assert found
    assert (found.kind, found.site.line) == ("loop", loop.__code__.co_firstlineno + 1)
    found = fork(seen(attempt, torch.ones(4)), seen(attempt, torch.ones(3)))
    assert found
    assert (found.kind, found.site.line) == ("branch", attempt.__code__.co_firstlineno + 2)


def test_an_if_at_the_end_of_a_loop_is_a_branch_and_the_loop_is_one() -> None:
    def last(x: torch.Tensor) -> torch.Tensor:
        for row in x:
            if row > 0:
                x = x + row
        return x

    def inner(x: torch.Tensor) -> torch.Tensor:
        while len(x) > 1:
            if x[0] > 0:
                x = x * 2
            x = x[1:]
        return x

    for function, line, kind in ((last, 2, "branch"), (inner, 2, "branch")):
        found = fork(seen(function, torch.ones(3)), seen(function, -torch.ones(3)))
        assert found
        assert (found.kind, found.site.line) == (kind, function.__code__.co_firstlineno + line)
    for function in (last, inner):
        found = fork(seen(function, torch.ones(3)), seen(function, torch.ones(4)))
        assert found
        assert (found.kind, found.site.line) == ("loop", function.__code__.co_firstlineno + 1)


def test_tracing_and_profiling_of_others_are_left_as_they_were() -> None:
    before = sys.gettrace(), sys.getprofile()
    seen(lambda x: x, torch.ones(1))
    assert (sys.gettrace(), sys.getprofile()) == before


# ------------------------------------------------------------------------------------------------ what a call leaves


class Everything(nn.Module):
    shared: list[int] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.register_buffer("buffer", torch.zeros(2))
        self.kept: dict[str, Any] = {}
        self.queue: deque[int] = deque(maxlen=2)
        self.generator = torch.Generator()
        self.random = random.Random(0)
        self.numpy = numpy.random.default_rng(0)
        self.array = numpy.zeros(3)
        self.part = nn.ModuleList([nn.Linear(2, 2)])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda m: setattr(m, "count", 1), "count"),
        (lambda m: m.buffer.add_(1), "buffer"),
        (lambda m: m.part[0].weight.mul_(2), "part.0.weight"),
        (lambda m: m.kept.update(a=torch.ones(1)), "kept"),
        (lambda m: m.queue.extend([1, 2, 3]), "queue"),
        (lambda m: torch.rand(1, generator=m.generator), "generator"),
        (lambda m: m.random.random(), "random"),
        (lambda m: m.numpy.random(), "numpy"),
        (lambda m: m.array.fill(3), "array"),
        (lambda m: m.shared.append(1), "Everything.shared"),
        (lambda m: _GLOBAL.append(1), f"{__name__}._GLOBAL"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_call_leaves_behind_is_found(change: Any, name: str) -> None:
    module = Everything()
    before = memory.state(module)
    assert memory.changed(before, memory.state(module)) == []
    with torch.no_grad():
        change(module)
    assert name in memory.changed(before, memory.state(module))


def test_a_copy_is_in_the_mode_of_its_model() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9))
    module = nn.Sequential(create_feature_extractor(net, ["1"])).eval()
    made = memory.copied(module)
    assert made is not None
    assert not any(part.training for part in made.modules())
    x = torch.ones(1, 2)
    assert torch.equal(made(x)["1"], module(x)["1"])
    module[0].train()
    again = memory.copied(module)
    assert again is not None
    assert [part.training for part in again.modules()] == [part.training for part in module.modules()]


def test_what_a_copy_would_share_is_not_copied() -> None:
    hooked, closed, locked = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    seen: list[torch.Tensor] = []
    hooked.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    closed.scale = lambda x: x * len(seen)  # type: ignore[assignment]
    locked.lock = threading.Lock()  # type: ignore[assignment]
    assert [memory.copied(nn.Sequential(module)) for module in (hooked, closed, locked)] == [None, None, None]


def test_the_state_of_every_global_generator_is_told() -> None:
    for draw in (lambda: torch.rand(1), random.random, lambda: numpy.random.rand()):
        memory.seed_all(3)
        before = memory.random_state()
        memory.seed_all(3)
        assert memory.random_state() == before
        draw()
        assert memory.random_state() != before


# ----------------------------------------------------------------------------------------------------------- chance


def reached(forward: Any) -> str | None:
    x = torch.arange(8.0)

    def run(seed: int, around: Any = None) -> tuple[torch.Tensor, ...]:
        memory.seed_all(seed)
        with around or contextlib.nullcontext():
            return (forward(x),)

    return chance.reaches(run, lambda a, b: torch.equal(a[0], b[0]), limit_s=1.0)


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x + torch.rand(8),
        lambda x: x * 2 if torch.rand(()) < 1e-9 else x,
        lambda x: x * 2 if random.random() < 1e-9 else x,
        lambda x: x * 2 if numpy.random.rand() < 1e-9 else x,
        lambda x: x + (torch.randint(0, 10**9, ()) == 10**9 - 1),
        lambda x: x + (torch.randn(()) > 4.5),
        lambda x: x + (torch.empty(()).uniform_(2, 3) < 2.00001),
        lambda x: x + (torch.empty(()).uniform_(to=3, **{"from": 2}) < 2.00001),
        lambda x: x + (torch.normal(x, 1.0) > x + 4.9),
        lambda x: x * torch.bernoulli(torch.full((8,), 1e-9)),
        lambda x: x + torch.empty(()).bernoulli_(1e-9),
        lambda x: nn.functional.dropout(x, 1e-9),
        lambda x: x[torch.randperm(8)],
    ],
)
def test_chance_that_reaches_the_output_is_found_however_rare(forward: Any) -> None:
    assert reached(forward)


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x + 0 * torch.rand(8),
        lambda x: x if torch.rand(()) < 2 else x * 2,
        lambda x: nn.functional.dropout(x, 0.0),
        lambda x: nn.functional.dropout(x, 0.5, training=False),
        lambda x: torch.empty(8).copy_(x),
        lambda x: x[torch.randperm(8)].sort().values,
        lambda x: x * torch.bernoulli(torch.ones(8)) + torch.empty(8).bernoulli_(0.0),
        lambda x: torch.normal(x, torch.zeros(8)) + torch.normal(x, 0.0) + torch.normal(0.0, torch.zeros(8)),
        lambda x: x if torch.rand((), dtype=torch.float16) < 1 else x * 2,
        lambda x: nn.init.normal_(torch.empty(8), mean=2.0, std=0.0) + x,
        lambda x: x if nn.init.uniform_(nn.Parameter(x), 1, 2).min() >= 1 else x * 2,
    ],
)
def test_chance_that_does_not_reach_the_output_is_no_hazard(forward: Any) -> None:
    assert reached(forward) is None


def test_what_copies_share_is_put_back() -> None:
    class Net(nn.Module):
        size: int | None = None
        table: ClassVar[dict[str, list[int]]] = {"kept": [1]}
        bias = torch.zeros(2)

        def forward(self, x: torch.Tensor, seen: list[int] = []) -> torch.Tensor:  # noqa: B006
            Net.size = len(x)
            Net.late = True  # type: ignore[attr-defined]
            Net.table["kept"].append(2)
            Net.table["new"] = []
            Net.bias += 1
            seen.append(1)
            _GLOBAL.append(1)
            return x

    module, before_all = Net(), [*_GLOBAL]
    shared, before = memory.Shared(module), memory.state(module)
    module(torch.ones(3))
    touched = memory.changed(before, memory.state(module))
    assert {name.rpartition(".")[2] for name in touched} >= {"size", "late", "table", "bias", "forward", "_GLOBAL"}

    shared.restore(touched)

    assert (Net.size, hasattr(Net, "late"), Net.table, Net.bias.tolist()) == (None, False, {"kept": [1]}, [0, 0])
    assert Net.forward.__defaults__ == ([],)
    assert before_all == _GLOBAL


@pytest.mark.parametrize(
    "draw",
    [lambda: torch.rand(1), lambda: numpy.random.rand(), random.random, lambda: random.gauss(0, 1), torch.seed],
)
def test_a_draw_after_seeding_is_noticed(draw: Any) -> None:
    memory.seed_all(5)
    assert not memory.drawn(5)
    torch.ones(3).sum()
    assert not memory.drawn(5)
    draw()
    assert memory.drawn(5)


def test_a_variable_reaches_an_output_or_does_not() -> None:
    def reached(forward: Any, texts: tuple[str, ...] = ()) -> str | None:
        return chance.environment_reaches(
            lambda *_: (torch.tensor(forward(os.environ)),), lambda a, b: torch.equal(a[0], b[0]), ["OF_A_TEST"], texts
        )

    text = "outputs differ when the environment variable OF_A_TEST is"
    assert reached(lambda env: float(env.get("OF_A_TEST", 1))) == f"{text} '0'"
    assert reached(lambda env: env.get("OF_A_TEST") == "sum", ("max", "sum")) == f"{text} 'sum'"
    assert reached(lambda env: env.get("OF_A_TEST") == "sum") is None
    assert reached(lambda env: len(env.get("OF_A_TEST", "")) < 99) is None
    assert "OF_A_TEST" not in os.environ


def test_a_later_date_reaches_an_output() -> None:
    def reached(forward: Any) -> str | None:
        return chance.clock_reaches(
            lambda *_: (torch.tensor(forward()),), lambda a, b: torch.equal(a[0], b[0]), {__file__}
        )

    assert reached(lambda: date.today().toordinal()) == "outputs differ when the call is made 3.4992e+06 s later"  # noqa: DTZ011
    assert reached(lambda: isinstance(datetime.now(), datetime)) is None  # noqa: DTZ005
