"""What Triton sees of a model: declared inputs, a flat tuple of tensors, eager, traced and scripted."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING

import pytest
import torch
from declared import Declared, Project, loaded
from hypothesis import given
from hypothesis import strategies as st

from tritonbuild import archive, wrap
from tritonbuild.candidates import Attempt
from tritonbuild.errors import TraceError
from tritonbuild.scripting import schema_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def flat(declared: Declared, tensors: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return declared.measured()()(*(tensors or declared.example()))


def torchscript(declared: Declared, how: str) -> torch.jit.ScriptModule:
    """Return what is shipped: made as the candidates do, written and loaded again."""
    attempt = Attempt(declared.measured(), declared.example(), () if how == "trace" else None)
    path = declared.root / f"{how}.pt"
    archive.write(attempt(), path)
    return loaded(path)


def assert_same(declared: Declared, module: torch.jit.ScriptModule, rows: int) -> None:
    tensors = tuple(torch.cat([x] * rows)[: 2 * rows - 1] for x in declared.example())
    with torch.no_grad():
        expected, got = declared.measured()()(*tensors), module(*tensors)
    assert isinstance(got, tuple)
    assert len(got) == len(expected)
    for one, two in zip(expected, got, strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)


RESULTS = {
    "tensor": ("def forward(self, x: Tensor):\n        return self.f(x)", [""]),
    "tuple": ("def forward(self, x: Tensor):\n        return self.f(x), x", ["[0]", "[1]"]),
    "one in a tuple": ("def forward(self, x: Tensor):\n        return (self.f(x),)", ["[0]"]),
    "list": ("def forward(self, x: Tensor):\n        return [self.f(x), x]", ["[0]", "[1]"]),
    "dict": ("def forward(self, x: Tensor):\n        return {'out': self.f(x), 'aux': x}", ["['out']", "['aux']"]),
    "dict with numbers": ("def forward(self, x: Tensor):\n        return {1: self.f(x), 0: x}", ["[1]", "[0]"]),
    "named tuple": ("def forward(self, x: Tensor):\n        return Pair(self.f(x), x)", [".first", ".second"]),
    "nested": (
        "def forward(self, x: Tensor):\n        return x, (Pair(self.f(x), x), [{'a': x + 1}])",
        ["[0]", "[1][0].first", "[1][0].second", "[1][1][0]['a']"],
    ),
    "none inside": (
        "def forward(self, x: Tensor) -> Tuple[Optional[Tensor], Tensor]:\n        return None, self.f(x)",
        ["[1]"],
    ),
    "optional": (
        "def forward(self, x: Tensor) -> Tuple[Optional[Tensor], Tensor]:\n        return x, self.f(x)",
        ["[0]", "[1]"],
    ),
    "a view, the input itself and a transposed one": (
        "def forward(self, x: Tensor):\n        return x[:, 1:3], x, self.f(x)[:, None].transpose(1, 2), x",
        ["[0]", "[1]", "[2]", "[3]"],
    ),
}
CLASS = """
class Pair(NamedTuple):
    first: Tensor
    second: Tensor

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)

    {forward}
"""


@pytest.mark.parametrize("how", ["trace", "script"])
@pytest.mark.parametrize("kind", RESULTS)
def test_results_become_a_flat_tuple(kind: str, how: str, project: Project) -> None:
    forward, paths = RESULTS[kind]
    declared = project.declare(CLASS.format(forward=forward))
    build = declared.measured()

    assert [source for _, source in build.interface.sources] == paths
    assert [name for name, _ in build.interface.sources] == [f"OUTPUT__{i}" for i in range(len(paths))]
    module = torchscript(declared, how)
    for rows in (1, 2):
        assert_same(declared, module, rows)


DATACLASSES = """
import dataclasses
from collections import OrderedDict

@dataclasses.dataclass
class Plain:
    logits: Tensor
    hidden: Optional[Tensor] = None

@dataclasses.dataclass
class ModelOutput(OrderedDict):  # transformers' are such a mixture
    logits: Tensor = None
    hidden: Tensor = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)

class Net(nn.Module):
    def forward(self, x):
        return {kind}(logits=x * 2)
"""


@pytest.mark.parametrize("kind", ["Plain", "ModelOutput"])
def test_dataclasses_and_model_outputs_become_a_flat_tuple(kind: str, project: Project) -> None:
    declared = project.declare(DATACLASSES.format(kind=kind), outputs=["logits"])

    assert declared.measured().interface.sources == (("logits", ".logits"),)
    assert_same(declared, torchscript(declared, "trace"), 2)


TENSORS = st.builds(lambda: torch.zeros(1))
KEYS = st.text(list("ab'\"\\].1 "), min_size=1, max_size=3)
STRUCTURES = st.recursive(
    TENSORS | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS | st.integers(0, 3), inner, max_size=3)
        | st.tuples(inner, inner).map(lambda pair: collections.namedtuple("Pair", "first second")(*pair))
    ),
    max_leaves=8,
)


@given(STRUCTURES)
def test_each_tensor_of_a_structure_is_found_once_at_its_path(structure: object) -> None:
    found = list(wrap.leaves(structure))
    for leaf in found:
        assert eval(f"structure{leaf.path}", {"structure": structure}) is leaf.value
    assert len({leaf.path for leaf in found}) == len(found)
    assert len(found) == str(structure).count("tensor(")


TWO = """
class Net(nn.Module):
    def forward(self, x: Tensor):
        return {"out": x + 1, "aux": x + 2}
"""


def test_names_that_are_keys_bind_by_key(project: Project) -> None:
    declared = project.declare(TWO, outputs=["aux", "out"])

    assert declared.measured().interface.sources == (("aux", "['aux']"), ("out", "['out']"))
    x = declared.example()[0]
    assert torch.equal(flat(declared)[0], x + 2)
    for how in ("trace", "script"):
        assert_same(declared, torchscript(declared, how), 2)


def test_some_of_the_keys_may_be_served(project: Project) -> None:
    declared = project.declare(TWO, outputs=["aux"])
    build = declared.measured()

    assert build.interface.sources == (("aux", "['aux']"),)
    assert build.interface.left_out == ("['out']",)
    for how in ("trace", "script"):
        module = torchscript(declared, how)
        assert_same(declared, module, 2)
        assert len(module(*declared.example())) == 1


def test_a_key_binds_though_what_is_not_served_has_no_name_of_its_own(project: Project) -> None:
    declared = project.declare(
        """
        class Net(nn.Module):
            def forward(self, x: Tensor):
                return {"layers": (x, x + 1), "out": x + 2}
        """,
        outputs=["out"],
    )
    build = declared.measured()

    assert build.interface.sources == (("out", "['out']"),)
    assert build.interface.left_out == ("['layers'][0]", "['layers'][1]")
    assert torch.equal(torchscript(declared, "trace")(*declared.example())[0], declared.example()[0] + 2)


def test_other_names_bind_by_order(project: Project) -> None:
    declared = project.declare(TWO, outputs=["first", "second"])
    assert declared.measured().interface.sources == (("first", "['out']"), ("second", "['aux']"))


def test_the_number_of_outputs_may_change_and_is_shown_as_it_is(project: Project) -> None:
    declared = project.declare(
        """
        class Net(nn.Module):
            def forward(self, x):
                return [x] * x.shape[0]
        """
    )
    flat_module = declared.measured()()
    assert [len(flat_module(torch.rand(rows, 4))) for rows in (2, 1, 3)] == [2, 1, 3]


@pytest.mark.parametrize("how", ["trace", "script"])
def test_more_entries_than_eager_had_raise_instead_of_being_lost(how: str, project: Project) -> None:
    declared = project.declare(
        """
        class Net(nn.Module):
            def forward(self, x: Tensor):
                found = {"a": x}
                if x.shape[0] > 2:
                    found["b"] = x
                return [found]
        """
    )
    module = torchscript(declared, how)
    if how == "script":
        with pytest.raises(torch.jit.Error, match="AssertionError"):
            module(torch.rand(3, 4))
    assert len(module(torch.rand(2, 4))) == 1


SCALAR = """
class Net(nn.Module):
    def forward(self, x: Tensor):
        return x.sum(), x
"""


@pytest.mark.parametrize("how", ["trace", "script"])
def test_an_output_without_axes_gets_one_where_there_is_no_batch(how: str, project: Project) -> None:
    declared = project.declare(SCALAR, inputs={"x": [2, 4]})
    assert [list(x.shape) for x in flat(declared)] == [[1], [2, 4]]
    assert [list(x.shape) for x in torchscript(declared, how)(*declared.example())] == [[1], [2, 4]]


@pytest.mark.parametrize("how", ["trace", "script"])
def test_with_a_batch_an_output_without_axes_stays_for_the_proof_to_refuse(how: str, project: Project) -> None:
    declared = project.declare(SCALAR)
    assert flat(declared)[0].dim() == 0
    assert torchscript(declared, how)(*declared.example())[0].dim() == 0


@pytest.mark.parametrize("how", ["trace", "script"])
def test_bfloat16_outputs_become_float32(how: str, project: Project) -> None:
    declared = project.declare(
        """
        class Net(nn.Module):
            def forward(self, x: Tensor):
                return x.to(torch.bfloat16), x.double(), x.half(), x > 0
        """
    )
    kinds = [torch.float32, torch.float64, torch.float16, torch.bool]
    assert [x.dtype for x in flat(declared)] == kinds
    assert_same(declared, torchscript(declared, how), 2)


BFLOAT16 = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.f = nn.Linear(4, 4)
        self.to(torch.bfloat16)

    def forward(self, x: Tensor, ids: Tensor):
        return self.f({x}) + self.embed(ids)
"""
MIXED_INPUTS = {
    "x": {"dtype": "float32", "shape": ["batch", 4]},
    "ids": {"dtype": "int64", "shape": ["batch"], "range": [0, 9]},
}


@pytest.mark.parametrize("how", ["trace", "script"])
def test_a_bfloat16_model_gets_its_float_inputs_cast(how: str, project: Project) -> None:
    declared = project.declare(BFLOAT16.format(x="x"), inputs=MIXED_INPUTS)
    build = declared.measured()

    assert build.interface.cast is torch.bfloat16
    x, ids = declared.example()
    with torch.no_grad():
        bare = build().module(x.bfloat16(), ids)
        assert torch.equal(flat(declared)[0], bare.float())
    assert_same(declared, torchscript(declared, how), 2)


@pytest.mark.parametrize("how", ["trace", "script"])
def test_a_bfloat16_model_that_takes_float32_is_left_alone(how: str, project: Project) -> None:
    declared = project.declare(BFLOAT16.format(x="(x * 3).to(torch.bfloat16)"), inputs=MIXED_INPUTS)
    assert declared.measured().interface.cast is None
    assert_same(declared, torchscript(declared, how), 2)


def test_a_model_of_several_dtypes_is_never_cast(project: Project) -> None:
    declared = project.declare(
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.f, self.g = nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4)

            def forward(self, x):
                return self.g(self.f(x).float())
        """
    )
    with pytest.raises(RuntimeError, match="must have the same dtype"):
        declared.measured()


REFUSED = {
    "int": (
        "return x, 3",
        (
            "output OUTPUT__1 ([1] of the result) is an int, expected a tensor\n"
            "    a trace would freeze it to the example's; compute it with torch and return a tensor"
        ),
    ),
    "text": (
        "return {'y': x, 'label': 'cat'}",
        (
            "output OUTPUT__1 (['label'] of the result) is a str, expected a tensor\n"
            "    return tensors only, in a module of your own around this one"
        ),
    ),
    "array": (
        "return x.numpy()",
        (
            "output OUTPUT__0 is a ndarray, expected a tensor\n"
            "    a trace would freeze it to the example's; compute it with torch and return a tensor"
        ),
    ),
    "nothing": ("return None", "the model returns nothing\n    forward must return at least one tensor"),
    "empty": ("return {'a': None}", "the model returns nothing\n    forward must return at least one tensor"),
    "complex": (
        "return torch.fft.fft(x)",
        (
            "output OUTPUT__0: complex64 cannot be served: no Triton type exists for it\n"
            "    use a real type with a last dim of 2, as torch.view_as_real gives"
        ),
    ),
    "uint16": (
        "return x.to(torch.uint16)",
        (
            "output OUTPUT__0: uint16 cannot be served: Triton's PyTorch backend refuses it when the model loads\n"
            "    use int32, which holds every uint16, and cast inside forward"
        ),
    ),
    "float8": (
        "return x.to(torch.float8_e4m3fn)",
        (
            "output OUTPUT__0: float8_e4m3fn cannot be served: no Triton type exists for it\n"
            "    use float16 or float32 and cast inside forward"
        ),
    ),
    "sparse": (
        "return x.to_sparse()",
        "output OUTPUT__0 is a sparse_coo tensor, expected a dense one\n    return y.to_dense()",
    ),
    "nested tensor": (
        "return torch.nested.nested_tensor([x[0], x[1]])",
        "output OUTPUT__0 is a nested tensor, expected a dense one\n    return y.to_padded_tensor(0.0)",
    ),
    "quantized": (
        "return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)",
        "output OUTPUT__0 is quantized (qint8)\n    return y.dequantize()",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_triton_cannot_carry_is_refused_with_the_way_out(kind: str, project: Project) -> None:
    statement, message = REFUSED[kind]
    declared = project.declare(f"class Net(nn.Module):\n    def forward(self, x):\n        {statement}\n")
    with pytest.raises(TraceError) as refused:
        declared.measured()
    assert str(refused.value) == f"trace m/1: {message}"


NAMED = {
    "too few": (
        ["a"],
        (
            "outputs declares 1 (a), the model returns 2: ['out'], ['aux']\n"
            "    name all in this order, or leave outputs out; of a dict or dataclass, keys alone may be named"
        ),
    ),
    "too many": (
        ["out", "aux", "more"],
        (
            "outputs declares 3 (out, aux, more), the model returns 2: ['out'], ['aux']\n"
            "    name all in this order, or leave outputs out; of a dict or dataclass, keys alone may be named"
        ),
    ),
    "a key on another place": (
        ["aux", "mask"],
        (
            "output \"aux\" would be ['out'] of the result, by order, but the result has ['aux']: ['out'], ['aux']\n"
            "    use the result's keys for all outputs, or for none"
        ),
    ),
}


@pytest.mark.parametrize("kind", NAMED)
def test_names_that_do_not_fit_the_result_are_refused(kind: str, project: Project) -> None:
    names, message = NAMED[kind]
    with pytest.raises(TraceError) as refused:
        project.declare(TWO, outputs=names).measured()
    assert str(refused.value) == f"trace m/1: {message}"


NAMES = {
    "plain": (["image", "mask"], ["image", "mask"]),
    "numbered": (["INPUT__0", "INPUT__1"], ["INPUT__0", "INPUT__1"]),
    "names of Python": (["input", "type"], ["input", "type"]),
    "no identifier": (["image.1", "mask"], ["input_0", "input_1"]),
    "a keyword": (["lambda", "mask"], ["input_0", "input_1"]),
    "a name that TorchScript needs": (["torch", "mask"], ["input_0", "input_1"]),
    "a name that TorchScript changes": (["inf", "mask"], ["input_0", "input_1"]),
    "the generated code's own": (["r", "r_0_0"], ["r", "r_0_0"]),
}


@pytest.mark.parametrize("how", ["trace", "script"])
@pytest.mark.parametrize("kind", NAMES)
def test_arguments_have_the_names_of_the_inputs(kind: str, how: str, project: Project) -> None:
    """Triton binds by argument name where all names fit, and by order otherwise: both must be the declared order."""
    names, arguments = NAMES[kind]
    declared = project.declare(
        """
        class Net(nn.Module):
            def forward(self, a: Tensor, b: Tensor):
                return a - 2 * b
        """,
        inputs={name: ["batch", 4] for name in names},
    )
    module = torchscript(declared, how)

    assert [argument.name for argument in schema_of(module).arguments[1:]] == arguments
    assert {str(argument.type) for argument in schema_of(module).arguments[1:]} == {"Tensor"}
    assert_same(declared, module, 2)


NET = """
class Net(nn.Module):
    def forward(self, x):
        return x
"""


@pytest.mark.parametrize("name", sorted(wrap._RESERVED))
def test_names_that_a_saved_torchscript_cannot_have_are_replaced(name: str, project: Project) -> None:
    declared = project.declare(NET, inputs={name: [2]})
    module = torchscript(declared, "trace")
    assert [argument.name for argument in schema_of(module).arguments[1:]] == ["input_0"]
