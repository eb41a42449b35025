"""Decides what a pipeline.yaml may say: frozen models of the declaration, and every rule on user input.

Hides pydantic and the order of checks: `load` returns a valid `Pipeline` or raises one `SpecError` that holds all
problems of the file, each with its line. Nothing of torch, numpy or protobuf is imported here. What depends on
running the model (outputs, forward's arguments) is checked by `trace`; the fields under `config:` by `config`.

Source: docs/pipeline.md, the reference of the format; Triton's model configuration for names and limits.
"""

from __future__ import annotations

import contextlib
import difflib
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tritonbuild import rules, yamlfile
from tritonbuild.errors import SpecError
from tritonbuild.rules import model_problems, pipeline_problems

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pydantic_core import ErrorDetails
    from typing_extensions import Self

    from tritonbuild.yamlfile import Location, Problem

_Number = int | float
_List = Field(strict=False)  # YAML gives lists; the models hold tuples, which cannot change


class _Frozen(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Return the same: pydantic copies a default for every model, and what is frozen may be shared."""
        return self


class Axis(_Frozen):
    """A named size that may vary."""

    example: Annotated[int, Field(ge=1, lt=2**63)]
    """The size to trace with."""
    min: Annotated[int, Field(ge=1, lt=2**63)] = 1
    """The smallest size that will be served."""
    max: Annotated[int, Field(ge=1, lt=2**63)]
    """The largest size that will be served."""
    multiple_of: Annotated[int, Field(ge=1, lt=2**63)] = 1
    """Only multiples of this are served; min, max and example must be multiples."""


class Input(_Frozen):
    """One input tensor."""

    dtype: str
    """torch's name without `torch.`: float32, int64, ..."""
    shape: Annotated[tuple[int | str, ...], _List]
    """Sizes and names of axes. `batch`, in the first place, is Triton's implicit batch axis."""
    range: Annotated[tuple[_Number, _Number], _List] | None = None
    """The lowest and the highest value that example data take, both included. Integers need one."""
    values: str | None = None
    """A file with example data: .npy, .safetensors or an image; a path relative to pipeline.yaml."""


class Weights(_Frozen):
    """A file with a state dict, loaded strictly into what the entry point builds."""

    path: str
    """.safetensors, or a .pt or .pth state dict; relative to pipeline.yaml."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """The digest that the file must have."""


class Trace(_Frozen):
    """How the TorchScript is made and proved."""

    def __hash__(self) -> int:
        # pydantic copies a default that has no hash, in depth, for each of a thousand models.
        return hash(self.model_dump_json())

    method: Literal["auto", "trace", "script"] = "auto"
    """auto takes the first that passes the proof: trace, trace with the guilty submodules scripted, script."""
    script: Annotated[tuple[str, ...], _List] = ()
    """Names of submodules with data-dependent control flow: they are scripted, the rest is traced."""
    rtol: Annotated[float, Field(ge=0)] | None = None
    """Relative tolerance of the proof and of the smoke test; by default it follows from the dtype."""
    atol: Annotated[float, Field(ge=0)] | None = None
    """Absolute tolerance; by default it follows from the dtype."""
    cases: Annotated[int, Field(ge=1, le=1000)] = 24
    """How many cases are kept for the smoke test. The proof runs at least these, and the ends of the axes."""
    budget_s: Annotated[float, Field(gt=0)] = 120
    """Seconds that the proof may take beyond the kept cases; when it cuts, it says so."""
    accept: dict[str, str] = {}
    """Hazards that are accepted, each with the reason; they stay visible in the results."""


class Version(_Frozen):
    """What one version says differently from its model."""

    entry_point: str | None = None
    """Replaces the model's."""
    kwargs: dict[str, Any] | None = None
    """Replaces the model's, as a whole."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    """Replaces the model's."""
    weights: Weights | None = None
    """Replaces the model's."""
    trace: Trace | None = None
    """Replaces the model's, key by key."""


class Model(_Frozen):
    """One model of the repository."""

    entry_point: str
    """`module:attribute`: what builds the torch.nn.Module, imported from this folder, its src/ or site-packages."""
    kwargs: dict[str, Any] = {}
    """Keyword arguments for the entry point."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] = 0
    """Set before the entry point is called, so that a model without weights is the same everywhere."""
    weights: Weights | None = None
    """A file with a state dict."""
    max_batch_size: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """The largest batch that Triton forms. 0: no batch axis, shapes are complete."""
    axes: dict[str, Axis] = {}
    """The named sizes that vary, other than batch."""
    inputs: Annotated[dict[str, Input], Field(min_length=1)]
    """Input tensors. They bind by name if these are exactly forward's arguments, otherwise by order."""
    outputs: Annotated[tuple[str, ...], _List] = ()
    """Names of the output tensors, in order; OUTPUT__0, OUTPUT__1, ... when not given."""
    trace: Trace = Trace()
    """How the TorchScript is made and proved."""
    versions: Annotated[dict[int, Version], Field(min_length=1)] = {1: Version()}
    """Version numbers and what each says differently."""
    config: dict[str, Any] = {}
    """Any other field of Triton's ModelConfig, under its own name."""


class Image(_Frozen):
    """The Docker image that carries the model repository."""

    name: str
    """The image's name, without a tag."""
    tags: Annotated[tuple[str, ...], _List] = ()
    """Further tags, beside the digest of the repository."""
    push: bool = False
    """Push the image after it is built."""


class ModelVersion(_Frozen):
    """The flat declaration of one model version: all that its trace and proof depend on."""

    model: str
    version: int
    entry_point: str
    kwargs: dict[str, Any]
    seed: int
    weights: Weights | None
    device: Literal["auto", "cuda", "cpu"]
    triton: str
    max_batch_size: int
    axes: dict[str, Axis]
    inputs: dict[str, Input]
    outputs: Annotated[tuple[str, ...], _List]
    trace: Trace

    @cached_property
    def label(self) -> str:
        """`resnet18/1`."""
        return f"{self.model}/{self.version}"

    @property
    def all_axes(self) -> dict[str, Axis]:
        """The axes with the implicit batch axis, which is sized 1 to max_batch_size, in front."""
        if not self.max_batch_size:
            return self.axes
        return {
            "batch": Axis(example=min(2, self.max_batch_size), min=1, max=self.max_batch_size),
            **self.axes,
        }


class Pipeline(_Frozen):
    """A whole pipeline.yaml."""

    triton: Annotated[str, Field(pattern=r"^\d\d\.(0[1-9]|1[0-2])$")]
    """The Triton release that will serve, such as "26.07": names the base image and its libtorch."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where models are traced and will be served; auto: on the GPU where there is one."""
    image: Image | None = None
    """The Docker image to build."""
    store: str | None = None
    """A folder or fsspec URL that shares results between machines: s3://bucket/prefix."""
    models: Annotated[dict[str, Model], Field(min_length=1)]
    """The models, by name."""
    _path: Path

    @property
    def path(self) -> Path:
        """The file that this was read from."""
        return self._path

    @cached_property
    def root(self) -> Path:
        """The project's folder: every path of the declaration is relative to it."""
        return self._path.parent

    @cached_property
    def versions(self) -> dict[str, dict[int, ModelVersion]]:
        """Model name -> version number -> its flat declaration, in declared order."""
        return {
            name: {number: self._flat(name, model, number) for number in model.versions}
            for name, model in self.models.items()
        }

    def _flat(self, name: str, model: Model, number: int) -> ModelVersion:
        own = model.versions[number]

        def chosen(key: str) -> Any:
            return getattr(own, key) if key in own.model_fields_set else getattr(model, key)

        trace = model.trace
        if own.trace:
            trace = trace.model_copy(update={key: getattr(own.trace, key) for key in own.trace.model_fields_set})
        # Every part is validated already: building it again would cost a third of a no-op at 1000 models.
        return ModelVersion.model_construct(
            model=name,
            version=number,
            entry_point=chosen("entry_point"),
            kwargs=chosen("kwargs"),
            seed=chosen("seed"),
            weights=chosen("weights"),
            device=self.device,
            triton=self.triton,
            max_batch_size=model.max_batch_size,
            axes=model.axes,
            inputs=model.inputs,
            outputs=model.outputs,
            trace=trace,
        )

    def all_versions(self) -> Iterator[ModelVersion]:
        """Every model version, in declared order."""
        for versions in self.versions.values():
            yield from versions.values()


def load(path: Path, memory: Path | None = None) -> Pipeline:
    """Return the valid declaration in the file.

    Args:
        path: pipeline.yaml.
        memory: A file that keeps what was found valid (see `yamlfile.Memory`).

    Raises:
        SpecError: With every problem of the file, in line order.
    """
    path = path.absolute()
    known = yamlfile.Memory(memory, path, (__file__, rules.__file__, *rules.TABLES)) if memory else None
    recalled = known.recall() if known else None
    data = yamlfile.read(path) if recalled is None else recalled
    if not isinstance(data, dict):
        raise SpecError(
            [f"{path.name}:1: found {yamlfile.shown(data)}, expected a mapping with the keys triton and models"]
        )
    try:
        pipeline = Pipeline.model_validate(data)
    except ValidationError as error:
        problems = _problems(error) + list(_rules_of_the_rest(data, error))
        raise SpecError(yamlfile.render(path, problems)) from None
    pipeline._path = path  # pydantic allows private attributes on frozen models
    if recalled is not None:
        return pipeline
    problems = [*pipeline_problems(pipeline), *_all_rules(pipeline.models)]
    if problems:
        raise SpecError(yamlfile.render(path, problems))
    if known:
        known.keep(data)
    return pipeline


def place(path: Path, location: Location) -> str:
    """Return `pipeline.yaml:9: models.pnet.config.foo` for a location in the file."""
    return yamlfile.place(path, location)


def _all_rules(models: dict[str, Model]) -> Iterator[Problem]:
    for name, model in models.items():
        for location, what in model_problems(name, model):
            yield ("models", name, *location), what


def _rules_of_the_rest(data: dict[str, Any], error: ValidationError) -> Iterator[Problem]:
    """Check the models that are well-formed but for misspelt keys: all problems are shown at once."""
    for details in error.errors():
        if details["type"] == "extra_forbidden":
            *steps, key = details["loc"]
            with contextlib.suppress(KeyError):  # a name that is no text stands in the location as one
                mapping: Any = data
                for step in steps:
                    mapping = mapping[step]
                value = mapping.pop(key, None)
                for near in difflib.get_close_matches(str(key), _keys_at(details["loc"]), n=1):
                    mapping.setdefault(near, value)  # read as what it seems to mean
    models = data.get("models")
    for name, raw in models.items() if isinstance(models, dict) else ():
        with contextlib.suppress(ValidationError):
            yield from _all_rules({str(name): Model.model_validate(raw)})


# What lies under a key; True: under the key stand names, and below each name such a model.
_BELOW: dict[tuple[type[BaseModel], str], tuple[type[BaseModel], bool]] = {
    (Pipeline, "models"): (Model, True),
    (Pipeline, "image"): (Image, False),
    (Model, "axes"): (Axis, True),
    (Model, "inputs"): (Input, True),
    (Model, "versions"): (Version, True),
    (Model, "weights"): (Weights, False),
    (Model, "trace"): (Trace, False),
    (Version, "weights"): (Weights, False),
    (Version, "trace"): (Trace, False),
}


def _keys_at(location: Location) -> list[str]:
    """Return the keys that are allowed in the mapping that holds the last step of the location."""
    owner: type[BaseModel] = Pipeline
    steps = iter(location[:-1])
    for step in steps:
        below, named = _BELOW.get((owner, str(step)), (owner, False))
        owner = below
        if named:
            next(steps, None)
    return list(owner.model_fields)


def _problems(error: ValidationError) -> list[Problem]:
    problems: list[Problem] = []
    for details in error.errors():
        location, what = _problem(details)
        # The members of a union fail one by one: "expected a whole number", "expected text".
        if problems and problems[-1][0] == location and details["loc"][-1] in _UNION:
            problems[-1] = location, f"{problems[-1][1]} or {what.partition(', expected ')[2]}"
        else:
            problems.append((location, what))
    return problems


# The step that pydantic adds to the location of an entry of a list that may be one of two types. Names of models and
# inputs may be the same words.
_UNION = {"int", "str", "float"}


def _problem(details: ErrorDetails) -> Problem:
    location = details["loc"]
    if location[-1] == "[key]":
        location = location[:-1]
    if details["loc"] != location or details["type"] == "invalid_key":
        if not isinstance(details["input"], str):  # no text of the file can be looked up for it
            what = yamlfile.explain(details, ()).replace("found ", "found the key ", 1)
            return location[:-1], what + ": write it in quotes" * what.endswith("text")
    elif location[-1] in _UNION and isinstance(location[-2], int) and details["type"] != "extra_forbidden":
        location = location[:-1]
    what = yamlfile.explain(details, _keys_at(location))
    if location == ("triton",):
        release = details["input"]
        what = f"found {yamlfile.shown(release)}, expected a release in quotes, such as "
        what += f'"{release:.2f}"' if isinstance(release, float) else '"26.07"'
    elif details["type"] == "string_pattern_mismatch":
        what = f"found {yamlfile.shown(details['input'])}, expected 64 hexadecimal digits in lower case"
    return location, what
