"""One model version from its declaration to a proved file, in this process; `test_worker` has it in a child."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from declared import Declared, Project, loaded

from tritonbuild import trace, worker
from tritonbuild.candidates import Attempt
from tritonbuild.errors import BuildError, ProofError, TraceError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def run(declared: Declared) -> tuple[Path, dict[str, Any]]:
    """Run the trace; return the folder of results and proof.json."""
    out = declared.root / "out"
    out.mkdir()
    assert trace.run(declared.version, declared.root, out) == "cpu"
    return out, json.loads((out / "proof.json").read_text())


def failed(declared: Declared, kind: type[BuildError]) -> tuple[str, dict[str, Any]]:
    """Run a trace that fails; return the message with numbers of values as #, and proof.json, the only result."""
    out = declared.root / "out"
    out.mkdir()
    with pytest.raises(kind) as refused:
        trace.run(declared.version, declared.root, out)
    assert [path.name for path in out.iterdir()] == ["proof.json"]
    proof = json.loads((out / "proof.json").read_text())
    assert proof["verdict"] == "failed"
    assert proof["error"] == str(refused.value)
    text = str(refused.value).replace(declared.module, "{m}")
    return re.sub(r"-?\d+\.\d+(e[-+]\d+)?|\d+e[-+]\d+", "#", text), proof


def test_what_is_written(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    declared = project.declare(
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.f = nn.Linear(4, 3)

            def forward(self, x, mask):
                return {"out": self.f(x), "mean": x.mean(1), "rows": mask * 2}
        """,
        inputs={
            "mask": {"dtype": "int64", "shape": ["batch", "n"], "range": [0, 1]},
            "x": {"dtype": "float32", "shape": ["batch", 4]},
        },
        axes={"n": {"example": 3, "max": 6}},
        outputs=["rows", "out", "mean"],
    )
    said: list[str] = []
    out = declared.root / "out"
    out.mkdir()

    trace.run(declared.version, declared.root, out, said.append)

    names = sorted(path.name for path in out.iterdir())
    assert names == ["cases.safetensors", "model.pt", "proof.json", "signature.json"]
    assert (out / "signature.json").read_text() == json.dumps(
        {
            "forward": ["mask", "x"],
            "inputs": [
                {"dims": [-1], "dtype": "int64", "name": "mask"},
                {"dims": [4], "dtype": "float32", "name": "x"},
            ],
            "outputs": [
                {"dims": [-1], "dtype": "int64", "name": "rows", "source": "['rows']"},
                {"dims": [3], "dtype": "float32", "name": "out", "source": "['out']"},
                {"dims": [], "dtype": "float32", "name": "mean", "source": "['mean']"},
            ],
        },
        indent=2,
    ) + "\n"
    proof = json.loads((out / "proof.json").read_text())
    assert (proof["verdict"], proof["hazards"], proof["candidate"], proof["tried"]) == ("passed", [], "trace", [])
    assert proof["max_abs_error"] == {"rows": 0.0, "out": 0.0, "mean": 0.0}
    x, mask = torch.rand(3, 4), torch.ones(3, 5, dtype=torch.int64)
    module = loaded(out / "model.pt")
    with torch.no_grad():
        rows, _, mean = module(mask, x)
    assert torch.equal(rows, mask * 2)
    assert torch.equal(mean, x.mean(1))
    assert said == [
        f"building {declared.module}:Net on cpu",
        "making the TorchScript (trace)",
        "proving it (trace)",
    ]
    log = capsys.readouterr().out
    assert "output rows is ['rows']\n" in log
    assert "deprecated" not in log


def test_auto_finds_the_submodule_that_decides(project: Project) -> None:
    source = """
    class Pool(nn.Module):
        def forward(self, x: Tensor):
            if bool(x.max() > 2):
                return x * 3
            return x * 2

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = Pool()

        def forward(self, x):
            return self.pool(x), x.unbind(0)[0]
    """
    out, proof = run(project.declare(source, inputs={"x": [2, 4]}))

    assert proof["candidate"] == "trace with scripted pool"
    assert [attempt["candidate"] for attempt in proof["tried"]] == ["trace"]
    assert proof["tried"][0]["why_not"].startswith("branch-on-values: case ")
    assert torch.equal(loaded(out / "model.pt")(torch.full((2, 4), 3.0))[0], torch.full((2, 4), 9.0))


def test_auto_scripts_the_whole_where_the_model_itself_decides(project: Project) -> None:
    source = """
    class Net(nn.Module):
        def forward(self, x: Tensor):
            for i in range(x.shape[1]):
                x = x + x[:, i : i + 1]
            return x
    """
    declared = project.declare(source, inputs={"x": ["batch", "n"]}, axes={"n": {"example": 3, "max": 6}})
    _, proof = run(declared)
    assert proof["candidate"] == "script"
    assert proof["tried"][0]["why_not"].startswith("loop-over-length: case ")


def test_auto_scripts_what_the_proof_blames_where_nothing_warned(project: Project) -> None:
    """The whole cannot be scripted; torch.jit.trace has not warned about the submodule that decides."""
    source = """
    class Total(nn.Module):
        def forward(self, x: Tensor):
            total = torch.zeros_like(x[:, 0])
            for column in x.unbind(1):
                total = total * 2 + column
            return total

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.totals = nn.ModuleDict({"one": Total()})

        def forward(self, x, *more):
            return self.totals["one"](x)
    """
    axes = {"n": {"example": 3, "max": 6}}
    declared = project.declare(source, inputs={"x": ["batch", "n"]}, axes=axes)
    _, proof = run(declared)
    assert proof["candidate"] == "trace with scripted totals.one"
    assert proof["tried"][0]["why_not"].startswith("loop-over-length: ")
    attempt = Attempt(declared.measured(), declared.example(), ())
    attempt()
    assert attempt.warnings == []


def test_a_wrong_trace_does_not_pass(project: Project) -> None:
    source = """
    class Net(nn.Module):
        def forward(self, x):
            if x.shape[1] > 3:
                return x * 3
            return x * 2
    """
    axes = {"n": {"example": 3, "max": 6}}
    declared = project.declare(source, inputs={"x": ["batch", "n"]}, axes=axes, trace={"method": "trace"})
    text, proof = failed(declared, ProofError)
    assert text.splitlines()[0].startswith("trace m/1: branch-on-shape: case batch=")
    assert "{m}.py:7: " in text
    assert proof["hazards"][0]["hazard"] == "branch-on-shape"
    assert proof["candidate"] == "trace"
    assert len(text.splitlines()) == 2


def test_chance_that_only_training_has_is_not_blamed(project: Project) -> None:
    source = """
    class Net(nn.Module):
        def forward(self, x: Tensor):
            if self.training:
                x = x + torch.randn_like(x)
            x = x + torch.empty((), dtype=torch.float32).fill_(1)
            if torch.jit.is_scripting():
                return x * 3
            return x * 2
    """
    declared = project.declare(source, inputs={"x": ["batch", 3]}, trace={"method": "script"})
    text, _ = failed(declared, ProofError)
    assert text.startswith("trace m/1: asks-if-traced: case batch=")


def test_where_no_way_passes_each_is_named(project: Project) -> None:
    source = """
    class Net(nn.Module):
        def forward(self, x: Tensor):
            return x * self.scale(int(x.shape[1]))

        @torch.jit.unused
        def scale(self, n: int):
            return float(n)
    """
    axes = {"n": {"example": 3, "max": 6}}
    text, proof = failed(project.declare(source, inputs={"x": ["batch", "n"]}, axes=axes), ProofError)
    first, way_out, others = text.splitlines()
    assert first.startswith("trace m/1: ")
    assert "case batch=" in first
    assert way_out.startswith("    ")
    assert others.startswith("    also tried: script: ")
    assert [attempt["candidate"] for attempt in proof["tried"]] == ["trace", "script"]


def test_a_model_that_is_random_itself_is_tried_once(project: Project) -> None:
    source = """
    class Net(nn.Module):
        def forward(self, x: Tensor):
            return x + torch.rand_like(x)
    """
    text, proof = failed(project.declare(source), ProofError)
    assert text.startswith("trace m/1: nondeterministic: case ")
    assert [attempt["candidate"] for attempt in proof["tried"]] == ["trace"]


def test_an_output_without_axes_under_a_batch(project: Project) -> None:
    source = "class Net(nn.Module):\n    def forward(self, x):\n        return x.sum()\n"
    text, _ = failed(project.declare(source), ProofError)
    assert (
        text.splitlines()[0] == "trace m/1: scalar-output: case batch=2 draw=plain seed=0: output OUTPUT__0 has no axis"
    )


def test_a_forward_that_raises_is_said_with_inputs_and_line(project: Project) -> None:
    source = "class Net(nn.Module):\n    def forward(self, x, y):\n        return x.reshape(-1, 3) + y\n"
    text, proof = failed(
        project.declare(
            source, inputs={"y": {"dtype": "int64", "shape": ["batch"], "range": [0, 9]}, "x": ["batch", 4]}
        ),
        TraceError,
    )
    assert text == (
        "trace m/1: forward(y int64[2], x float32[2, 4]) raises RuntimeError: "
        "shape '[-1, 3]' is invalid for input of size 8 ({m}.py:6)"
    )
    assert proof["hazards"] == []


def test_a_number_for_which_a_table_has_no_row_is_told_with_the_ranges(project: Project) -> None:
    body = "return nn.functional.embedding(x, torch.ones(5, 2))"
    source = f"class Net(nn.Module):\n    def forward(self, x):\n        {body}\n"
    inputs = {"x": {"dtype": "int64", "shape": [9], "range": [5, 50]}}
    text, _ = failed(project.declare(source, inputs=inputs), TraceError)
    assert text == (
        "trace m/1: forward(x int64[9]) raises IndexError: index out of range in self ({m}.py:6)\n"
        "    narrow the range (x [5, 50]) to what the model takes, or mend the model"
    )


def test_a_float16_model_with_float32_inputs(project: Project) -> None:
    text, _ = failed(project.declare("def Net():\n    return nn.Linear(4, 4).half()\n"), TraceError)
    assert text.endswith("\n    the model is float16: declare x as float16")


def test_nothing_can_be_made(project: Project) -> None:
    source = """
    class Net(nn.Module):
        def forward(self, x, *more):
            if torch.jit.is_tracing():
                raise NotImplementedError("not while tracing")
            return x
    """
    text, _ = failed(project.declare(source), TraceError)
    assert text == (
        "trace m/1: the model cannot be traced: not while tracing ({m}.py:8)\n"
        "    also tried: script: the model cannot be scripted: Compiled functions can't take variable number of "
        "arguments or use keyword-only arguments with defaults ({m}.py:6)"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("device", "cuts"),
    [("auto", ["the TorchScript names the device cpu: it cannot be served on a GPU"]), ("cpu", [])],
)
def test_a_trace_that_names_the_cpu(
    device: str, cuts: list[str], project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    source = """
        class Net(nn.Module):
            def forward(self, x):
                return x + torch.arange(x.shape[1], device=x.device)
        """
    declared = project.declare(
        source, inputs={"x": ["batch", "n"]}, axes={"n": {"example": 3, "max": 6}}, device=device
    )
    _, proof = run(declared)
    assert (proof["verdict"], proof["cuts"]) == ("passed", cuts)


def test_a_name_that_torchscript_cannot_read(project: Project) -> None:
    source = """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.entrée = nn.Linear(4, 3)

            def forward(self, x):
                return self.entrée(x)
        """
    message, _ = failed(project.declare(source, trace={"method": "trace"}), TraceError)
    assert message == (
        'trace m/1: PyTorch cannot read the TorchScript that it wrote: the name "entrée" is not ASCII\n    rename it'
    )


def test_a_gpu_that_is_not_there(project: Project) -> None:
    text, proof = failed(project.declare(entry_point="torch.nn:Tanh", device="cuda"), TraceError)
    assert text == re.sub(
        r"\d+\.\d+",
        "#",
        f"trace m/1: device is cuda, but PyTorch {torch.__version__} finds no GPU here\n"
        "    use device: auto to trace on the CPU where there is no GPU, or install a PyTorch with CUDA",
    )
    assert proof["device"] == "cuda"


def test_children_give_the_same_bytes(project: Project, tmp_path: Path) -> None:
    """A bfloat16 model, scripted in part, in two children of the fork server."""
    declared = project.declare(
        """
        class Part(nn.Module):
            def __init__(self):
                super().__init__()
                self.f = nn.Linear(4, 4)

            def forward(self, x: Tensor):
                if bool(x.max() > 9):
                    return self.f(x)
                return x

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.part, self.g = Part(), nn.Linear(4, 4)
                self.bfloat16()

            def forward(self, x):
                return self.g(self.part(x))
        """,
        inputs={"x": [2, 4]},
        trace={"script": ["part"]},
    )
    digests = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        found = worker.run(declared.version, declared.root, tmp_path / name, tmp_path / f"{name}.log")
        digests.add(hashlib.sha256((tmp_path / name / "model.pt").read_bytes()).hexdigest())
        assert found.device == "cpu"
        assert "the model is bfloat16: float inputs are cast to it" in (tmp_path / f"{name}.log").read_text()
    assert len(digests) == 1


@pytest.mark.slow
def test_a_swin_transformer_of_any_size(project: Project) -> None:
    """Its trace answers wrong by 0.07 at other sizes, with generic warnings only."""
    declared = project.declare(
        entry_point="torchvision.models:swin_t",
        kwargs={"weights": None},
        inputs={"image": ["batch", 3, "height", "width"]},
        axes={axis: {"example": 64, "min": 32, "max": 128, "multiple_of": 32} for axis in ("height", "width")},
        max_batch_size=2,
        trace={"budget_s": 20},
    )
    _, proof = run(declared)
    assert proof["candidate"].startswith("trace with scripted features.1.0.attn, ")
    assert [attempt["candidate"] for attempt in proof["tried"]] == ["trace"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_detector(project: Project) -> None:
    declared = project.declare(
        entry_point="torchvision.models.detection:ssdlite320_mobilenet_v3_large",
        kwargs={"weights": None, "weights_backbone": None},
        inputs={"image": {"dtype": "float32", "shape": [3, "h", "w"], "range": [0, 1]}},
        axes={axis: {"example": 80, "min": 64, "max": 96} for axis in "hw"},
        outputs=["boxes", "scores", "labels"],
        trace={"method": "script", "budget_s": 60},
    )
    out, proof = run(declared)
    assert proof["candidate"] == "script"
    assert [x["dtype"] for x in json.loads((out / "signature.json").read_text())["outputs"]] == [
        "float32",
        "float32",
        "int64",
    ]
