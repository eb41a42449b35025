"""How a TorchScript model answers in the embedded server: exactly as in Triton's C++ PyTorch backend.

Triton's Python backend loads this file once per model instance, in a process of its own, for every model
whose backend is "pytorch". It hides nothing: rules, refusals, error texts and silent behaviours are those of
the C++ backend, measured on it (tritonserver 2.51.0, libtorch 2.13), so that a repository that passes here
passes there. What kills the C++ server is refused at load instead, with a text that says so.

Source: github.com/triton-inference-server/pytorch_backend, src/pt/model_state.cc (file, parameters),
    src/pt/model_instance_state.cc (inputs, outputs, execution);
    github.com/triton-inference-server/backend, src/backend_output_responder.cc (rows of a merged batch).
"""

from __future__ import annotations

import json
import re
import warnings
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

# torch dtype -> data_type in config.pbtxt; what is not here has no counterpart in the C++ backend's table
DTYPES = {torch.bool: "TYPE_BOOL", torch.uint8: "TYPE_UINT8", torch.int8: "TYPE_INT8", torch.int16: "TYPE_INT16"}
DTYPES |= {torch.int32: "TYPE_INT32", torch.int64: "TYPE_INT64"}
DTYPES |= {torch.float16: "TYPE_FP16", torch.float32: "TYPE_FP32", torch.float64: "TYPE_FP64"}

INDEXED = re.compile("(?:(?!__).)*__([0-9]*)")  # the first "__" counts, and no digits are index 0
BOOLEANS = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}


class RequestError(Exception):
    """A request that the C++ backend answers with an error, and the code of that error."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class TritonPythonModel:
    """One model instance: what the Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the TorchScript file and bind the tensors of config.pbtxt to it; raise what C++ refuses."""
        self.config = json.loads(args["model_config"])
        self.name = args["model_name"]
        self.max_batch_size = int(self.config.get("max_batch_size", 0))
        _refuse_what_only_docker_serves(self.config)
        self.parameters = _parameters(self.config.get("parameters", {}))
        _set_process(self.parameters, self.name)
        self.device = _device(args)
        self.model = self._load(args)
        self.inputs, self.keys = self._bind_inputs()
        self.outputs = self._bind_outputs()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer the requests with one forward call on their concatenation along dim 0."""
        try:
            with torch.inference_mode(self.parameters["INFERENCE_MODE"]), torch.no_grad():
                return self._split(self._forward(self._collect(requests)), requests)
        except RequestError as error:
            return [pb_utils.InferenceResponse(error=_error(error)) for _ in requests]
        finally:
            if self.parameters["ENABLE_CACHE_CLEANING"] and self.device != torch.device("cpu"):
                torch.cuda.empty_cache()

    def _load(self, args: dict[str, str]) -> torch.jit.ScriptModule:
        path = Path(args["model_repository"], args["model_version"], _filename(self.config, self.device))
        if not path.exists():
            raise _load_error(f"unable to find '{path}' for model instance '{self.name}'")
        load = partial(torch.jit.load, str(path), map_location=self.device)
        try:
            with warnings.catch_warnings(), torch.inference_mode(self.parameters["INFERENCE_MODE"]):
                warnings.filterwarnings("ignore", message=r"`torch\.jit\.load` is deprecated")
                try:
                    return load()  # type: ignore[no-any-return]
                except RuntimeError as error:
                    if "Unknown builtin op: torchvision::" not in str(error):
                        raise
                    with suppress(ImportError):  # C++ is linked with it; here it costs a second, so only on demand
                        import torchvision  # noqa: F401
                    return load()  # type: ignore[no-any-return]
        except RuntimeError as error:
            raise _load_error(f"failed to load model '{self.name}': {error}") from None

    def _bind_inputs(self) -> tuple[dict[str, int], list[str] | None]:
        """Return the position of each input among forward's arguments, and the keys of a dict argument."""
        if "forward" not in self.model._c._method_names():
            raise _load_error("the real server would crash while it loads this model: Method 'forward' is not defined")
        arguments = self.model._c._get_method("forward").schema.arguments
        if arguments and arguments[0].type.kind() == "ClassType":
            arguments = arguments[1:]
        declared = self.config.get("input", [])
        names = [tensor["name"] for tensor in declared]
        controls = _control_inputs(self.config)
        a_dict = len(arguments) == 1 and arguments[0].type.kind() == "DictType"
        if not a_dict and arguments:
            _check_arguments(arguments)
            if len(arguments) != (expected := len(declared) + len(controls)):
                counts = f"configuration expects {expected} inputs, model provides {len(arguments)}"
                raise _load_error(f"unable to load model '{self.name}', {counts}")
        if not declared:
            raise _load_error("model configuration must contain at least one input, none were specified.")
        self._check_types(declared, "input")
        for name in (tensor["name"] for tensor in declared if tensor.get("optional")):
            raise _load_error(
                f"'optional' is set to true for input '{name}' while the backend model doesn't support optional input"
            )
        if a_dict:
            return {name: i for i, name in enumerate(names)}, names
        allowed = [argument.name for argument in arguments]
        by_name = all(name in allowed for name in names)
        positions = {name: allowed.index(name) for name in names} if by_name else self._by_index(names, "input")
        positions |= controls
        if arguments and max(positions.values()) >= len(arguments):
            name = max(positions, key=lambda key: positions[key])
            why = f"input '{name}' has index {positions[name]}, forward's last argument {len(arguments) - 1}"
            raise _load_error(f"the real server would crash at the first request: {why}")
        return positions, None

    def _bind_outputs(self) -> dict[str, tuple[int, str]]:
        """Return position and data_type of each output, in the order in which the C++ backend visits them."""
        declared = self.config.get("output", [])
        if not declared:
            raise _load_error("model configuration must contain at least one output, none were specified.")
        self._check_types(declared, "output")
        positions = self._by_index([tensor["name"] for tensor in declared], "output")
        types = {tensor["name"]: tensor["data_type"] for tensor in declared}
        return {name: (positions[name], types[name]) for name in sorted(positions)}

    def _by_index(self, names: list[str], kind: str) -> dict[str, int]:
        """Bind by `<name>__<index>` if every name looks so, else by order in config.pbtxt."""
        indices = {}
        for name in names:
            index = INDEXED.fullmatch(name)
            if index is None:
                if "__" in name:
                    pb_utils.Logger.log_warn(
                        f"{kind} '{name}' or previous {kind}(s) of the model '{self.name}' do not follow the naming "
                        "convention <name>__<index>. Falling back to strict ordering from model configuration."
                    )
                return {name: order for order, name in enumerate(names)}
            indices[name] = int(index[1] or 0)
        return indices

    def _check_types(self, declared: list[dict[str, Any]], kind: str) -> None:
        for tensor in declared:
            name, data_type = tensor["name"], tensor["data_type"]
            if data_type not in {*DTYPES.values(), "TYPE_STRING"}:
                raise _load_error(f"unsupported datatype {data_type} for {kind} '{name}' for model '{self.name}'")
            shape = tensor["reshape"]["shape"] if "reshape" in tensor else tensor["dims"]
            if data_type == "TYPE_STRING" and len(shape) + (self.max_batch_size > 0) > 1:
                raise _load_error(
                    f"Triton only supports 1 dimensional List of String as {kind} for '{name}' for model '{self.name}'"
                )

    def _collect(self, requests: list[Any]) -> list[Any]:
        """Concatenate the inputs of all requests; return forward's arguments."""
        total = sum(_rows(request) for request in requests) if self.max_batch_size else len(requests)
        if total not in (0, 1) and total > self.max_batch_size:
            text = f"batch size {total} for '{self.name}', max allowed is {self.max_batch_size}"
            raise RequestError(text, pb_utils.TritonError.INTERNAL)
        ragged = {tensor["name"] for tensor in self.config["input"] if tensor.get("allow_ragged_batch")}
        parts: dict[str, list[Any]] = {}
        for request in requests:
            for tensor in request.inputs():
                parts.setdefault(tensor.name(), []).append(tensor.as_numpy())
        arguments: list[Any] = [None] * len(parts)
        for name, arrays in parts.items():
            if arrays[0].dtype == np.object_:
                value: Any = [item.decode() for array in arrays for item in array.ravel()]
            else:
                if name in ragged:
                    arrays = [array.ravel() for array in arrays]  # noqa: PLW2901
                array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
                value = torch.from_numpy(array)
                if self.device is not None:
                    value = value.to(self.device)
            arguments[self.inputs[name]] = value
        if self.keys is not None:
            return [{name: arguments[self.inputs[name]] for name in self.keys}]
        return arguments

    def _forward(self, arguments: list[Any]) -> list[Any]:
        """Run the model; return its outputs, each a tensor or a list of strings."""
        schema = self.model._c._get_method("forward").schema
        plain = self.parameters["DISABLE_OPTIMIZED_EXECUTION"]
        optimized = torch.jit.optimized_execution(not plain)  # type: ignore[attr-defined]
        cudnn = torch.backends.cudnn.flags(enabled=False) if self.parameters["DISABLE_CUDNN"] else nullcontext()
        try:
            for position, value in enumerate(arguments, 1):
                if value is None:  # two names with one index; from Python it would become an undefined tensor
                    argument = f"'Tensor' for argument '{schema.arguments[position].name}'"
                    raise TypeError(f"forward() Expected a value of type {argument} but instead found type 'NoneType'.")
            with optimized, cudnn:
                return _flat(self.model.forward(*arguments), schema.returns[0].type)
        except Exception as error:  # noqa: BLE001  whatever a model raises is its answer, as in C++
            raise RequestError(f"PyTorch execute failure: {error}", pb_utils.TritonError.INTERNAL) from None

    def _split(self, results: list[Any], requests: list[Any]) -> list[Any]:
        """Give each request its share of dim 0 of every output; later rows are dropped without a word."""
        for name, (index, _) in self.outputs.items():
            if index >= len(results):
                raise RequestError(
                    f"The output {name} in the model configuration refers to an output index which doesn't "
                    f"exist. This model has {len(results)} outputs",
                    pb_utils.TritonError.INVALID_ARG,
                )
        answers: list[list[Any]] = [[] for _ in requests]
        errors: list[RequestError | None] = [None for _ in requests]
        for name, (index, data_type) in self.outputs.items():
            value = _array(results[index], name, data_type)
            first = 0
            for i, request in enumerate(requests):
                part = value
                if self.max_batch_size:
                    # The C++ backend forgets to move on in a list of strings: each request gets the first rows.
                    start = 0 if value.dtype == np.object_ else first
                    first += _rows(request)
                    part = value[start : start + _rows(request)]
                    if len(part) < _rows(request) and errors[i] is None:
                        errors[i] = RequestError(
                            f"failed to split the output tensor '{name}' in responses: expected batch size of at "
                            f"least {first} in model output, got {len(value)}",
                            pb_utils.TritonError.UNSUPPORTED,
                        )
                answers[i].append(pb_utils.Tensor(name, part))
        return [
            pb_utils.InferenceResponse([], _error(error)) if error else pb_utils.InferenceResponse(answer)
            for answer, error in zip(answers, errors, strict=True)
        ]


def _load_error(message: str) -> Exception:
    return pb_utils.TritonModelException(message)  # type: ignore[no-any-return]


def _error(error: RequestError) -> Any:
    return pb_utils.TritonError(str(error), error.code)


def _rows(request: Any) -> int:
    return int(request.inputs()[0].shape()[0])


def _refuse_what_only_docker_serves(config: dict[str, Any]) -> None:
    """The core computes these for C++ backends only; served here, they would be wrong without a word."""
    used = {
        "batch_input": config.get("batch_input"),
        "batch_output": config.get("batch_output"),
        "sequence_batching.state": config.get("sequence_batching", {}).get("state"),
        "model_transaction_policy.decoupled": config.get("model_transaction_policy", {}).get("decoupled"),
    }
    for field in filter(used.get, used):
        raise _load_error(f"{field} is not served by the embedded server; smoke this model with the docker server")


def _parameters(declared: dict[str, Any]) -> dict[str, Any]:
    """Read the parameters of the C++ backend; unknown ones are ignored there too. None: not set."""
    values: dict[str, Any] = dict.fromkeys(
        ("DISABLE_OPTIMIZED_EXECUTION", "DISABLE_CUDNN", "ENABLE_CACHE_CLEANING", "ENABLE_WEIGHT_SHARING"), False
    )
    values |= dict.fromkeys(("ENABLE_TENSOR_FUSER", "ENABLE_JIT_PROFILING", "ENABLE_JIT_EXECUTOR"))
    values |= {"INFERENCE_MODE": True, "INTRA_OP_THREAD_COUNT": 0, "INTER_OP_THREAD_COUNT": 0}
    for name in filter(declared.__contains__, values):
        text = declared[name]["string_value"]
        if name.endswith("_COUNT"):
            number = re.match(r"\s*[+-]?[0-9]+", text)  # std::stoi: what follows the number is not looked at
            if number is None:
                raise _load_error(f"failed to convert '{text}' to integral number")
            values[name] = int(number[0])
        elif text.lower() in BOOLEANS:
            values[name] = BOOLEANS[text.lower()]
        else:
            raise _load_error(f"failed to convert '{text}' to boolean")
    return values


def _set_process(parameters: dict[str, Any], name: str) -> None:
    """Apply what is global to the process; each instance here has a process of its own."""
    for kind in ("Intra", "Inter"):
        count = parameters[f"{kind.upper()}_OP_THREAD_COUNT"]
        if count > 0:
            (torch.set_num_threads if kind == "Intra" else torch.set_num_interop_threads)(count)
            pb_utils.Logger.log_info(f"{kind} op thread count is set to {count} for model instance '{name}'")
    for parameter, setter in (
        ("ENABLE_TENSOR_FUSER", torch._C._jit_set_texpr_fuser_enabled),
        ("ENABLE_JIT_PROFILING", torch._C._jit_set_profiling_mode),
        ("ENABLE_JIT_EXECUTOR", torch._C._jit_set_profiling_executor),
    ):
        if parameters[parameter] is not None:
            setter(parameters[parameter])


def _device(args: dict[str, str]) -> torch.device | None:
    """The device of the instance group; None (KIND_MODEL): where the tensors were when they were saved."""
    kind = args["model_instance_kind"]
    if kind != "GPU":
        return None if kind == "MODEL" else torch.device("cpu")
    if not torch.cuda.is_available():  # its driver is too old, or this is a build for the CPU
        why = f"the server found a GPU, which PyTorch {torch.__version__} cannot use"
        raise _load_error(f"{why}; say device: cpu in pipeline.yaml, or hide it: CUDA_VISIBLE_DEVICES= doit")
    device = torch.device("cuda", int(args["model_instance_device_id"]))
    torch.cuda.set_device(device)  # what the traced code calls "cuda", without a number
    return device


def _filename(config: dict[str, Any], device: torch.device | None) -> str:
    name = config.get("default_model_filename") or "model.pt"
    if device is not None and device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        name = config.get("cc_model_filenames", {}).get(capability, name)
    return str(name)


def _check_arguments(arguments: list[Any]) -> None:
    """Refuse arguments of forward that no tensor of a request can be."""
    if any(argument.type.kind() == "DictType" for argument in arguments[1:]):
        raise _load_error(
            "Multiple inputs of kind DictType were detected. "
            "Only a single input of type Dict(str, Tensor) is supported."
        )
    for argument in arguments:
        if argument.type.kind() not in ("TensorType", "ListType"):
            raise _load_error(
                f"An input of type '{argument.type.str()}' was detected in the model. Only a single input of type "
                "Dict(str, Tensor) or input(s) of type Tensor are supported."
            )


def _control_inputs(config: dict[str, Any]) -> dict[str, int]:
    """Positions of the tensors that the sequence batcher adds to each request."""
    positions = {}
    for name in (control["name"] for control in config.get("sequence_batching", {}).get("control_input", [])):
        index = INDEXED.fullmatch(name)
        if index is None:
            raise _load_error(f"input '{name}' does not follow <name>__<index> naming convention.")
        positions[name] = int(index[1] or 0)
    return positions


def _flat(result: Any, declared: Any) -> list[Any]:
    """Return the outputs of forward as C++ unpacks them: a tensor, a list of strings, or a tuple of those."""
    if isinstance(result, list):
        _check_list(result, declared, "output must be")
    if isinstance(result, (torch.Tensor, list)):
        return [result]
    if not isinstance(result, tuple):
        raise TypeError(
            "output must be of type Tensor, List[str] or Tuple containing one of these two types. "
            "It should not be a List / Dictionary of Tensors or a Scalar"
        )
    types = declared.elements() if declared.kind() == "TupleType" else [declared] * len(result)
    for i, (value, type_) in enumerate(zip(result, types, strict=True)):
        if isinstance(value, list):
            _check_list(value, type_, f"output at index {i} must be")
        elif not isinstance(value, torch.Tensor):
            raise TypeError(f"Expected Tensor but got {_tag(value)}")
    return list(result)


def _check_list(value: list[Any], declared: Any, what: str) -> None:
    """Refuse a list of anything but strings; the type is libtorch's, or the value's where that is Any."""
    if declared.kind() == "ListType":
        element = declared.getElementType().str()
    else:
        element = "Tensor" if value and isinstance(value[0], torch.Tensor) else "str"
    if element != "str":
        raise TypeError(f"{what} of type Tensor or List[str], received List[{element}]")


def _tag(value: Any) -> str:
    """The name that libtorch gives to the kind of a value."""
    names = {tuple: "Tuple", dict: "GenericDict", bool: "Bool", int: "Int", float: "Double", str: "String"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), "None")


def _array(value: torch.Tensor | list[str], name: str, data_type: str) -> np.ndarray[Any, Any]:
    """Return an output as the client gets it; the declared dims play no part, only the dtype of a tensor."""
    if isinstance(value, list):
        return np.array(value, dtype=np.object_)
    if value.layout != torch.strided:
        raise RequestError(f"output tensor '{name}' is not found", pb_utils.TritonError.INTERNAL)
    # The C++ table has int32 in the place of strings, so that is what a tensor declared as strings must be.
    expected = "TYPE_INT32" if data_type == "TYPE_STRING" else data_type
    provided = DTYPES.get(value.dtype, "TYPE_<invalid>")
    if provided != expected:
        raise RequestError(
            f"configuration expects datatype {expected} for output '{name}', model provides {provided}",
            pb_utils.TritonError.INVALID_ARG,
        )
    if value.dim() == 0:
        raise RequestError(f"output '{name}' is a scalar which is not supported.", pb_utils.TritonError.INVALID_ARG)
    return value.detach().cpu().contiguous().numpy()
