"""Decides what `config:` may say of single tensors: additions to inputs and outputs, warm-up data, sequence state.

Names, element types and dims are derived from the declaration and the measured signature, so what is said of them
again must agree. Hides which files of the project a config names and where they lie in the model's folder; warm-up
data are checked here because Triton finds them wrong only when the model loads, and some not even then.

Source: Triton core's model_config_utils.cc (ValidateIOShape, GetBooleanSequenceControlProperties) and
backend_model_instance.cc (warm-up); the PyTorch backend's naming rules (model_instance_state.cc).
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from tritonbuild import dtypes
from tritonbuild.config_rules import LEAVE_OUT, preferred_batch_sizes
from tritonbuild.rules import CONTROL
from tritonbuild.yamlfile import closest, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from tritonbuild.config_rules import Declared
    from tritonbuild.spec import Input
    from tritonbuild.yamlfile import Location, Problem

_INDEXED = re.compile(r"(?:(?!__).)+__[0-9]+")
# Names that mean something else in a model's folder: ours, config.pbtxt, versions, folders of Triton's.
_TAKEN = re.compile(r"\..*|config\.pbtxt|[0-9]+|configs|warmup|initial_state")
_CONTROLS = {
    "CONTROL_SEQUENCE_START": "START",
    "CONTROL_SEQUENCE_END": "END",
    "CONTROL_SEQUENCE_READY": "READY",
    "CONTROL_SEQUENCE_CORRID": "CORRID",
}
_FALSE_TRUE = {"int32_false_true": "int32", "fp32_false_true": "float32", "bool_false_true": "bool"}
_CORRELATION_IDS = {"TYPE_INT64", "TYPE_INT32"}


def item_shape(declared: Input, max_batch_size: int) -> tuple[int | str, ...]:
    """Return an input's declared shape without the batch axis: sizes and names of axes."""
    return declared.shape[1:] if max_batch_size else declared.shape


def files(config: dict[str, Any]) -> Iterator[tuple[Location, str, str]]:
    """Yield location, path in the project and path in the model's folder of every file that a config names.

    Args:
        config: Well-formed, or anything: what has not the right form names no file.
    """
    for i, output in _entries(config.get("output")):
        yield from _file(output, ("output", i, "label_filename"), "")
    for i, sample in _entries(config.get("model_warmup")):
        for name, tensor in _pairs(sample.get("inputs")):
            yield from _file(tensor, ("model_warmup", i, "inputs", name, "input_data_file"), "warmup/")
    batching = config.get("sequence_batching")
    for i, state in _entries(batching.get("state") if isinstance(batching, dict) else None):
        for j, initial in _entries(state.get("initial_state")):
            at: Location = ("sequence_batching", "state", i, "initial_state", j, "data_file")
            yield from _file(initial, at, "initial_state/")


def _entries(value: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for i, entry in enumerate(value if isinstance(value, list) else ()):
        if isinstance(entry, dict):
            yield i, entry


def _pairs(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, entry in (value if isinstance(value, dict) else {}).items():
        if isinstance(entry, dict):
            yield name, entry


def _file(holder: dict[str, Any], at: Location, folder: str) -> Iterator[tuple[Location, str, str]]:
    path = holder.get(str(at[-1]))
    if isinstance(path, str):
        yield at, path, folder + PurePosixPath(path).name


def file_problems(config: dict[str, Any], root: Path) -> Iterator[Problem]:
    """Yield the files that are not there, not in the project, or would take each other's place."""
    placed: dict[str, str] = {}
    for at, path, target in files(config):
        problem = _path_problem(path, root)
        if not problem and _TAKEN.fullmatch(target):
            problem = f"found {shown(path)}, but {target} means something else in a model's folder; rename the file"
        elif not problem and placed.setdefault(target, path) != path:
            problem = f"found {shown(path)}, but {shown(placed[target])} has the same name; rename one of the two"
        if problem:
            yield at, problem


def _path_problem(text: str, root: Path) -> str | None:
    path = PurePosixPath(text)
    if CONTROL.search(text):
        return f"found {shown(text)}, expected a path without control characters"
    if not text or path.is_absolute() or text.startswith("~") or "\\" in text:
        return f"found {shown(text)}, expected a path relative to the folder of pipeline.yaml, with forward slashes"
    if ".." in path.parts:
        return f"found {shown(text)}, expected a path that stays inside the folder of pipeline.yaml"
    file = root / path
    if not Path(os.path.realpath(file)).is_relative_to(root.resolve()):  # Path.resolve raises for a loop of links
        return f"{text} is a link out of the project's folder"
    if not file.exists():
        return f"{text}: no such file"
    if not file.is_file():
        return f"{text}: is a folder, expected a file"
    return None if os.access(file, os.R_OK) else f"{text}: may not be read by this user"


def inputs(entries: list[dict[str, Any]], declared: Declared) -> Iterator[Problem]:
    """Yield the problems of what is added to inputs."""
    model = declared.model
    for i, entry in enumerate(entries):
        yield from _addition(entries, i, list(model.inputs), "inputs")
        if entry.get("optional", False):
            yield (i, "optional"), f"found true, but with it the PyTorch backend does not load the model; {LEAVE_OUT}"
        if entry.get("allow_ragged_batch", False):
            yield (
                (i, "allow_ragged_batch"),
                f"found true, but then forward gets one flat tensor, which it is not proved with; {LEAVE_OUT}",
            )
        if entry.get("format", "FORMAT_NONE") != "FORMAT_NONE" and entry.get("name") in model.inputs:
            dims = len(item_shape(model.inputs[entry["name"]], model.max_batch_size))
            if dims != 3:
                yield (
                    (i, "format"),
                    f"found {entry['format']}, which needs 3 dims beside the batch, but there are {dims}",
                )


def outputs(entries: list[dict[str, Any]], declared: Declared) -> Iterator[Problem]:
    """Yield the problems of what is added to outputs."""
    for i in range(len(entries)):
        yield from _addition(entries, i, declared.model.outputs, "outputs")


def _addition(entries: list[dict[str, Any]], i: int, known: Collection[str], where: str) -> Iterator[Problem]:
    entry = entries[i]
    name = entry.get("name")
    # Outputs that are not declared are OUTPUT__0, OUTPUT__1, ...; how many there are is known when one is traced.
    unknown = name not in known if known else not re.fullmatch(r"OUTPUT__(0|[1-9][0-9]*)", str(name))
    if not name:
        yield (i,), f"found no name, expected that of one of the {where}: {', '.join(known) or 'OUTPUT__0, ...'}"
    elif unknown:
        near = closest(name, known) or f"; declared are {', '.join(known) or 'none, so they are OUTPUT__0, ...'}"
        yield (i, "name"), f"found {shown(name)}, which is not declared under {where}{near}"
    elif any(other.get("name") == name for other in entries[:i]):
        yield (i, "name"), f"{shown(name)} is there twice; write one entry for it"
    for field in ("data_type", "dims", "reshape"):
        if field in entry:
            yield (i, field), f"is derived from the declaration and from running the model; {LEAVE_OUT}"
    for field in ("is_shape_tensor", "is_non_linear_format_io"):
        if entry.get(field, False):
            yield (i, field), f"is for TensorRT models; {LEAVE_OUT}"


def model_warmup(samples: list[dict[str, Any]], declared: Declared) -> Iterator[Problem]:
    """Yield the problems of warm-up samples."""
    largest = max(declared.model.max_batch_size, 1)
    needed = [name for name in declared.model.inputs if name not in states(declared.config)]
    for i, sample in enumerate(samples):
        size = sample.get("batch_size", 0)
        if not size:
            at: Location = (i, "batch_size") if "batch_size" in sample else (i,)
            yield at, "found batch_size 0, with which Triton skips the sample without a word; expected at least 1"
        elif size > largest:
            yield (
                (i, "batch_size"),
                f"found {size}, expected at most {largest}, for max_batch_size is "
                + str(declared.model.max_batch_size),
            )
        given = sample.get("inputs", {})
        missing = [name for name in needed if name not in given]
        if missing:
            yield (i, "inputs") if given else (i,), f"found no data for {', '.join(missing)}; every input needs some"
        yield from (((i, "inputs", *at), what) for at, what in _unequal_sizes(given, declared))
        for name, tensor in given.items():
            if name in needed:
                for at, what in _sample(tensor, name, declared):
                    yield (i, "inputs", name, *at), what
            else:
                near = closest(name, needed) or f"; declared are {', '.join(needed)}"
                yield (i, "inputs", name), f"is not declared under inputs{near}"


def _unequal_sizes(given: dict[str, Any], declared: Declared) -> Iterator[Problem]:
    """Yield the sizes that differ although they are one axis."""
    model = declared.model
    first: dict[str, tuple[int, str]] = {}
    for name, tensor in given.items():
        if name not in model.inputs or any(_sample_dims(tensor, name, declared)):
            continue
        shape = item_shape(model.inputs[name], model.max_batch_size)
        # A shape of no dims stands for one of dims [1].
        for i, (size, axis) in enumerate(zip(sample_dims(tensor, name, declared), shape, strict=False)):
            if isinstance(axis, str) and first.setdefault(axis, (size, name))[0] != size:
                other, where = first[axis]
                yield (name, "dims", i), f"found {size}, but {axis} is {other} in {where}; an axis is one size"


def _sample(tensor: dict[str, Any], name: str, declared: Declared) -> Iterator[Problem]:
    model = declared.model
    dtype = dtypes.BY_TORCH[model.inputs[name].dtype]
    if tensor.get("data_type", dtype.triton) != dtype.triton:
        yield ("data_type",), f"found {tensor['data_type']}, but {name} is {dtype.torch}: expected {dtype.triton}"
    wrong_dims = list(_sample_dims(tensor, name, declared))
    yield from wrong_dims
    for way in ("zero_data", "random_data"):
        if tensor.get(way) is False:
            yield (way,), f"found false, but Triton only looks whether it is there; write true, or {LEAVE_OUT}"
    low, high = model.inputs[name].range or (0, 0)
    if not {"zero_data", "random_data", "input_data_file"} & tensor.keys():
        yield (), "found no data, expected zero_data: true, random_data: true or input_data_file: a path"
    elif "zero_data" in tensor and dtype.integer_limits and not low <= 0 <= high:
        yield ("zero_data",), f"found zeros, which are outside of the range [{low}, {high}]; use input_data_file"
    elif "random_data" in tensor and (dtype.integer_limits or dtype.torch == "bool"):
        what = f"found random bytes, which for {dtype.torch} are values outside of every range"
        yield ("random_data",), f"{what}; use zero_data or input_data_file"
    elif "input_data_file" in tensor and not wrong_dims:
        file = declared.pipeline.root / tensor["input_data_file"]
        needed = math.prod(sample_dims(tensor, name, declared)) * dtype.size_bytes
        if file.is_file() and file.stat().st_size != needed:
            what = f"{tensor['input_data_file']} has {file.stat().st_size} bytes, expected {needed}"
            item = f"{dtype.torch} {_dims(sample_dims(tensor, name, declared))}"
            yield ("input_data_file",), f"{what}: one item of {item}, little-endian, without a header"


def sample_dims(tensor: dict[str, Any], name: str, declared: Declared) -> list[int]:
    """Return the dims of warm-up data: as given, or of the example sizes; one item, without the batch."""
    model = declared.model
    shape = item_shape(model.inputs[name], model.max_batch_size)
    example = [model.axes[size].example if isinstance(size, str) else size for size in shape]
    return list(tensor.get("dims") or example or [1])


def _sample_dims(tensor: dict[str, Any], name: str, declared: Declared) -> Iterator[Problem]:
    model = declared.model
    shape = item_shape(model.inputs[name], model.max_batch_size) or (1,)
    dims = sample_dims(tensor, name, declared)
    if len(dims) != len(shape):
        yield ("dims",), f"found {len(dims)} dims, expected {len(shape)}, without the batch: {_dims(shape)}"
        return
    for i, (size, wanted) in enumerate(zip(dims, shape, strict=True)):
        if isinstance(wanted, int):
            if size != wanted:
                yield ("dims", i), f"found {size}, expected {wanted}, as declared"
            continue
        axis = model.axes[wanted]
        if not axis.min <= size <= axis.max or size % axis.multiple_of:
            multiple = f" and a multiple of {axis.multiple_of}" if axis.multiple_of > 1 else ""
            yield ("dims", i), f"found {size}, expected {axis.min} to {axis.max}{multiple}, for it is {wanted}"


def controls(config: dict[str, Any]) -> set[str]:
    """Return the names of the inputs that Triton's sequence batcher fills: requests do not carry them."""
    return {entry.get("name", "") for entry in config.get("sequence_batching", {}).get("control_input", [])}


def states(config: dict[str, Any]) -> set[str]:
    """Return the names of the inputs that Triton keeps between the requests of a sequence."""
    return {entry.get("input_name", "") for entry in config.get("sequence_batching", {}).get("state", [])}


def sequence_batching(batching: dict[str, Any], declared: Declared) -> Iterator[Problem]:
    """Yield the problems of the sequence batcher."""
    model = declared.model
    for where, names in (("inputs", list(model.inputs)), ("outputs", list(model.outputs))):
        for name in names:
            if not _INDEXED.fullmatch(name):
                what = f'found {where} called "{name}": with sequence_batching the PyTorch backend loads only models'
                yield (), f"{what} whose tensors are all called <name>__<index>, such as {name.split('__')[0]}__0"
                break
    if "direct" in batching and not 0 <= batching["direct"].get("minimum_slot_utilization", 0) <= 1:
        found = batching["direct"]["minimum_slot_utilization"]
        yield ("direct", "minimum_slot_utilization"), f"found {found}, expected 0 to 1"
    for at, what in preferred_batch_sizes(batching.get("oldest", {}), declared):
        yield ("oldest", *at), what
    if not model.inputs.keys() - controls(declared.config) - states(declared.config):
        yield (), "leaves no input that a request carries; Triton needs at least one"
    yield from _control_inputs(batching.get("control_input", []), declared)
    yield from _states(batching.get("state", []), declared)


def _control_inputs(entries: list[dict[str, Any]], declared: Declared) -> Iterator[Problem]:
    kinds: set[str] = set()
    for i, entry in enumerate(entries):
        at: Location = ("control_input", i)
        problem = _fed_input(entry.get("name"), [other.get("name") for other in entries[:i]], declared)
        if problem:
            yield (*at, "name"), problem
            continue
        dtype = declared.model.inputs[entry["name"]].dtype
        shape = item_shape(declared.model.inputs[entry["name"]], declared.model.max_batch_size)
        if shape != (1,):
            yield (*at, "name"), f"{entry['name']} has dims {_dims(shape)}, but Triton fills controls with dims [1]"
        if len(entry.get("control", [])) != 1:
            yield at, f"found {len(entry.get('control', []))} controls, expected exactly one for {entry['name']}"
        for j, control in enumerate(entry.get("control", [])):
            kind = control.get("kind", "CONTROL_SEQUENCE_START")
            if kind in kinds:
                yield (*at, "control", j), f"{kind} is there twice"
            kinds.add(kind)
            for what in _control(control, kind, dtype):
                yield (*at, "control", j), what


def _control(control: dict[str, Any], kind: str, dtype: str) -> Iterator[str]:
    pairs = {name: control[name] for name in _FALSE_TRUE if control.get(name)}
    if kind == "CONTROL_SEQUENCE_CORRID":
        found = control.get("data_type", "no data_type")
        if found not in _CORRELATION_IDS or dtypes.BY_TRITON[found].torch != dtype:
            wanted = dtypes.BY_TORCH[dtype].triton
            which = wanted if wanted in _CORRELATION_IDS else "TYPE_INT64 or TYPE_INT32, for an input of that type"
            yield f"found {found}, expected {which}: the input is {dtype}"
    elif len(pairs) != 1:
        yield f"found {len(pairs)} of {', '.join(_FALSE_TRUE)}, expected exactly one for {kind}"
    else:
        ((name, values),) = pairs.items()
        if len(values) != 2:
            yield f"found {name} with {len(values)} values, expected two: that of false and that of true"
        if _FALSE_TRUE[name] != dtype:
            yield f"found {name}, but the input is {dtype}"


def _states(entries: list[dict[str, Any]], declared: Declared) -> Iterator[Problem]:
    model = declared.model
    for i, entry in enumerate(entries):
        at: Location = ("state", i)
        problem = _fed_input(entry.get("input_name"), [other.get("input_name") for other in entries[:i]], declared)
        if problem:
            yield (*at, "input_name"), problem
            continue
        name = entry["input_name"]
        output = entry.get("output_name", "")
        if not _INDEXED.fullmatch(output) or (model.outputs and output not in model.outputs):
            known = ", ".join(model.outputs) or "OUTPUT__0, ..."
            yield (*at, "output_name"), f"found {shown(output)}, expected one of the outputs, {known}"
        wanted = dtypes.BY_TORCH[model.inputs[name].dtype].triton
        if entry.get("data_type") != wanted:
            found = entry.get("data_type", "no data_type")
            yield (*at, "data_type"), f"found {found}, expected {wanted}: {name} is {model.inputs[name].dtype}"
        shape = item_shape(model.inputs[name], model.max_batch_size)
        dims = [-1 if isinstance(size, str) else size for size in shape] or [1]
        if entry.get("dims") != dims:
            yield (*at, "dims"), f"found {entry.get('dims', 'no dims')}, expected {dims}, as {name} is declared"


def _fed_input(name: str | None, before: list[str | None], declared: Declared) -> str | None:
    if name not in declared.model.inputs:
        known = list(declared.model.inputs)
        near = closest(str(name), known) or f"; declared are {', '.join(known)}"
        return f"found {shown(name)}, which is not declared under inputs{near}"
    return f"{shown(name)} is there twice" if name in before else None


def _dims(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


RULES: dict[str, Callable[[Any, Declared], Iterator[Problem]]] = {
    "input": inputs,
    "output": outputs,
    "model_warmup": model_warmup,
    "sequence_batching": sequence_batching,
}
