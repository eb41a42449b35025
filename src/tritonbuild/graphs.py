"""Decides what can be read from a TorchScript graph: devices, chance, training mode, operators, constants.

Hides inlining, blocks and the two ways in which torch writes a source range. What is read explains a failed proof and
tells the server's limits; alone it accuses nobody: right models name devices and hold constants, too.

Source: torch/csrc/jit (node kinds, `torch.jit.ScriptModule.inlined_graph`).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tritonbuild.monitors import Site, first_party

if TYPE_CHECKING:
    from collections.abc import Iterator

_BUILT_IN = frozenset({"aten", "prim", "quantized", "sparse", "prepacked", "mkldnn_prepacked", "profiler"})
_TORCHVISION = "torchvision"  # Triton's PyTorch backend links it

_RANDOM = frozenset(
    f"aten::{name}"
    for name in (
        *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "bernoulli_"),
        *("multinomial", "normal", "normal_", "uniform_", "uniform", "random_", "exponential_", "poisson", "rrelu"),
        *("geometric_", "cauchy_", "log_normal_", "_fused_dropout", "native_dropout"),
    )
)
# Kind -> (index of the flag that says training, index of the probability that makes it harmless at 0)
_TRAINING = {
    **{
        f"aten::{name}": (2, 1)
        for name in (
            *("dropout", "dropout_", "feature_dropout", "feature_dropout_", "alpha_dropout", "alpha_dropout_"),
            *("feature_alpha_dropout", "feature_alpha_dropout_"),
        )
    },
    "aten::batch_norm": (5, None),
    "aten::_batch_norm_impl_index": (5, None),
    "aten::rrelu": (3, None),
    **{f"aten::{name}": (6, 5) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
    "aten::scaled_dot_product_attention": (4, 4),
}
_SMOOTH = frozenset(
    f"aten::{name}"
    for name in (
        *("add", "sub", "rsub", "mul", "div", "reciprocal", "pow", "sqrt", "rsqrt", "exp", "log", "log2", "neg", "abs"),
        *("minimum", "maximum", "clamp", "to", "detach", "ScalarImplicit", "FloatImplicit"),
    )
)
"""What is computed of sizes without rounding to whole numbers."""
_FRACTIONS = frozenset(f"aten::{name}" for name in ("div", "reciprocal", "sqrt", "rsqrt", "exp", "log", "log2"))
_WHOLE = frozenset(
    f"aten::{name}"
    for name in (
        *("Int", "floor", "ceil", "round", "trunc", "frac", "floor_divide", "remainder", "fmod", "arange"),
        *("eq", "ne", "lt", "le", "gt", "ge"),
    )
)
"""What makes whole numbers, or truth, of fractions: a last bit decides."""
_INTEGERS, _FLOATS = frozenset(range(5)), frozenset((5, 6, 7, 15))
"""at::ScalarType: uint8 to int64; float16, float32, float64, bfloat16."""
_RANGE = re.compile(r'(?:File "(?P<f1>[^"]+)", line (?P<l1>\d+))|(?:^\s*(?P<f2>[^\s(][^(\n]*)\((?P<l2>\d+)\):)', re.M)


@dataclass(frozen=True)
class Node:
    """One node of the inlined graph.

    Attributes:
        kind: `aten::view`.
        constant: Value of a constant: number, text, list, or a digest of a tensor; None otherwise.
        inputs: Constants among its inputs, None where an input is computed.
        outputs: Number of outputs: an unpacked list has one per element.
        site: The line of model code that it comes from, if known.
        reads: Names of the values that go in.
        writes: Names of the values that come out.
    """

    kind: str
    constant: Any
    inputs: tuple[Any, ...]
    outputs: int
    site: Site | None
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


class Graph:
    """The nodes of a module's forward, submodules and functions inlined, in order."""

    def __init__(self, module: torch.jit.ScriptModule) -> None:
        try:
            graph = module.inlined_graph
        except RuntimeError:  # what cannot be inlined cannot run either: running says why
            graph = module.graph
        self.nodes = list(_nodes(graph))

    @property
    def operators(self) -> set[str]:
        """Kinds of all nodes."""
        return {node.kind for node in self.nodes}

    def devices(self) -> dict[str, Site | None]:
        """Devices that the graph names -> the first line that does."""
        found: dict[str, Site | None] = {}
        for node in self.nodes:
            if node.kind == "prim::Constant" and isinstance(node.constant, torch.device):
                found.setdefault(str(node.constant), node.site)
        return found

    def random(self) -> list[Node]:
        """Nodes that draw random numbers."""
        return [node for node in self.nodes if node.kind in _RANDOM or (node.kind in _TRAINING and _trains(node))]

    def training(self) -> list[Node]:
        """Nodes of dropout and normalisation that run in training mode."""
        return [node for node in self.nodes if node.kind in _TRAINING and _trains(node)]

    def custom(self) -> list[Node]:
        """Nodes that call an operator from outside PyTorch and torchvision."""
        return [node for node in self.nodes if node.kind.split("::")[0] not in _BUILT_IN and not self._vision(node)]

    def branches(self) -> bool:
        """Return whether what is run may depend on values: there are branches or loops."""
        return not {"prim::If", "prim::Loop"}.isdisjoint(self.operators)

    def rounded_size(self) -> Node | None:
        """Return a node that makes a whole number of a size that became a fraction; None if there is none.

        A fraction of a size is a float64 in Python and a float32 in a trace: `n * 0.29` at 100 is 28 in one, 29 in the
        other. Scripts compute as Python does, with numbers, not with tensors.
        """
        sizes: set[str] = set()
        fractions: set[str] = set()
        for node in self.nodes:
            read = set(node.reads)
            if node.kind == "prim::NumToTensor":
                sizes |= set(node.writes)
            elif read & fractions and (node.kind in _WHOLE or _to(node, _INTEGERS)):
                return node
            elif node.kind in _SMOOTH | _WHOLE and read & (sizes | fractions):
                divides = node.kind in _FRACTIONS and not any(isinstance(x, str) for x in node.inputs)  # rounding_mode
                fraction = divides or _to(node, _FLOATS) or any(isinstance(x, float) and x % 1 for x in node.inputs)
                (fractions if fraction or read & fractions else sizes).update(node.writes)
        return None

    def has_lstm(self) -> bool:
        """Return whether oneDNN's LSTM may run, which does not check the size of its initial state."""
        return "aten::lstm" in self.operators

    @staticmethod
    def _vision(node: Node) -> bool:
        return node.kind.split("::")[0] == _TORCHVISION


@dataclass(frozen=True)
class Change:
    """How the graphs of two traces at different sizes differ.

    Attributes:
        kind: `number`, `tensor`, `repeated` (one has more of the same nodes) or `other`.
        before: The constant in the first trace, of `number`.
        after: The constant in the second trace, of `number`.
        site: The line, if known.
    """

    kind: str
    before: Any = None
    after: Any = None
    site: Site | None = None


def changes(one: Graph, two: Graph) -> list[Change]:
    """Return how two traces of one model differ; empty if they are the same program."""
    # Equal constants are one node: only their users can be compared.
    first, second = ([node for node in graph.nodes if node.kind != "prim::Constant"] for graph in (one, two))
    if [node.kind for node in first] != [node.kind for node in second]:
        return [_structural(first, second)]
    found = []
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        # A list and its unpacking have no line of their own: their user has.
        site = next((node.site for node in first[i : i + 4] if node.site), None)
        if a.outputs != b.outputs or len(a.inputs) != len(b.inputs):
            found.append(Change("repeated", a.outputs, b.outputs, site))
            continue
        for x, y in zip(a.inputs, b.inputs, strict=True):
            if x != y and not (x is None or y is None):
                kind = "tensor" if isinstance(x, _Digest) or isinstance(y, _Digest) else "number"
                found.append(Change(kind, x, y, site))
    return found


def _structural(first: list[Node], second: list[Node]) -> Change:
    pairs = zip(first, second, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a.kind != b.kind), min(len(first), len(second)) - 1)
    longer = first if len(first) >= len(second) else second
    same = {node.kind for node in first} == {node.kind for node in second} and len(first) != len(second)
    return Change("repeated" if same else "other", len(first), len(second), longer[max(at, 0)].site)


def _trains(node: Node) -> bool:
    flag, probability = _TRAINING[node.kind]
    if len(node.inputs) <= flag or not node.inputs[flag]:
        return False
    return probability is None or node.inputs[probability] != 0


def _to(node: Node, dtypes: frozenset[int]) -> bool:
    dtype = node.inputs[1:3]  # of to(dtype), to(device, dtype)
    return node.kind == "aten::to" and any(type(number) is int and number in dtypes for number in dtype)


@dataclass(frozen=True)
class _Digest:
    shape: tuple[int, ...]
    sha256: str


def _nodes(block: Any) -> Iterator[Node]:
    constants: dict[str, Any] = {}
    yield from _walk(block, constants)


def _walk(block: Any, constants: dict[str, Any]) -> Iterator[Node]:
    for node in block.nodes():
        kind = node.kind()
        constant = _constant(node) if kind == "prim::Constant" else None
        if kind == "prim::Constant":
            constants[node.output().debugName()] = constant
        inputs = tuple(constants.get(value.debugName()) for value in node.inputs())
        reads, writes = (tuple(x.debugName() for x in values) for values in (node.inputs(), node.outputs()))
        yield Node(kind, constant, inputs, node.outputsSize(), _site(node), reads, writes)
        for inner in node.blocks():
            yield from _walk(inner, constants)


def _constant(node: Any) -> Any:
    if not node.hasAttribute("value"):
        return None
    value = node.output().toIValue()
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex():
            return value.item()
        data = value.detach().cpu().contiguous()
        raw = data.to(torch.float64).numpy().tobytes() if data.numel() < 2**20 else repr(data).encode()
        return _Digest(tuple(value.shape), hashlib.sha256(raw).hexdigest())
    return value


def _site(node: Any) -> Site | None:
    for match in _RANGE.finditer(node.sourceRange()):
        file, line = match["f1"] or match["f2"], match["l1"] or match["l2"]
        if first_party(file) and "__torch__" not in file:
            return Site(file, int(line))
    return None
