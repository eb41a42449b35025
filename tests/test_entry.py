"""Entry points: fresh models, the same every time; and a text for everything that can be wrong before they run."""

from __future__ import annotations

import random
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from declared import Declared, Project

from tritonbuild.errors import TraceError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def message(declared: Declared) -> str:
    """Return the text of the refusal; `{m}` stands for the module."""
    with pytest.raises(TraceError) as refused:
        declared.builder()()
    return str(refused.value).removeprefix("trace m/1: ").replace(declared.module, "{m}")


NET = """
import random
import numpy as np

class Net(nn.Module):
    def __init__(self, width: int = 3, *, deep=False):
        super().__init__()
        if width < 0: raise ValueError("width is negative")
        self.f = nn.Linear(4, width)
        self.chance = (random.random(), float(np.random.rand()), self.training)
        torch.set_default_dtype(torch.float64)
        self.drop = nn.Dropout()

    def forward(self, x):
        return self.drop(self.f(x))
"""


def test_each_model_is_fresh_and_the_same(project: Project) -> None:
    build = project.declare(NET, kwargs={"width": 5}, seed=7).builder()
    one, two = build(), build()

    assert one.module is not two.module
    assert one.module.f.weight.shape == (5, 4)
    assert torch.equal(one.module.f.weight, two.module.f.weight)
    assert one.module.chance == two.module.chance
    assert not one.training
    assert not one.module.drop.training
    assert not any(parameter.requires_grad for parameter in one.parameters())
    other = project.declare(NET, seed=8, kwargs={"width": 5}).builder()()
    assert not torch.equal(one.module.f.weight, other.module.f.weight)
    assert one.module.chance[:2] != other.module.chance[:2]


def test_building_leaves_no_trace_in_the_process(project: Project) -> None:
    build = project.declare(NET + "\ntorch.set_default_device('meta')\ntorch.set_grad_enabled(False)\n").builder()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    build()
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert torch.get_default_dtype() is torch.float32
    assert torch.get_default_device().type == "cpu"
    assert torch.is_grad_enabled()


def test_kwargs_are_copies(project: Project) -> None:
    source = """
    class Net(nn.Linear):
        def __init__(self, sizes):
            super().__init__(4, sizes["list"].pop())
    """
    build = project.declare(source, kwargs={"sizes": {"list": [2, 3]}}).builder()
    assert [build().module.weight.shape[0] for _ in range(3)] == [3, 3, 3]


def test_dotted_attributes_functions_and_classes_from_src(project: Project) -> None:
    (project.root / "src").mkdir()
    declared = project.declare(
        """
        class Zoo:
            class Net(nn.Linear):
                pass

            @staticmethod
            def build(width):
                return nn.Sequential(nn.Linear(4, width))
        """,
        entry_point="Zoo.build",
        kwargs={"width": 2},
    )
    file = project.root / f"{declared.module}.py"
    file.rename(project.root / "src" / file.name)
    assert isinstance(declared.builder()().module, torch.nn.Sequential)


def test_the_projects_modules_win_over_installed_ones(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    (project.root / "colorsys.py").write_text("import torch\nNet = torch.nn.Tanh\n")
    assert isinstance(project.declare(entry_point="colorsys:Net").builder()().module, torch.nn.Tanh)
    sys.modules.pop("colorsys")


SOURCES = {
    "raises when it is imported": (
        "import json\n\njson.loads('{')\n",
        (
            'entry point "{m}:Net" raises JSONDecodeError: '
            "Expecting property name enclosed in double quotes: line 1 column 2 (char 1) ({m}.py:6)"
        ),
    ),
    "does not compile": (
        "class Net(nn.Module)\n    pass\n",
        "entry point \"{m}:Net\" raises SyntaxError: expected ':' ({m}.py, line 4) ({m}.py:4)",
    ),
    "imports what is not installed": (
        "import einopsy\n",
        "entry point \"{m}:Net\" raises ModuleNotFoundError: No module named 'einopsy' ({m}.py:4)",
    ),
    "exits": ("raise SystemExit(3)\n", 'entry point "{m}:Net" raises SystemExit: 3 ({m}.py:4)'),
    "has another attribute": (
        "class Nett(nn.Module):\n    pass\n",
        'entry point "{m}:Net": {m} has no "Net"; did you mean "Nett"?\n    its file is {m}.py',
    ),
    "is a model already": (
        "Net = nn.Linear(4, 4)\n",
        (
            'entry point "{m}:Net" is a Linear that exists already, expected a class or function that builds one\n'
            "    tracing needs fresh ones: return it from a function"
        ),
    ),
    "is no callable": (
        "Net = {'width': 3}\n",
        'entry point "{m}:Net" is a dict, expected a class or function that builds a torch.nn.Module',
    ),
    "raises when it is called": (
        "def Net():\n    return deeper()\n\ndef deeper():\n    nn.Linear(4, 4)(torch.ones(3))\n",
        'entry point "{m}:Net" raises RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x3 and 4x4) ({m}.py:8)',
    ),
    "raises with much to say": (
        "def Net():\n    raise ValueError('two\\nlines ' + 'and more ' * 100)\n",
        'entry point "{m}:Net" raises ValueError: two lines ' + ("and more " * 100)[:390] + "... ({m}.py:5)",
    ),
    "returns nothing": (
        "def Net():\n    nn.Linear(4, 4)\n",
        'entry point "{m}:Net" returned None, expected a torch.nn.Module',
    ),
    "returns two things": (
        "def Net():\n    return nn.Linear(4, 4), None\n",
        'entry point "{m}:Net" returned a tuple, expected a torch.nn.Module\n    return the model alone',
    ),
    "cannot be moved": (
        "class Net(nn.Linear):\n    def __init__(self):\n        super().__init__(4, 4, device='meta')\n",
        (
            "moving the model to cpu raises NotImplementedError: Cannot copy out of meta tensor; no data! Please use "
            "torch.nn.Module.to_empty() instead of torch.nn.Module.to() when moving module from meta to a "
            "different device."
        ),
    ),
    "is compiled": (
        "def Net():\n    return torch.compile(nn.Linear(4, 4))\n",
        (
            'entry point "{m}:Net" returned what torch.compile made, which cannot become TorchScript\n'
            "    return the model itself"
        ),
    ),
    "is lazy": (
        "def Net():\n    return nn.Sequential(nn.LazyLinear(4))\n",
        (
            'entry point "{m}:Net": the parameter 0.weight has no size before the first call\n'
            "    use the module that is not lazy, such as Linear for LazyLinear, or declare weights"
        ),
    ),
    "wants to download": (
        "import urllib.request\n\ndef Net():\n    urllib.request.urlopen('http://localhost:9/weights.pth')\n",
        (
            'entry point "{m}:Net" raises URLError: <urlopen error [Errno 111] Connection refused> ({m}.py:7)\n'
            "    nothing can be downloaded here; fetch the file elsewhere, declare weights: {path: ...}, and\n"
            "    leave out the kwarg that asks for the download"
        ),
    ),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_an_entry_point_that(kind: str, project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    source, expected = SOURCES[kind]
    found = message(project.declare(source))
    assert found == expected
    # The user's own traceback is in the log, for what one line cannot say.
    assert ("Traceback" in capsys.readouterr().out) == (" raises " in expected)


def test_a_module_that_does_not_exist(project: Project) -> None:
    (project.root / "networks.py").touch()
    assert message(project.declare(entry_point="network:Net")) == (
        'entry point "network:Net": no module "network"; did you mean "networks"?\n'
        "    looked in the project's folder (.) and in the installed packages"
    )
    (project.root / "src" / "zoo").mkdir(parents=True)
    (project.root / "src" / "zoo" / "__init__.py").touch()
    (project.root / "src" / "zoo" / "text.py").touch()
    sys.modules.pop("zoo", None)
    assert message(project.declare(entry_point="zoo.test:Net")) == (
        'entry point "zoo.test:Net": no module "zoo.test"; did you mean "zoo.text"?\n'
        "    looked in the project's folder (., src) and in the installed packages"
    )
    sys.modules.pop("zoo", None)


KWARGS = {
    "unknown": (
        {"widht": 3},
        (
            "kwargs do not fit Net(width=3, *, deep=False): got an unexpected keyword argument 'widht'; "
            'did you mean "width"?\n'
            "    kwargs are the entry point's keyword arguments"
        ),
    ),
    "of a wrong kind": (
        {"width": -3},
        'entry point "{m}:Net" raises ValueError: width is negative ({m}.py:11)',
    ),
}


@pytest.mark.parametrize("kind", KWARGS)
def test_kwargs(kind: str, project: Project) -> None:
    kwargs, expected = KWARGS[kind]
    assert message(project.declare(NET, kwargs=kwargs)) == expected


def test_a_missing_kwarg(project: Project) -> None:
    source = "class Net(nn.Linear):\n    def __init__(self, width):\n        super().__init__(4, width)\n"
    assert message(project.declare(source)) == (
        "kwargs do not fit Net(width): missing a required argument: 'width'\n"
        "    kwargs are the entry point's keyword arguments"
    )
