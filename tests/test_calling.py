"""How forward takes the declared inputs: by name, by order, or all in one container."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from declared import Project

from tritonbuild.errors import TraceError

if TYPE_CHECKING:
    from pathlib import Path

NET = """
import numpy as np

class Net(nn.Module):
    def forward(self, {signature}):
        return {result}
"""

RIGHT = {
    "by order": ("a, b", "a - 2 * b", ["first", "second"], "order", "x0 - 2 * x1"),
    "by name, in another order": ("a, b", "a - 2 * b", ["b", "a"], "names", "x1 - 2 * x0"),
    "by name, a default left out": ("a, scale=2.0, b=None", "a * scale - b", ["b", "a"], "names", "x1 * 2 - x0"),
    "by order, a default left out": ("a, b=None", "a * 3", ["x"], "order", "x0 * 3"),
    "keywords only, by name": ("a, *, b", "a - 2 * b", ["a", "b"], "names", "x0 - 2 * x1"),
    "positions only, by order": ("a, b, /", "a - 2 * b", ["b1", "a1"], "order", "x0 - 2 * x1"),
    "any number": ("*all", "all[0] - 2 * all[1]", ["a", "b"], "order", "x0 - 2 * x1"),
    "any name": ("a, **rest", "a - 2 * rest['b']", ["b", "a"], "names", "x1 - 2 * x0"),
    "any name, not used": ("a, **rest", "a * 3", ["image"], "order", "x0 * 3"),
    "a list": ("all: List[Tensor]", "all[0] - 2 * all[1]", ["a", "b"], "list", "x0 - 2 * x1"),
    "a list of today's typing": ("all: list[Tensor]", "all[0] - 2 * all[1]", ["a", "b"], "list", "x0 - 2 * x1"),
    "a list, and an option": (
        "images: List[Tensor], targets: Optional[List[Dict[str, Tensor]]] = None",
        "images[0] * 3",
        ["images"],
        "list",
        "x0 * 3",
    ),
    "a list that nothing announces": ("images", "torch.stack(images + [], 1)[:, 0] * 3", ["images"], "list", "x0 * 3"),
    "a tuple": ("pair: Tuple[Tensor, Tensor]", "pair[0] - 2 * pair[1]", ["a", "b"], "tuple", "x0 - 2 * x1"),
    "a dict": ("batch: Dict[str, Tensor]", "batch['a'] - 2 * batch['b']", ["b", "a"], "dict", "x1 - 2 * x0"),
    "optional tensors": (
        "a: Optional[Tensor], b: Tensor | None = None",
        "a - 2 * b",
        ["a", "b"],
        "names",
        "x0 - 2 * x1",
    ),
    "a hint that cannot be read": ("a: 'Missing', b: 'Missing'", "a - 2 * b", ["a", "b"], "names", "x0 - 2 * x1"),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_inputs_arrive_where_they_belong(kind: str, tmp_path: Path) -> None:
    signature, result, names, style, expected = RIGHT[kind]
    declared = Project(tmp_path).declare(
        NET.format(signature=signature, result=result), inputs={name: ["batch", 4] for name in names}
    )
    build = declared.measured()

    assert build.interface.style == style
    tensors = declared.example()
    with torch.no_grad():
        found = build()(*tensors)[0]
    if expected:
        assert torch.equal(found, eval(expected, {f"x{i}": x for i, x in enumerate(tensors)}))


WRONG = {
    "too few": (
        "a, b",
        ["image"],
        (
            "declares 1 input (image), but Net.forward(a, b) takes 2\n"
            "    declare one input per tensor that forward needs; with forward's own names they bind by name"
        ),
    ),
    "too many": (
        "a, b=None",
        ["x", "y", "z"],
        (
            "declares 3 inputs (x, y, z), but Net.forward(a, b=None) takes 1 to 2\n"
            "    declare one input per tensor that forward needs; with forward's own names they bind by name"
        ),
    ),
    "a keyword that must be given": (
        "a, *, b",
        ["x", "y"],
        (
            "declares 2 inputs (x, y), but Net.forward(a, *, b) takes 1, and b by name\n"
            "    declare one input per tensor that forward needs; with forward's own names they bind by name"
        ),
    ),
    "too few for any number": (
        "a, b, *rest",
        ["x"],
        (
            "declares 1 input (x), but Net.forward(a, b, *rest) takes at least 2\n"
            "    declare one input per tensor that forward needs; with forward's own names they bind by name"
        ),
    ),
    "a name on another place": (
        "a, b",
        ["b", "image"],
        (
            'input "b" is declared in place 0, which is "a" of Net.forward(a, b): '
            "not all names are forward's, so they bind by order\n"
            "    name all inputs as forward does (a, b), or none"
        ),
    ),
    "a number by its hint": (
        "a, k: int",
        ["a", "k"],
        (
            '"k" of Net.forward(a, k) is int; Triton carries tensors only\n'
            "    fix it when the model is built (kwargs), or write a module of your own around this one, "
            "whose forward takes tensors only"
        ),
    ),
    "text or nothing": (
        "a, text: Optional[str] = None",
        ["x", "y"],
        (
            '"text" of Net.forward(a, text=None) is Optional[str]; Triton carries tensors only\n'
            "    fix it when the model is built (kwargs), or write a module of your own around this one, "
            "whose forward takes tensors only"
        ),
    ),
    "an array": (
        "a: np.ndarray",
        ["x"],
        (
            '"a" of Net.forward(a) is ndarray; Triton carries tensors only\n'
            "    fix it when the model is built (kwargs), or write a module of your own around this one, "
            "whose forward takes tensors only"
        ),
    ),
    "a number by its default": (
        "a, scale=2.0",
        ["x", "y"],
        (
            '"scale" of Net.forward(a, scale=2.0) has the default 2.0; Triton carries tensors only\n'
            "    fix it when the model is built (kwargs), or write a module of your own around this one, "
            "whose forward takes tensors only"
        ),
    ),
    "a list beside others": (
        "a: List[Tensor], b: Tensor",
        ["a", "b"],
        (
            '"a" of Net.forward(a, b) is List[torch.Tensor], beside other arguments; Triton carries tensors only\n'
            "    write a module of your own around this one, whose forward takes tensors only"
        ),
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_forward_that_does_not_fit_is_refused_with_the_way_out(kind: str, tmp_path: Path) -> None:
    signature, names, message = WRONG[kind]
    declared = Project(tmp_path).declare(
        NET.format(signature=signature, result="a"), inputs={name: ["batch", 4] for name in names}
    )
    with pytest.raises(TraceError) as refused:
        declared.builder()()
    assert str(refused.value) == f"trace m/1: {message}"


def test_no_forward(tmp_path: Path) -> None:
    declared = Project(tmp_path).declare("class Net(nn.Module):\n    pass\n")
    with pytest.raises(TraceError) as refused:
        declared.builder()()
    assert str(refused.value) == (
        "trace m/1: Net has no forward\n    define forward(self, ...) on the module that is served"
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.:FutureWarning")
def test_an_entry_point_that_returns_torchscript(tmp_path: Path) -> None:
    declared = Project(tmp_path).declare(
        """
        class Net(nn.Module):
            def forward(self, a: Tensor, b: Tensor):
                return a - 2 * b

        def build():
            return torch.jit.script(Net())
        """,
        entry_point="build",
        inputs={"b": ["batch", 4], "a": ["batch", 4]},
    )
    b, a = declared.example()
    with torch.no_grad():
        assert torch.equal(declared.measured()()(b, a)[0], a - 2 * b)


def test_an_image_in_a_batch_for_a_detector(tmp_path: Path) -> None:
    """torchvision's detectors take a list of images; with a batch axis they say so themselves."""
    declared = Project(tmp_path).declare(
        entry_point="torchvision.models.detection:ssdlite320_mobilenet_v3_large",
        kwargs={"weights": None, "weights_backbone": None},
        inputs={"image": ["batch", 3, 64, 64]},
    )
    with pytest.raises(ValueError, match=r"list of 3d tensors of shape \[C, H, W\]"):
        declared.measured()
