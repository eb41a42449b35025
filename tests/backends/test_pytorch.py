"""The embedded server's PyTorch backend against what was measured on NVIDIA's C++ backend.

Every model of the table is loaded into one real server, a few at a time, and asked; the tests below look at what came
back. A text ends in `...` where the C++ backend goes on with a backtrace of its own.
"""

from __future__ import annotations

import re
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import numpy as np
import pytest
import torch
import torchvision  # noqa: F401  registers torchvision::nms
import tritonclient.http
from torch import Tensor, nn
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tritonbuild import embedded, server
from tritonbuild.errors import ServerError

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")

FP32 = "FP32"
X4 = np.arange(4, dtype=np.float32)
TWO = {"x": X4, "y": np.ones(4, np.float32)}


class Sub(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x - 2 * y


class SubQ(nn.Module):
    def forward(self, q__1: Tensor, q__0: Tensor) -> Tensor:
        return q__1 - 2 * q__0


class SubArgs(nn.Module):
    def forward(self, *args: Tensor) -> Tensor:
        return args[0] - 2 * args[1]


class OptionalArgument(nn.Module):
    def forward(self, x: Tensor, y: Optional[Tensor] = None) -> Tensor:  # noqa: UP045  TorchScript reads it
        return x if y is None else y


class TupleArgument(nn.Module):
    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return x[0] + x[1]


class DictArgument(nn.Module):
    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        return tensors["x"] - 2 * tensors["y"]


class TensorAndDict(nn.Module):
    def forward(self, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return x + tensors["y"]


class ListArgument(nn.Module):
    def forward(self, tensors: list[Tensor]) -> Tensor:
        return tensors[0]


class Strings(nn.Module):
    def forward(self, words: list[str]) -> list[str]:
        return [word + "!" for word in words]


class NoForward(nn.Module):
    @torch.jit.export
    def infer(self, x: Tensor) -> Tensor:
        return x


class NoArgument(nn.Module):
    def forward(self) -> Tensor:
        return torch.ones(2)


class AnyOutput(nn.Module):
    """One model for all results that differ in what they are, chosen by the first element."""

    def forward(self, x: Tensor) -> Any:
        kind = int(x[0])
        out: Any = x
        if kind == 0:
            out = {"a": x}
        if kind == 1:
            out = None
        if kind == 2:
            out = 3
        if kind == 3:
            out = 3.0
        if kind == 4:
            out = "text"
        if kind == 5:
            out = [x, x]
        if kind == 6:
            out = (x, (x, x))
        if kind == 7:
            out = (x, {"a": x})
        if kind == 8:
            out = (x, None)
        if kind == 9:
            out = (x, 3)
        if kind == 10:
            out = (x, [x])
        if kind == 11:
            out = (x,)
        if kind == 12:
            out = (x, x.sum())
        if kind == 13:
            out = x.sum()
        if kind == 14:
            out = x.double()
        if kind == 15:
            out = x.to(torch.bfloat16)
        if kind == 16:
            out = x.to(torch.complex64)
        if kind == 17:
            out = x.to_sparse()
        if kind == 18:
            out = x[:0]
        if kind == 19:
            out = torch.stack([x, x]).t()
        if kind == 20:
            out = ["a", "b"]
        return out


class ListInTuple(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return x, [x]


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class NamedTupleOutput(nn.Module):
    def forward(self, x: Tensor) -> Pair:
        return Pair(x + 1, x + 2)


class Ints(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.int()


class Raising(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 100):
            raise ValueError("too large")
        return x


class SumRows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(0, keepdim=True)


class TwiceRows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(2, 0)


class Echo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0


class Scalars(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1)


class AllDtypes(nn.Module):
    def forward(
        self, a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor, g: Tensor, h: Tensor, i: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return a, b, c, d, e, f, g, h, i


class InferenceMode(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([x.is_inference()])


class Constant(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.full((4,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value


class Suppress(nn.Module):
    def forward(self, boxes: Tensor, scores: Tensor) -> Tensor:
        return torch.ops.torchvision.nms(boxes, scores, 0.5)


class Started(nn.Module):
    def forward(self, x__0: Tensor, start__1: Tensor) -> Tensor:
        return x__0 + 100 * start__1


class Ragged(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0)


@dataclass
class Subject:
    """A model, its config.pbtxt, the requests that it is sent."""

    module: nn.Module | Callable[[Path], None]
    inputs: str
    outputs: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    batch: int = 0
    extra: str = ""
    example: tuple[Tensor, ...] | None = None  # traced with it; None: scripted
    at_once: bool = False
    filename: str = "model.pt"
    versions: dict[int, nn.Module] = field(default_factory=dict)


def tensors(kind: str, text: str) -> str:
    """`x:FP32:4 y:INT64:2,3` as messages of config.pbtxt."""
    lines = []
    for tensor in text.split():
        name, dtype, dims, *more = tensor.split(":", 3)
        lines.append(f'{kind} {{ name: "{name}" data_type: TYPE_{dtype} dims: [{dims}] {" ".join(more)} }}\n')
    return "".join(lines)


def parameter(name: str, value: str) -> str:
    return f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}\n'


def junk(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def nothing(path: Path) -> None:
    """No file at all."""


ONE_IN, ONE_OUT = "x:FP32:4", "y:FP32:4"
MIX = "dynamic_batching { preferred_batch_size: [2] max_queue_delay_microseconds: 2000000 }"
ROWS = [{"x": np.full((1, 4), value, np.float32)} for value in (1, 2)]
VALUES = {
    "a": np.array([True, False]),
    "b": np.array([0, 255], np.uint8),
    "c": np.array([-128, 127], np.int8),
    "d": np.array([-(2**15), 2**15 - 1], np.int16),
    "e": np.array([-(2**31), 2**31 - 1], np.int32),
    "f": np.array([-(2**40), 2**40 + 1], np.int64),
    "g": np.array([0.1, 65504], np.float16),
    "h": np.array([0.1, np.nan], np.float32),
    "i": np.array([0.1, np.inf], np.float64),
}
DTYPES = " ".join(f"{name}:{np_to_triton_dtype(value.dtype)}:2" for name, value in VALUES.items())
DTYPES_OUT = re.sub(r"\b([a-i]):", r"\1_out:", DTYPES)

SUBJECTS = {
    # (a) inputs
    "by_name": Subject(Sub(), "y:FP32:4 x:FP32:4", ONE_OUT, [TWO]),
    "names_beat_index": Subject(
        SubQ(), "q__0:FP32:4 q__1:FP32:4", ONE_OUT, [{"q__1": X4, "q__0": np.ones(4, np.float32)}]
    ),
    "by_index": Subject(Sub(), "B__1:FP32:4 A__0:FP32:4", ONE_OUT, [{"A__0": X4, "B__1": np.ones(4, np.float32)}]),
    "empty_index": Subject(
        Sub(), "B__1:FP32:4 INPUT__:FP32:4", ONE_OUT, [{"INPUT__": X4, "B__1": np.ones(4, np.float32)}]
    ),
    "by_order": Subject(Sub(), "foo:FP32:4 bar:FP32:4", ONE_OUT, [{"bar": np.ones(4, np.float32), "foo": X4}]),
    "mixed_is_by_order": Subject(
        Sub(), "INPUT__1:FP32:4 x:FP32:4", ONE_OUT, [{"INPUT__1": X4, "x": np.ones(4, np.float32)}]
    ),
    "first_underscores_count": Subject(
        Sub(), "A__1__0:FP32:4 B__0:FP32:4", ONE_OUT, [{"A__1__0": X4, "B__0": np.ones(4, np.float32)}]
    ),
    "traced_args": Subject(
        SubArgs(),
        "argument_2:FP32:4 argument_1:FP32:4",
        ONE_OUT,
        [{"argument_1": X4, "argument_2": np.ones(4, np.float32)}],
        example=(torch.ones(4), torch.ones(4)),
    ),
    "one_based": Subject(Sub(), "INPUT__1:FP32:4 INPUT__2:FP32:4", ONE_OUT),
    "same_index": Subject(Sub(), "A__0:FP32:4 B__0:FP32:4", ONE_OUT, [{"A__0": X4, "B__0": X4}]),
    "count": Subject(Sub(), ONE_IN, ONE_OUT),
    "optional_argument": Subject(OptionalArgument(), ONE_IN, ONE_OUT),
    "tuple_argument": Subject(TupleArgument(), ONE_IN, ONE_OUT),
    "dict_argument": Subject(DictArgument(), "y:FP32:4 x:FP32:4", ONE_OUT, [TWO]),
    "dict_without_key": Subject(DictArgument(), "a:FP32:4 x:FP32:4", ONE_OUT, [{"a": X4, "x": X4}]),
    "tensor_and_dict": Subject(TensorAndDict(), "x:FP32:4 y:FP32:4", ONE_OUT),
    "list_argument": Subject(ListArgument(), ONE_IN, ONE_OUT, [{"x": X4}]),
    "strings": Subject(
        Strings(), "words:STRING:-1", "out:STRING:-1", [{"words": np.array([b"a", "\u00e9".encode()], np.object_)}]
    ),
    "optional_input": Subject(Sub(), "x:FP32:4 y:FP32:4:optional:true", ONE_OUT),
    "no_forward": Subject(NoForward(), ONE_IN, ONE_OUT),
    "no_argument": Subject(NoArgument(), ONE_IN, ONE_OUT, [{"x": X4}]),
    "asked_wrongly": Subject(
        Sub(),
        "x:FP32:4 y:FP32:4",
        ONE_OUT,
        [
            {"x": np.ones((2, 4), np.float32)},
            {**{name: np.ones((2, 4), np.float32) for name in "xy"}, "w": np.ones((2, 4), np.float32)},
            {"x": np.ones((2, 4), np.float64), "y": np.ones((2, 4), np.float32)},
            {"x": np.ones((2, 5), np.float32), "y": np.ones((2, 4), np.float32)},
            {name: np.ones((3, 4), np.float32) for name in "xy"},
        ],
        batch=2,
    ),
    # (b) outputs
    "any_output": Subject(AnyOutput(), ONE_IN, "y:FP32:99,99", [{"x": np.full(4, i, np.float32)} for i in range(21)]),
    "list_in_tuple": Subject(ListInTuple(), ONE_IN, ONE_OUT, [{"x": X4}]),
    "named_tuple": Subject(NamedTupleOutput(), ONE_IN, "OUTPUT__1:FP32:4", [{"x": X4}]),
    "mixed_outputs": Subject(NamedTupleOutput(), ONE_IN, "OUTPUT__1:FP32:4 foo:FP32:4", [{"x": X4}]),
    "same_output_twice": Subject(NamedTupleOutput(), ONE_IN, "A__0:FP32:4 B__0:FP32:4", [{"x": X4}]),
    "too_many_outputs": Subject(NamedTupleOutput(), ONE_IN, "a:FP32:4 b:FP32:4 c:FP32:4", [{"x": X4}]),
    "no_output": Subject(Echo(), ONE_IN, ""),
    "int32_as_string": Subject(Ints(), ONE_IN, "y:STRING:-1", [{"x": X4}]),
    # (c), (d) element types
    "bf16_input": Subject(Echo(), "x:BF16:4", ONE_OUT),
    "uint16_output": Subject(Echo(), ONE_IN, "y:UINT16:4"),
    "all_dtypes": Subject(AllDtypes(), DTYPES, DTYPES_OUT, [VALUES]),
    "fp64_into_float": Subject(
        nn.Linear(4, 2), "input:FP64:4", "y:FP64:2", [{"input": np.ones(4)}], example=(torch.ones(4),)
    ),
    # (e) rows
    "rows": Subject(Echo(), ONE_IN, ONE_OUT, ROWS, batch=2, extra=MIX, at_once=True),
    "sum_rows": Subject(SumRows(), ONE_IN, ONE_OUT, ROWS, batch=2, extra=MIX, at_once=True),
    "twice_rows": Subject(TwiceRows(), ONE_IN, ONE_OUT, ROWS, batch=2, extra=MIX, at_once=True),
    "one_bad_row": Subject(
        Raising(),
        ONE_IN,
        ONE_OUT,
        [{"x": np.full((1, 4), value, np.float32)} for value in (1, 99)],
        batch=2,
        extra=MIX,
        at_once=True,
    ),
    "scalar_per_row": Subject(
        Scalars(), ONE_IN, "y:FP32:1:reshape:{shape:[]}", [{"x": np.ones((3, 4), np.float32)}], batch=4
    ),
    # (h), files, parameters, instances
    "torchvision": Subject(
        Suppress(),
        "boxes:FP32:-1,4 scores:FP32:-1",
        "kept:INT64:-1",
        [
            {
                "boxes": np.array([[0, 0, 4, 4], [0, 0, 4, 5], [9, 9, 10, 10]], np.float32),
                "scores": np.array([0.1, 0.9, 0.5], np.float32),
            }
        ],
    ),
    "no_file": Subject(nothing, ONE_IN, ONE_OUT),
    "empty_file": Subject(junk(b""), ONE_IN, ONE_OUT),
    "other_filename": Subject(
        Constant(5.0), ONE_IN, ONE_OUT, [{"x": X4}], extra='default_model_filename: "net.pt"', filename="net.pt"
    ),
    "versions": Subject(
        Constant(1.0),
        ONE_IN,
        ONE_OUT,
        [{"x": X4, "": version} for version in ("1", "3", "")],
        extra="version_policy { all {} } instance_group { kind: KIND_MODEL count: 1 }",
        versions={3: Constant(3.0)},
    ),
    "inference_mode": Subject(
        InferenceMode(),
        ONE_IN,
        "inference:BOOL:1",
        [{"x": X4}],
        extra=parameter("INTRA_OP_THREAD_COUNT", "3x") + parameter("INTER_OP_THREAD_COUNT", "1") + parameter("A", "b"),
    ),
    "no_inference_mode": Subject(
        InferenceMode(),
        ONE_IN,
        "inference:BOOL:1",
        [{"x": X4}],
        extra="".join(
            parameter(name, value)
            for name, value in {
                "INFERENCE_MODE": "Off",
                "DISABLE_OPTIMIZED_EXECUTION": "1",
                "DISABLE_CUDNN": "true",
                "ENABLE_TENSOR_FUSER": "false",
                "ENABLE_JIT_PROFILING": "false",
                "ENABLE_JIT_EXECUTOR": "false",
                "ENABLE_CACHE_CLEANING": "true",
                "ENABLE_WEIGHT_SHARING": "true",
                "INTRA_OP_THREAD_COUNT": "0",
            }.items()
        ),
    ),
    "bad_bool": Subject(Echo(), ONE_IN, ONE_OUT, extra=parameter("INFERENCE_MODE", "yes")),
    "bad_int": Subject(Echo(), ONE_IN, ONE_OUT, extra=parameter("INTRA_OP_THREAD_COUNT", "abc")),
    "gpu_without_gpu": Subject(Echo(), ONE_IN, ONE_OUT, extra="instance_group { kind: KIND_GPU }"),
    "decoupled": Subject(Echo(), ONE_IN, ONE_OUT, extra="model_transaction_policy { decoupled: true }"),
    "sequence": Subject(
        Started(),
        "x__0:FP32:4",
        ONE_OUT,
        [{"x__0": np.ones((1, 4), np.float32), "#": 7}],
        batch=1,
        extra="sequence_batching { control_input { name: 'start__1' control "
        "{ kind: CONTROL_SEQUENCE_START fp32_false_true: [0, 1] } } }",
    ),
    "ragged": Subject(
        Ragged(), "x:FP32:-1:allow_ragged_batch:true", ONE_OUT, [{"x": np.ones((1, 4), np.float32)}], batch=2
    ),
}


def write(repository: Path, name: str, subject: Subject) -> None:
    """Put a subject into a model repository."""
    for version, module in {1: subject.module, **subject.versions}.items():
        path = repository / name / str(version) / subject.filename
        path.parent.mkdir(parents=True)
        if not isinstance(module, nn.Module):
            module(path)
        elif subject.example is not None:
            torch.jit.trace(module, subject.example).save(path)
        else:
            torch.jit.script(module).save(path)
    platform = f'name: "{name}"\nbackend: "pytorch"\nplatform: "pytorch_libtorch"\nmax_batch_size: {subject.batch}\n'
    io = tensors("input", subject.inputs) + tensors("output", subject.outputs)
    (repository / name / "config.pbtxt").write_text(f"{platform}{io}{subject.extra}\n")


def infer(url: str, model: str, request: dict[str, Any]) -> dict[str, np.ndarray] | str:
    """Return the outputs, or the code and the text of the error; "" is a version, "#" the number of a sequence."""
    version, sequence = request.get("", ""), request.get("#", 0)
    inputs = []
    for name, value in request.items():
        if name not in {"", "#"}:
            inputs.append(tritonclient.http.InferInput(name, value.shape, np_to_triton_dtype(value.dtype)))
            inputs[-1].set_data_from_numpy(value)
    client = tritonclient.http.InferenceServerClient(url)
    try:
        answer = client.infer(model, inputs, version, sequence_id=sequence, sequence_start=bool(sequence))
        outputs = [output["name"] for output in answer.get_response()["outputs"]]
        return {name: answer.as_numpy(name) for name in outputs}
    except InferenceServerException as error:
        return f"{error.status()} {error.message()}"
    finally:
        client.close()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Name of the subject -> the answers to its requests, or the text of the failed load."""
    folder = tmp_path_factory.mktemp("backend")
    for name, subject in SUBJECTS.items():
        write(folder / "models", name, subject)
    found: dict[str, Any] = {"log": ""}

    def ask(running: server.Server, name: str) -> None:
        try:
            running.load(name)
        except ServerError as error:
            found[name] = str(error).split("\n    log: ")[0].replace(str(folder), "")
            return
        subject = SUBJECTS[name]
        with ThreadPoolExecutor(2 if subject.at_once else 1) as at_once:
            found[name] = list(at_once.map(lambda request: infer(running.url, name, request), subject.requests))

    names = list(SUBJECTS)
    for i in range(0, len(names), 8):  # to unload models takes longer than to kill their server
        with server.embedded(folder / "models", folder / "build") as running, ThreadPoolExecutor(3) as threads:
            list(threads.map(lambda name: ask(running, name), names[i : i + 8]))
            assert running.log
            found["log"] = running.log.read_text()
    return found


def y(*values: float) -> dict[str, np.ndarray]:
    return {"y": np.array(values, np.float32)}


FAILURE = "500 PyTorch execute failure:"
INTERPRETER = f"{FAILURE} The following operation failed in the TorchScript interpreter.\nTraceback ... "
NOT_AN_OUTPUT = (
    f"{FAILURE} output must be of type Tensor, List[str] or Tuple containing one of these two types. "
    "It should not be a List / Dictionary of Tensors or a Scalar"
)
NOT_IN_A_TUPLE = f"{FAILURE} output at index 1 must be of type Tensor or List[str], received List[Tensor]"
NONE_TYPE = f"{FAILURE} forward() Expected a value of type 'Tensor' for argument 'y' but instead found type 'NoneType'."
NOT_A_LIST = (
    f"{FAILURE} forward() Expected a value of type 'List[Tensor]' for argument 'tensors' "
    "but instead found type 'Tensor'.\nPosition: 1\n ... "
)
TOO_MANY = (
    f"{FAILURE} forward() expected at most 1 argument(s) but received 2 argument(s). Declaration: "
    "forward(__torch__.tests.backends.test_pytorch.NoArgument self) -> Tensor"
)
NO_SUCH_OUTPUT = (
    "400 The output c in the model configuration refers to an output index which doesn't exist. "
    "This model has 2 outputs"
)
SPLIT = (
    "501 failed to split the output tensor 'y' in responses: expected batch size of at least 2 in model output, got 1"
)
ARGUMENT = (
    "An input of type '{}' was detected in the model. "
    "Only a single input of type Dict(str, Tensor) or input(s) of type Tensor are supported."
)
ID = "400 [request id: <id_unknown>]"
MISSING = (
    f"{ID} expected 2 inputs but got 1 inputs for model 'asked_wrongly'. "
    "Got input(s) ['x'], but missing required input(s) ['y']. Please provide all required input(s)."
)
UNKNOWN = (
    f"{ID} expected 2 inputs but got 3 inputs for model 'asked_wrongly'. "
    "Got input(s) ['w','y','x'], but missing required input(s) ]. Please provide all required input(s)."
)

RIGHT = [y(-2, -1, 0, 1)]  # x - 2 * y, with the arguments in their places

EXPECTED = {
    "by_name": RIGHT,
    "names_beat_index": RIGHT,
    "by_index": RIGHT,
    "empty_index": RIGHT,
    "by_order": RIGHT,
    "mixed_is_by_order": RIGHT,
    "first_underscores_count": RIGHT,
    "traced_args": RIGHT,
    "dict_argument": RIGHT,
    "one_based": "load one_based/1: the real server would crash at the first request: input 'INPUT__2' has index 2, "
    "forward's last argument 1",
    "same_index": [NONE_TYPE],
    "count": "load count/1: unable to load model 'count', configuration expects 1 inputs, model provides 2",
    "optional_argument": f"load optional_argument/1: {ARGUMENT.format('Tensor?')}",
    "tuple_argument": f"load tuple_argument/1: {ARGUMENT.format('(Tensor, Tensor)')}",
    "dict_without_key": [f"{INTERPRETER}RuntimeError: KeyError: y\n"],
    "tensor_and_dict": "load tensor_and_dict/1: Multiple inputs of kind DictType were detected. Only a single input of "
    "type Dict(str, Tensor) is supported.",
    "list_argument": [NOT_A_LIST],
    "strings": [{"out": np.array([b"a!", "\u00e9!".encode()], np.object_)}],
    "optional_input": "load optional_input/1: 'optional' is set to true for input 'y' while the backend model doesn't "
    "support optional input",
    "no_forward": "load no_forward/1: the real server would crash while it loads this model: "
    "Method 'forward' is not defined",
    "no_argument": [TOO_MANY],
    "asked_wrongly": [
        MISSING,
        UNKNOWN,
        f"{ID} inference input 'x' data-type is 'FP64', but model 'asked_wrongly' expects 'FP32'",
        f"{ID} unexpected shape for input 'x' for model 'asked_wrongly'. Expected [-1,4], got [2,5]. NOTE:  ... ",
        f"{ID} inference request batch-size must be <= 2 for 'asked_wrongly'",
    ],
    "any_output": [
        *[NOT_AN_OUTPUT] * 5,
        f"{FAILURE} output must be of type Tensor or List[str], received List[Tensor]",
        f"{FAILURE} Expected Tensor but got Tuple",
        f"{FAILURE} Expected Tensor but got GenericDict",
        f"{FAILURE} Expected Tensor but got None",
        f"{FAILURE} Expected Tensor but got Int",
        NOT_IN_A_TUPLE,
        y(11, 11, 11, 11),
        y(12, 12, 12, 12),
        "400 output 'y' is a scalar which is not supported.",
        "400 configuration expects datatype TYPE_FP32 for output 'y', model provides TYPE_FP64",
        "400 configuration expects datatype TYPE_FP32 for output 'y', model provides TYPE_<invalid>",
        "400 configuration expects datatype TYPE_FP32 for output 'y', model provides TYPE_<invalid>",
        "500 output tensor 'y' is not found",
        y(),
        {"y": np.full((4, 2), 19, np.float32)},
        {"y": np.array([b"a", b"b"], np.object_)},
    ],
    "list_in_tuple": [NOT_IN_A_TUPLE],
    "named_tuple": [{"OUTPUT__1": X4 + 2}],
    "mixed_outputs": [{"OUTPUT__1": X4 + 1, "foo": X4 + 2}],
    "same_output_twice": [{"A__0": X4 + 1, "B__0": X4 + 1}],
    "too_many_outputs": [NO_SUCH_OUTPUT],
    "no_output": "load no_output/1: model configuration must contain at least one output, none were specified.",
    "int32_as_string": [{"y": X4.astype(np.int32)}],
    "bf16_input": "load bf16_input/1: unsupported datatype TYPE_BF16 for input 'x' for model 'bf16_input'",
    "uint16_output": "load uint16_output/1: unsupported datatype TYPE_UINT16 for output 'y' for model 'uint16_output'",
    "all_dtypes": [{f"{name}_out": value for name, value in VALUES.items()}],
    "fp64_into_float": [
        f"{INTERPRETER}RuntimeError: mat1 and mat2 must have the same dtype, but got Double and Float\n"
    ],
    "rows": [{"y": np.full((1, 4), value, np.float32)} for value in (1, 2)],
    "one_bad_row": [f"{INTERPRETER}ValueError: too large\n"] * 2,
    "scalar_per_row": [{"y": np.full((3, 1), 4, np.float32)}],
    "torchvision": [{"kept": np.array([1, 2])}],
    "no_file": "load no_file/1: unable to find '/models/no_file/1/model.pt' for model instance 'no_file'",
    "empty_file": "load empty_file/1: failed to load model 'empty_file': "
    "PytorchStreamReader failed reading zip archive: not a ZIP archive. ... ",
    "other_filename": [{"y": X4 + 5}],
    "versions": [{"y": X4 + 1}, {"y": X4 + 3}, {"y": X4 + 3}],
    "inference_mode": [{"inference": np.array([True])}],
    "no_inference_mode": [{"inference": np.array([False])}],
    "gpu_without_gpu": "load gpu_without_gpu/1: instance group gpu_without_gpu_0 of model gpu_without_gpu has kind "
    "KIND_GPU but no GPUs are available",
    "bad_bool": "load bad_bool/1: failed to convert 'yes' to boolean",
    "bad_int": "load bad_int/1: failed to convert 'abc' to integral number",
    "decoupled": "load decoupled/1: model_transaction_policy.decoupled is not served by the embedded server; "
    "smoke this model with the docker server",
    "sequence": [{"y": np.full((1, 4), 101, np.float32)}],
    "ragged": [{"y": np.ones((1, 4), np.float32)}],
}

# Two requests that are one batch: which of them comes first is the scheduler's choice.
EITHER_FIRST = {"sum_rows", "twice_rows"}


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, str) and isinstance(found, str):
        start, gap, end = expected.partition(" ... ")
        return found.startswith(start) and found.endswith(end) if gap else found == expected
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return (
        isinstance(found, dict)
        and found.keys() == expected.keys()
        and all(found[name].dtype == value.dtype for name, value in expected.items())
        and all(
            np.array_equal(found[name], value, equal_nan=value.dtype.kind == "f") for name, value in expected.items()
        )
    )


def test_every_subject_has_an_expectation() -> None:
    assert SUBJECTS.keys() == EXPECTED.keys() | EITHER_FIRST


@pytest.mark.parametrize("name", EXPECTED)
def test_answers_as_measured_on_the_cpp_backend(answers: dict[str, Any], name: str) -> None:
    if name == "gpu_without_gpu" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert same(answers[name], EXPECTED[name]), answers[name]


def test_a_sum_over_the_batch_gives_one_request_the_sum_and_the_other_an_error(answers: dict[str, Any]) -> None:
    found, expected = answers["sum_rows"], [{"y": np.full((1, 4), 3, np.float32)}, SPLIT]
    assert same(found, expected) or same(found[::-1], expected), found


def test_rows_that_are_too_many_are_dropped_and_mixed_without_a_word(answers: dict[str, Any]) -> None:
    first, second = (answer["y"] for answer in answers["twice_rows"])
    assert np.array_equal(first, second), "both requests got rows of the one that came first"


def test_settings_of_the_process_are_logged(answers: dict[str, Any]) -> None:
    assert "Intra op thread count is set to 3 for model instance 'inference_mode'" in answers["log"]
    assert "Inter op thread count is set to 1 for model instance 'inference_mode'" in answers["log"]


def test_a_gpu_that_pytorch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that sees no GPU starts no instance on one: what such an instance does is called here."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", SimpleNamespace(TritonModelException=RuntimeError))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backend = runpy.run_path(f"{Path(embedded.__file__).parent}/backends/pytorch/model.py")
    assert backend["_device"]({"model_instance_kind": "CPU"}) == torch.device("cpu")
    with pytest.raises(RuntimeError) as raised:
        backend["_device"]({"model_instance_kind": "GPU", "model_instance_device_id": "0"})
    assert str(raised.value) == (
        f"the server found a GPU, which PyTorch {torch.__version__} cannot use; say device: cpu in pipeline.yaml, "
        "or hide it: CUDA_VISIBLE_DEVICES= doit"
    )
