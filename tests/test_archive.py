"""Canonical archives: same model, same bytes; nothing that is computed with is lost."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision import models

from tritonbuild import archive
from tritonbuild.candidates import quiet

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NET = '''\
# {comment}
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        if x.shape[0] > 1:  # {comment}
            x = x + 1
        return nn.functional.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    """{comment}"""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*[Block(4) for _ in range(3)])
        self.register_buffer("shift", torch.arange(4.0).reshape(1, 4, 1, 1))

    def forward(self, x):
        return {{"out": self.blocks(x) + self.shift, "mean": x.mean((2, 3))}}
'''
MAKE = """\
import hashlib, sys, torch
from tritonbuild import archive
import net
with torch.no_grad():
    for script in (False, True):
        torch.manual_seed(0)
        model = net.Net().eval()
        if script:
            made = torch.jit.script(model)
        else:
            made = torch.jit.trace(model, torch.ones(2, 4, 8, 8), check_trace=False, strict=False)
        print(hashlib.sha256(archive.canonical(made)).hexdigest())
"""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


def traced(module: nn.Module, *inputs: Tensor) -> torch.jit.ScriptModule:
    with torch.no_grad():
        return torch.jit.trace(module.eval(), inputs, check_trace=False)


def load(data: bytes) -> torch.jit.ScriptModule:
    return torch.jit.load(io.BytesIO(data), map_location="cpu")


def test_three_processes_a_comment_and_another_folder_give_the_same_bytes(tmp_path: Path) -> None:
    """Sets are ordered differently in each process; line numbers and paths are in torch's own archive."""
    running = []
    for folder, comment in (("one", "a comment"), ("one", "a comment"), ("other/place", "two\n# lines of comment")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "net.py").write_text(NET.format(comment=comment))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        environment.pop("PYTHONHASHSEED", None)
        running.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", MAKE],
                cwd=tmp_path / folder,
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    found = [process.communicate()[0].split() for process in running]

    assert [len(digests) for digests in found] == [2, 2, 2]
    assert found[0] == found[1] == found[2]
    assert found[0][0] != found[0][1]


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1"])
@pytest.mark.parametrize("how", ["trace", "script"])
def test_torchvision_models_load_compute_the_same_and_grow_by_nothing(name: str, how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = getattr(models, name)(weights=None).eval()
    x, other = torch.rand(1, 3, 64, 64), torch.rand(3, 3, 80, 72)
    made = traced(model, x) if how == "trace" else torch.jit.script(model)

    path, own = tmp_path / "model.pt", tmp_path / "torch.pt"
    archive.write(made, path)
    made.save(str(own))

    again = torch.jit.load(path, map_location=torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(again(other), made(other))
        assert torch.equal(again(other), model(other))
    # What torch compresses is stored here; what is left out makes up for it, but for some hundred bytes a class.
    assert path.stat().st_size <= own.stat().st_size * 1.005
    assert sorted(tmp_path.iterdir()) == [path, own]


def test_entries_are_stored_aligned_timeless_and_free_of_records_nobody_computes_with() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    data = archive.canonical(traced(model, torch.rand(2, 3)))

    with zipfile.ZipFile(io.BytesIO(data)) as file:
        assert file.testzip() is None
        entries = file.infolist()
    names = [entry.filename for entry in entries]
    assert {name.partition("/")[0] for name in names} == {"model"}
    assert not [name for name in names if "debug" in name or "traced_inputs" in name or "serialization" in name]
    assert {entry.compress_type for entry in entries} == {zipfile.ZIP_STORED}
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    weights = [entry for entry in entries if entry.filename.startswith("model/data/")]
    assert len(weights) == 9
    for entry in weights:
        head = data[entry.header_offset :]
        start = entry.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        assert start % 64 == 0


@pytest.mark.filterwarnings("ignore")
def test_quantized_weights_survive() -> None:
    """They are C++ objects, whose namespace is an empty code file."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    x = torch.rand(3, 4)
    for made in (traced(model, x), torch.jit.script(model)):
        data = archive.canonical(made)
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            assert file.read("model/code/__torch__/torch/classes/quantized.py") == b""
        with torch.no_grad():
            assert torch.equal(load(data)(x), model(x))
        assert archive.canonical(made) == data


def test_numbers_in_class_names_do_not_count_what_the_process_compiled_before() -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    torch.manual_seed(0)
    model = Once()
    made = [traced(model, torch.rand(2, 4)) for _ in range(3)]

    assert "___torch_mangle_" in str(made[1].graph)
    assert str(made[1].graph) != str(made[2].graph)
    assert archive.canonical(made[1]) == archive.canonical(made[2])


def test_whatever_is_computed_with_changes_the_bytes() -> None:
    class Net(nn.Module):
        def __init__(self, scale: float, power: int, name: str) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("shift", torch.zeros(4))
            self.scale, self.power, self.name = scale, power, name

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) ** self.power * self.scale + self.shift

    def digest(change: str = "", scale: float = 1.5, power: int = 2) -> str:
        torch.manual_seed(0)
        net = Net(scale, power, "net")
        with torch.no_grad():
            if change == "weight":
                net.linear.weight[0, 0] = torch.nextafter(net.linear.weight[0, 0], torch.tensor(9.0))
            if change == "buffer":
                net.shift[3] = 1e-30
            if change == "dtype":
                net.shift = net.shift.double()
            if change == "shape":
                net.shift = net.shift.reshape(1, 4)
            if change == "stride":
                net.linear.weight = nn.Parameter(net.linear.weight.t().contiguous().t())
        return hashlib.sha256(archive.canonical(traced(net, torch.ones(2, 4)))).hexdigest()

    digest()  # the first trace of a process has classes without numbers
    same = [digest(), digest()]
    different = [digest(change) for change in ("weight", "buffer", "dtype", "shape", "stride")]
    different += [digest(scale=1.25), digest(power=3)]

    assert len(set(same)) == 1
    assert len({*same, *different}) == 1 + len(different)


def test_what_scripts_carry_survives() -> None:
    """Named tuples, dicts, functions, enums of strings, tied and empty tensors, text that looks like code."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = {"class A:": 1, "__torch__.torch.nn": 2}
            self.one = nn.Linear(3, 3)
            self.two = nn.Linear(3, 3)
            self.two.weight = self.one.weight
            self.register_buffer("empty", torch.empty(0, 3))
            self.register_buffer("view", torch.arange(12.0)[2:8].reshape(2, 3))

        def forward(self, x: Tensor, word: str = "class A:\ndef b(): pass") -> tuple[Tensor, int, str]:
            y = torch.cat([self.two(self.one(x)), self.empty, self.view * 2])
            return nn.functional.layer_norm(y, (3,)), self.words["class A:"], "__torch__.torch.nn.Linear" + word

    net = Net().eval()
    x = torch.rand(2, 3)
    again = load(archive.canonical(torch.jit.script(net)))

    with torch.no_grad():
        expected, got = net(x), again(x)
        assert torch.equal(got[0], expected[0])
        assert got[1:] == expected[1:]
        assert again.one.weight.data_ptr() == again.two.weight.data_ptr()
        again.one.weight.zero_()
        assert again.two.weight.abs().sum() == 0


LAYERS = st.sampled_from(
    [
        lambda: nn.Linear(4, 4),
        lambda: nn.Linear(4, 4, bias=False),
        lambda: nn.ReLU(),
        lambda: nn.LayerNorm(4),
        lambda: nn.BatchNorm1d(4),
        lambda: nn.Dropout(),
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
        lambda: nn.Linear(4, 4).double().float(),
        lambda: nn.PReLU(),
    ]
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(layers=st.lists(LAYERS, min_size=1, max_size=8), tie=st.booleans(), script=st.booleans(), seed=st.integers(0, 9))
def test_any_stack_of_layers_survives(layers: list, tie: bool, script: bool, seed: int) -> None:
    torch.manual_seed(seed)
    parts = [make() for make in layers]
    model = nn.Sequential(*parts, *(parts[:1] if tie else [])).eval()
    x = torch.rand(3, 4)
    made = torch.jit.script(model) if script else traced(model, x)

    data = archive.canonical(made)

    assert archive.canonical(made) == data
    again = load(data)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert again.training is False
    assert list(again.state_dict()) == list(made.state_dict())


def test_entries_beyond_four_gigabytes_have_64_bit_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same writer, with a limit that a small file passes: zipfile and torch must find everything."""
    monkeypatch.setattr(archive._Writer, "large", 1000)
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 4))
    x = torch.rand(2, 30)
    data = archive.canonical(traced(model, x))

    with zipfile.ZipFile(io.BytesIO(data)) as file:
        assert file.testzip() is None
        assert max(entry.file_size for entry in file.infolist()) == 2400
    assert b"PK\x06\x06" in data
    with torch.no_grad():
        assert torch.equal(load(data)(x), model(x))


def test_weights_are_streamed(tmp_path: Path) -> None:
    """Beside the model, a write needs far less memory than the model has."""
    code = """\
import resource, sys, torch
from pathlib import Path
from tritonbuild import archive
torch.set_grad_enabled(False)
small = torch.jit.script(torch.nn.Linear(4, 4))
archive.write(small, Path("small.pt"))
model = torch.jit.script(torch.nn.Linear(4096, 8192, bias=False))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
archive.write(model, Path("model.pt"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True
    )
    assert (tmp_path / "model.pt").stat().st_size > 4096 * 8192 * 4
    assert int(ran.stdout) < 32 * 1024  # KiB; the weights are 128 MiB
