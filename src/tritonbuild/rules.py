"""Decides the rules of a declaration that concern more than one of its values.

Hides their order: each rule is a generator of problems, and all of them always run, so that a person sees every
problem at once. `spec` places them in the file.

Source: Triton's naming rules for libtorch models (names `<name>__<index>`), its limits on names and versions, and
torch's integer ranges.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from tritonbuild import dtypes
from tritonbuild.yamlfile import closest, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tritonbuild.spec import Input, Model, Pipeline, Trace, Weights
    from tritonbuild.yamlfile import Location, Problem

TABLES = (dtypes.__file__, str(Path(__file__).with_name("hazards.py")))
"""The files beside this one that decide what is valid."""
_LONGEST_NAME = 200  # file systems take 255 bytes, and files are named after models with more before and behind
_LARGEST = 2**63 - 1  # of a size or a version number, in torch and in Triton
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_MODEL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_TENSOR_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.:-]*")
_AXIS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ENTRY_POINT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_IMAGE_NAME = re.compile(r"([a-z0-9.-]+(:\d+)?/)?[a-z0-9]+([._/-]+[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def pipeline_problems(pipeline: Pipeline) -> Iterator[Problem]:
    """Yield the problems of what is not a model."""
    image = pipeline.image
    if image and not _IMAGE_NAME.fullmatch(image.name):
        yield (
            ("image", "name"),
            f"found {shown(image.name)}, expected an image name in lower case, without a tag, such as team/vision",
        )
    for i, tag in enumerate(image.tags if image else ()):
        if not _TAG.fullmatch(tag):
            yield (
                ("image", "tags", i),
                f"found {shown(tag)}, expected letters, digits, dots, dashes and underscores",
            )
    folded: dict[str, str] = {}
    for name in pipeline.models:
        if name.lower() in folded:
            yield (
                ("models", name),
                f'differs from "{folded[name.lower()]}" only in case; some file systems keep one of the two folders',
            )
        folded.setdefault(name.lower(), name)


def model_problems(name: str, model: Model) -> Iterator[Problem]:
    """Yield the problems of one model, located relative to it."""
    if not _MODEL_NAME.fullmatch(name):
        yield (
            (),
            f"found {shown(name)}, expected letters, digits, dots, dashes and underscores, no dot or dash in front",
        )
    elif len(name) > _LONGEST_NAME:
        yield (), f"found a name of {len(name)} letters, expected at most {_LONGEST_NAME}: folders are called so"
    yield from _source_problems((), model.entry_point, model.kwargs, model.weights, model.trace)
    for number, version in model.versions.items():
        at: Location = ("versions", number)
        if number < 1:
            yield at, f"found version {number}, expected a number from 1"
        elif number > _LARGEST:
            yield at, f"found version {number}, expected at most {_LARGEST}"
        for key in ("entry_point", "kwargs", "seed"):
            if key in version.model_fields_set and getattr(version, key) is None:
                yield (*at, key), "found nothing, expected a value; leave the key out where the model's holds"
        yield from _source_problems(at, version.entry_point, version.kwargs, version.weights, version.trace)
    yield from _config_problems(model)
    yield from _axis_problems(model)
    yield from _batch_problems(model)
    for tensor, declared in model.inputs.items():
        yield from _input_problems(("inputs", tensor), tensor, declared, model)
    for i, tensor in enumerate(model.outputs):
        if not _TENSOR_NAME.fullmatch(tensor):
            yield ("outputs", i), _tensor_name(tensor)
        if tensor in model.outputs[:i]:
            yield ("outputs", i), f'"{tensor}" is declared twice'
        elif tensor in model.inputs:
            yield ("outputs", i), f'"{tensor}" is the name of an input, too'
    yield from _index_problems(("inputs",), list(model.inputs), keyed=True)
    yield from _index_problems(("outputs",), list(model.outputs), keyed=False)


def _source_problems(
    at: Location, entry_point: str | None, kwargs: object, weights: Weights | None, trace: Trace | None
) -> Iterator[Problem]:
    if entry_point is not None and not _ENTRY_POINT.fullmatch(entry_point):
        yield (
            (*at, "entry_point"),
            f'found {shown(entry_point)}, expected "module:attribute", such as zoo.mtcnn:PNet',
        )
    try:
        json.dumps(kwargs, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        yield (*at, "kwargs"), f"expected numbers, text, true, false, null, lists and mappings: {error}"
    else:
        yield from _key_problems((*at, "kwargs"), kwargs)
    if weights:
        yield from _path_problems((*at, "weights", "path"), weights.path, (".safetensors", ".pt", ".pth"))
    if trace and trace.method == "script" and trace.script:
        yield (
            (*at, "trace", "script"),
            "names submodules, but method: script scripts the whole model; leave one of the two out",
        )
    for hazard, reason in (trace.accept if trace else {}).items():
        if hazard not in _hazard_names():
            yield (*at, "trace", "accept", hazard), "unknown hazard" + closest(hazard, _hazard_names())
        elif not reason.strip():
            yield (*at, "trace", "accept", hazard), "found no reason, expected why the hazard is wanted here"


def _key_problems(at: Location, value: object) -> Iterator[Problem]:
    """Yield the keys that are no text: kwargs go to the child that traces as JSON, which has no others."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if not isinstance(key, str):
            yield at, f"found the key {shown(key)}, expected text: write it in quotes"
        yield from _key_problems((*at, str(key)), inner)
    for i, inner in enumerate(value if isinstance(value, list) else ()):
        yield from _key_problems((*at, i), inner)


def _hazard_names() -> Sequence[str]:
    """Return the names of the hazards; docs/hazards.md describes them."""
    from tritonbuild import hazards

    return list(hazards.HAZARDS)


def _path_problems(at: Location, text: str, suffixes: Sequence[str]) -> Iterator[Problem]:
    path = PurePosixPath(text)
    if CONTROL.search(text):
        yield at, f"found {shown(text)}, expected a path without control characters"
    elif path.is_absolute() or text.startswith("~") or "\\" in text:
        yield (
            at,
            f"found {shown(text)}, expected a path relative to the folder of pipeline.yaml, with forward slashes",
        )
    elif ".." in path.parts:
        yield at, f"found {shown(text)}, expected a path that stays inside the folder of pipeline.yaml"
    elif path.suffix.lower() not in suffixes:
        yield at, f"found {shown(text)}, expected a file that ends in {', '.join(suffixes)}"


def _config_problems(model: Model) -> Iterator[Problem]:
    try:
        json.dumps(model.config, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        yield ("config",), f"expected numbers, text, true, false, lists and mappings: {error}"


def _axis_problems(model: Model) -> Iterator[Problem]:
    used = {size for declared in model.inputs.values() for size in declared.shape if isinstance(size, str)}
    for name, axis in model.axes.items():
        at: Location = ("axes", name)
        if name == "batch":
            yield (
                at,
                "batch is Triton's implicit batch axis; its sizes are 1 to max_batch_size, set that instead",
            )
            continue
        if not _AXIS_NAME.fullmatch(name):
            yield at, f"found {shown(name)}, expected an axis name of letters, digits and underscores"
        if axis.min > axis.max:
            yield (*at, "min"), f"found {axis.min}, expected at most max, {axis.max}"
        elif not axis.min <= axis.example <= axis.max:
            yield (
                (*at, "example"),
                f"found {axis.example}, expected a size from min to max, {axis.min} to {axis.max}",
            )
        for key in ("example", "min", "max"):
            size: int = getattr(axis, key)
            if size % axis.multiple_of:
                low = size - size % axis.multiple_of
                near = f"{low} or {low + axis.multiple_of}" if low else f"{axis.multiple_of}"
                yield (*at, key), f"found {size}, expected a multiple of {axis.multiple_of}: {near}"
        if name not in used:
            yield at, "no input has this axis in its shape"


def _batch_problems(model: Model) -> Iterator[Problem]:
    batched = [name for name, declared in model.inputs.items() if "batch" in declared.shape]
    if batched and not model.max_batch_size:
        yield (
            ("inputs", batched[0], "shape"),
            "has the axis batch, but max_batch_size is not set; set it, or write a size instead of batch",
        )
    if not model.max_batch_size:
        return
    for name, declared in model.inputs.items():
        if "batch" not in declared.shape:
            yield (
                ("inputs", name, "shape"),
                f"has no axis batch, but max_batch_size is {model.max_batch_size}; write batch first, or leave it out",
            )


def _input_problems(at: Location, name: str, declared: Input, model: Model) -> Iterator[Problem]:
    if not _TENSOR_NAME.fullmatch(name):
        yield at, _tensor_name(name)
    if refusal := dtypes.refusal(declared.dtype):
        yield (*at, "dtype"), refusal
    for i, size in enumerate(declared.shape):
        here: Location = (*at, "shape", i)
        if isinstance(size, int):
            if size < 1:
                yield (
                    here,
                    f"found {size}, expected a size from 1, or the name of an axis where the size varies",
                )
            elif size > _LARGEST:
                yield here, f"found {size}, expected at most {_LARGEST}"
        elif size == "batch":
            if i:
                yield here, "found batch, expected it in the first place only: Triton's batch is always dim 0"
        elif size not in model.axes:
            yield here, f"{shown(size)} is not declared under axes" + closest(size, model.axes)
    if not declared.shape:
        yield (*at, "shape"), "found no sizes, expected at least one: Triton has no scalars"
    if declared.values is not None:
        suffixes = (".npy", ".safetensors", ".png", ".jpg", ".jpeg")
        yield from _path_problems((*at, "values"), declared.values, suffixes)
    if not dtypes.refusal(declared.dtype):
        yield from _range_problems(at, declared)


def _range_problems(at: Location, declared: Input) -> Iterator[Problem]:
    limits = dtypes.integer_limits(declared.dtype)
    if declared.range is None:
        if limits and declared.values is None:
            yield (
                at,
                f"{declared.dtype} needs a range: [lowest, highest] value, both included, or values: a file with data",
            )
        return
    low, high = declared.range
    if low > high:
        yield (*at, "range"), f"found [{low}, {high}], expected the lower value first"
    if declared.dtype == "bool":
        yield (*at, "range"), "bool has no range; leave it out"
        return
    largest = dtypes.BY_TORCH[declared.dtype].largest
    for i, bound in enumerate((low, high)):
        if limits is None:
            if abs(bound) > largest:
                yield (*at, "range", i), f"found {bound}, expected {-largest:.5g} to {largest:.5g} for {declared.dtype}"
        elif isinstance(bound, float):
            yield (*at, "range", i), f"found {bound}, expected a whole number for {declared.dtype}"
        elif not limits[0] <= bound <= limits[1]:
            yield (
                (*at, "range", i),
                f"found {bound}, expected {limits[0]} to {limits[1]} for {declared.dtype}",
            )


def _tensor_name(name: str) -> str:
    return (
        f"found {shown(name)}, expected a tensor name of letters, digits, underscores, dots, colons and dashes, "
        "starting with a letter or an underscore"
    )


def _index_problems(at: Location, names: Sequence[str], *, keyed: bool) -> Iterator[Problem]:
    """Triton reads `<name>__<index>` as a position when all names look so, and ignores all indices otherwise."""
    indices = [_index(name) for name in names]
    if all(index is None for index in indices) or indices == list(range(len(names))):
        return
    for i, (name, index) in enumerate(zip(names, indices, strict=True)):
        if index is not None and index != i:
            yield (
                (*at, name) if keyed else (*at, i),
                f'Triton reads the end of "{name}" as position {index}, but it is at {i}; number all from 0 in order',
            )
        elif index is not None and None in indices:
            other = names[indices.index(None)]
            yield (
                (*at, name) if keyed else (*at, i),
                f'Triton reads the end of "{name}" as a position, not that of "{other}"; number all from 0, or none',
            )


def _index(name: str) -> int | None:
    # The text after the FIRST "__" counts, and an empty one is index 0 (measured on the C++ backend).
    _, mark, digits = name.partition("__")
    if not mark or (digits and not digits.isdecimal()):
        return None
    return int(digits or 0)
