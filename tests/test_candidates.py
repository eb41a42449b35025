"""TorchScripts to try: how each is made, what the tracer says, what is said when torch.jit cannot."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING

import pytest
import torch
from declared import Declared, Project, loaded

from tritonbuild import archive, candidates
from tritonbuild.candidates import Attempt, TracerWarning
from tritonbuild.errors import TraceError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def tried(declared: Declared) -> dict[str, torch.jit.ScriptModule | str]:
    """Make all candidates in order; return what each became, or why not."""
    found: dict[str, torch.jit.ScriptModule | str] = {}
    for description, make in candidates.candidates(declared.version, declared.measured(), declared.example()):
        try:
            made = make()
        except TraceError as error:
            found[description] = str(error).removeprefix("trace m/1: ").replace(declared.module, "{m}")
            continue
        path = declared.root / "model.pt"
        archive.write(made, path)
        found[description] = loaded(path)
    return found


def is_eager(declared: Declared, module: torch.jit.ScriptModule | str, *inputs: tuple[Tensor, ...]) -> list[bool]:
    assert not isinstance(module, str), module
    eager = declared.measured()()
    with torch.no_grad():
        return [
            all(torch.equal(one, two) for one, two in zip(eager(*tensors), module(*tensors), strict=True))
            for tensors in inputs
        ]


BRANCH = """
class Pool(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor):
        if bool((x > 0).all()):
            return self.f(x)
        return -self.f(x)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), Pool())
        self.pool = self.body[1]
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor):
        y = self.pool(x)
        return self.head(self.body(x) + y)
"""
POSITIVE, NEGATIVE = (torch.ones(2, 4),), (-torch.ones(3, 4),)


def test_auto_traces_then_scripts_the_guilty_then_all(project: Project) -> None:
    declared = project.declare(BRANCH)
    found = tried(declared)

    assert list(found) == ["trace", "trace with scripted body.1", "script"]
    trace, guilty, script = found.values()
    assert sorted(is_eager(declared, trace, POSITIVE, NEGATIVE)) != [True, True]
    assert is_eager(declared, guilty, POSITIVE, NEGATIVE) == [True, True]
    assert is_eager(declared, script, POSITIVE, NEGATIVE) == [True, True]


def test_a_submodule_is_scripted_wherever_the_model_holds_it(project: Project) -> None:
    declared = project.declare(BRANCH, trace={"method": "trace", "script": ["body.1"]})
    found = tried(declared)

    assert list(found) == ["trace with scripted body.1"]
    assert is_eager(declared, found["trace with scripted body.1"], POSITIVE, NEGATIVE) == [True, True]


@pytest.mark.parametrize(("method", "names"), [("trace", ["trace"]), ("script", ["script"])])
def test_a_declared_method_is_the_only_one(method: str, names: list[str], project: Project) -> None:
    assert list(tried(project.declare(BRANCH, trace={"method": method}))) == names


def test_a_function_with_its_own_gradient_is_traced_through(project: Project) -> None:
    declared = project.declare(
        """
        class Swish(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                assert ctx.needs_input_grad == (False,)
                return x * torch.sigmoid(x)

        class Scale(torch.autograd.Function):
            @staticmethod
            def forward(x, by):
                return x * by

            @staticmethod
            def setup_context(ctx, inputs, output):
                ctx.by = inputs[1]

        swish = Swish.apply

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.act = Swish.apply

            def forward(self, x: Tensor):
                return Swish.apply(x), Scale.apply(x, 3.0), swish(x), self.act(x)
        """
    )
    assert is_eager(declared, tried(declared)["trace"], POSITIVE, NEGATIVE) == [True, True]
    module = sys.modules[declared.module]
    assert module.swish.__self__ is module.Swish


def test_members_of_a_module_list_are_scripted_one_by_one(project: Project) -> None:
    declared = project.declare(
        """
        class Step(nn.Module):
            def forward(self, x: Tensor):
                if x.sum() > 0:
                    return x + 1
                return x - 1

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.steps = nn.ModuleList([Step(), Step()])

            def forward(self, x):
                for step in self.steps:
                    x = step(x)
                return x
        """,
        trace={"method": "trace", "script": ["steps"]},
    )
    (module,) = tried(declared).values()
    assert is_eager(declared, module, POSITIVE, NEGATIVE) == [True, True]


def test_of_nested_guilty_submodules_the_outermost_is_scripted(project: Project) -> None:
    declared = project.declare(
        """
        class Inner(nn.Module):
            def forward(self, x: Tensor):
                return x if x.sum() > 0 else -x

        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = Inner()

            def forward(self, x: Tensor):
                return self.inner(x) if x.max() > 2 else self.inner(x + 1)

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.outer = Outer()

            def forward(self, x):
                return self.outer(x)
        """
    )
    assert list(tried(declared)) == ["trace", "trace with scripted outer", "script"]
    assert candidates.outermost(["a.b", "a", "ab.c", "a.b", "ab"]) == ("a", "ab")


def test_each_warning_has_the_users_line_and_the_submodule(project: Project) -> None:
    declared = project.declare(
        """
        def helper(x):
            return float(x.mean())

        class Part(nn.Module):
            def forward(self, x):
                return x * helper(x)

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.parts = nn.Sequential(Part(), nn.BatchNorm1d(4))

            def forward(self, x):
                for row in x:
                    x = x + row
                return self.parts(x) + len(x) + nn.functional.interpolate(x[None], 4)[0]
        """
    )
    attempt = Attempt(declared.measured(), declared.example(), ())
    attempt()

    file = str(project.root / f"{declared.module}.py")
    assert [(warning.filename, warning.lineno, warning.module) for warning in attempt.warnings] == [
        (file, 18, ""),
        (file, 6, "parts.0"),
        (file, 20, ""),
    ]
    assert attempt.warnings[1].message == (
        "Converting a tensor to a Python float might cause the trace to be incorrect. We can't record the data flow of "
        "Python values, so this value will be treated as a constant in the future. This means that the trace might not "
        "generalize to other inputs!"
    )
    assert isinstance(attempt.warnings[0], TracerWarning)


def test_a_warning_in_another_library_is_kept(project: Project) -> None:
    """torch's own filter would drop torchvision's, whose name begins with torch."""
    declared = project.declare(
        entry_point="torchvision.models:swin_t", kwargs={"weights": None}, inputs={"image": ["batch", 3, 64, 64]}
    )
    attempt = Attempt(declared.measured(), declared.example(), ())
    attempt()
    assert {warning.module for warning in attempt.warnings} >= {"features.1.0.attn", "features.7.1.attn"}


def test_only_the_announcement_of_torch_jit_is_silenced(project: Project) -> None:
    declared = project.declare(
        """
        import warnings

        class Net(nn.Module):
            def forward(self, x):
                warnings.warn("`torch.jitter` is deprecated", FutureWarning)
                warnings.warn("old", DeprecationWarning)
                return x
        """
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        Attempt(declared.measured(), declared.example(), ())()
        with pytest.raises(TraceError):
            Attempt(declared.measured(), declared.example(), None)()
    assert {str(warning.message) for warning in seen} == {"`torch.jitter` is deprecated", "old"}


def test_each_candidate_is_made_from_a_fresh_model(project: Project) -> None:
    """A cache that the first call fills is empty when the trace begins, and the example stays what it was."""
    declared = project.declare(
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("calls", torch.zeros(1))

            def forward(self, x):
                self.calls += 1
                x += 1
                return x + self.calls
        """
    )
    build, example = declared.measured(), declared.example()
    build()(*example)
    before = [x.clone() for x in example]
    attempt = Attempt(build, example, ())
    made = attempt()
    assert made.module.calls.item() == 1
    assert torch.equal(example[0], before[0])
    assert attempt().module.calls.item() == 1


def test_random_constants_are_the_same_every_time(project: Project) -> None:
    declared = project.declare(
        """
        import random

        class Net(nn.Module):
            def forward(self, x):
                return x * random.random()
        """
    )
    build, x = declared.measured(), torch.ones(2, 4)
    one, two = (Attempt(build, (x,), ())()(x) for _ in range(2))
    assert torch.equal(one[0], two[0])


def test_what_cannot_be_scripted_is_said_with_its_line(project: Project) -> None:
    declared = project.declare(
        """
        class Net(nn.Module):
            def forward(self, x: Tensor):
                y = x + 1

                z = y.no_such_method()
                return z

        torch.Tensor.no_such_method = lambda self: self
        """,
        trace={"method": "script"},
    )
    assert tried(declared) == {
        "script": (
            "the model cannot be scripted: 'Tensor' object has no attribute or method 'no_such_method' ({m}.py:9)"
        )
    }


def test_a_submodule_that_cannot_be_scripted(project: Project) -> None:
    declared = project.declare(
        """
        class Part(nn.Module):
            def forward(self, x, *more):
                return x

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.part = Part()

            def forward(self, x):
                return self.part(x)
        """,
        trace={"script": ["part"], "method": "trace"},
    )
    assert tried(declared) == {
        "trace with scripted part": (
            'submodule "part" cannot be scripted: '
            "Compiled functions can't take variable number of arguments or use keyword-only arguments with defaults "
            "({m}.py:6)\n"
            "    script another submodule, or change its forward"
        )
    }


def test_what_cannot_be_traced_is_said_with_its_line(project: Project) -> None:
    declared = project.declare(
        """
        class Net(nn.Module):
            def forward(self, x):
                if torch.jit.is_tracing():
                    raise NotImplementedError("not while tracing")
                return x
        """,
        trace={"method": "trace"},
    )
    assert tried(declared) == {"trace": "the model cannot be traced: not while tracing ({m}.py:8)"}


def test_a_name_that_is_no_submodule(project: Project) -> None:
    with pytest.raises(TraceError) as refused:
        tried(project.declare(BRANCH, trace={"script": ["bodi.1"]}))
    assert str(refused.value) == (
        'trace m/1: trace: script: the model has no submodule "bodi.1"; did you mean "body.1"?\n'
        "    it has body, body.0, body.1, body.1.f, head"
    )


def test_a_model_without_submodules(project: Project) -> None:
    with pytest.raises(TraceError) as refused:
        tried(project.declare(entry_point="torch.nn:Tanh", trace={"script": ["pooling"]}))
    assert str(refused.value) == (
        'trace m/1: trace: script: the model has no submodule "pooling"\n'
        "    it has none; method: script scripts the whole model"
    )


SCRIPTED = {
    "googlenet": {"kwargs": {"weights": None, "aux_logits": False, "init_weights": False}},
    "segmentation.lraspp_mobilenet_v3_large": {
        "kwargs": {"weights": None, "weights_backbone": None},
        "outputs": ["out"],
    },
}
DETECTORS = {
    "ssdlite320_mobilenet_v3_large": {},
    "fasterrcnn_mobilenet_v3_large_320_fpn": {"box_score_thresh": 0.0},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCRIPTED)
def test_torchvision_models_that_return_more_when_scripted(name: str, project: Project) -> None:
    module, _, attribute = f"torchvision.models.{name}".rpartition(".")
    declared = project.declare(
        entry_point=f"{module}:{attribute}", inputs={"image": ["batch", 3, 64, 64]}, **SCRIPTED[name]
    )
    for made in tried(declared).values():
        assert is_eager(declared, made, declared.example(), (torch.rand(3, 3, 64, 64),)) == [True, True]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DETECTORS)
def test_torchvision_detectors_are_served_scripted(name: str, project: Project) -> None:
    """One image without a batch goes in as a list of one; the detections come out as three tensors."""
    declared = project.declare(
        entry_point=f"torchvision.models.detection:{name}",
        kwargs={"weights": None, "weights_backbone": None, **DETECTORS[name]},
        inputs={"image": {"dtype": "float32", "shape": [3, "h", "w"], "range": [0, 1]}},
        axes={axis: {"example": 96, "min": 64, "max": 128} for axis in "hw"},
        outputs=["boxes", "scores", "labels"],
        trace={"method": "script"},
    )
    build = declared.measured()
    assert build.interface.sources == (
        ("boxes", "[0]['boxes']"),
        ("scores", "[0]['scores']"),
        ("labels", "[0]['labels']"),
    )
    (module,) = tried(declared).values()
    assert is_eager(declared, module, declared.example(), (torch.rand(3, 64, 120),)) == [True, True]
