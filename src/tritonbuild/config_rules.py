"""Decides which well-formed values of ModelConfig fields a model may have: those that Triton and libtorch take.

Hides where Triton tells of a wrong one: when it polls the repository, when it loads the model, when the first request
comes, or never. All of them are told here, before anything is traced. Fields that concern single tensors are in
`config_tensors`.

Source: Triton core's model_config_utils.cc (ValidateModelConfig, ValidateInstanceGroup) and model_lifecycle.cc, the
PyTorch backend's parameters (model_state.cc).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tritonbuild.yamlfile import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tritonbuild.spec import Model, Pipeline
    from tritonbuild.yamlfile import Location, Problem

LEAVE_OUT = "leave it out"

DERIVED = {
    "name": f"the name is the key under models; {LEAVE_OUT}",
    "platform": f'always "pytorch_libtorch", for what is built is TorchScript; {LEAVE_OUT}',
    "backend": f'always "pytorch", for what is built is TorchScript; {LEAVE_OUT}',
    "runtime": f"always the backend's C++ runtime, which models are proved for; {LEAVE_OUT}",
    "max_batch_size": "belongs to the model itself, beside config: move it there",
    "default_model_filename": f'always "model.pt", which is what is written; {LEAVE_OUT}',
    "cc_model_filenames": f"a version holds one file, model.pt, for every GPU; {LEAVE_OUT}",
    "ensemble_scheduling": "an ensemble cannot be declared: it has no module to trace; "
    "call its parts in the forward of one module, or keep it in a model repository of its own",
    "model_operations": f"is for ONNX models; the PyTorch backend does not read it; {LEAVE_OUT}",
    "batch_input": "makes Triton feed a tensor that forward has no argument for; compute it in forward",
    "batch_output": "makes Triton cut outputs in a way that the proof does not cover; cut them in forward",
}

_BOOLEANS = (
    "DISABLE_OPTIMIZED_EXECUTION",
    "INFERENCE_MODE",
    "DISABLE_CUDNN",
    "ENABLE_WEIGHT_SHARING",
    "ENABLE_CACHE_CLEANING",
    "ENABLE_TENSOR_FUSER",
    "ENABLE_JIT_PROFILING",
    "ENABLE_JIT_EXECUTOR",
)
_THREADS = ("INTRA_OP_THREAD_COUNT", "INTER_OP_THREAD_COUNT")
# The newest release whose ModelConfig is known to lack model_metrics: tritonserver 2.51 does not parse it.
_WITHOUT_METRICS = "24.10"
_TRUE_FALSE = {"true", "false", "on", "off", "1", "0"}
_NOT_READ = {
    "ENABLE_NVFUSER": "is not read by the PyTorch backend any more",
    "NUM_THREADS": "is read by the backend's Python runtime only; use INTRA_OP_THREAD_COUNT",
    "NUM_INTEROP_THREADS": "is read by the backend's Python runtime only; use INTER_OP_THREAD_COUNT",
    "TORCH_COMPILE_OPTIONAL_PARAMETERS": "is read by the backend's Python runtime only; leave it out",
}


@dataclass(frozen=True)
class Declared:
    """A model and all that its rules need to know of it.

    Args:
        pipeline: The declaration.
        name: The model's name.
        config: Its `config:`, well-formed (see `message.read`).
    """

    pipeline: Pipeline
    name: str
    config: dict[str, Any]

    @property
    def model(self) -> Model:
        """The declared model."""
        return self.pipeline.models[self.name]


def version_policy(policy: dict[str, Any], declared: Declared) -> Iterator[Problem]:
    """Yield the problems of which versions are served."""
    if not policy:
        yield (), "found no policy, expected latest, all or specific"
    if "latest" in policy and policy["latest"].get("num_versions", 0) < 1:
        yield ("latest",), "found no num_versions, with which Triton loads nothing; write {num_versions: 1} or more"
    if "specific" not in policy:
        return
    versions = policy["specific"].get("versions", [])
    if not versions:
        yield ("specific",), "found no versions, expected at least one: {versions: [1]}"
    for i, version in enumerate(versions):
        if version not in declared.model.versions:
            known = ", ".join(map(str, declared.model.versions))
            yield ("specific", "versions", i), f"found {version}, which is not declared; declared are {known}"


def instance_group(groups: list[dict[str, Any]], declared: Declared) -> Iterator[Problem]:
    """Yield the problems of how many instances run where."""
    for i, group in enumerate(groups):
        kind = group.get("kind", "KIND_AUTO")
        gpus = group.get("gpus", [])
        if group.get("count", 1) < 1:
            yield (
                (i, "count"),
                f"found {group['count']}, expected at least 1; Triton would run one instance all the same",
            )
        if gpus and kind in {"KIND_CPU", "KIND_MODEL"}:
            yield (i, "gpus"), f"found {gpus}, but {kind} takes no GPUs; leave gpus out, or write kind: KIND_GPU"
        elif declared.pipeline.device == "cpu" and (gpus or kind == "KIND_GPU"):
            what = f"found {gpus or kind}, but device: cpu says that models are proved and served on the CPU"
            yield (i, "gpus" if gpus else "kind"), f"{what}; set device: cuda, or leave this out"
        for gpu in gpus:
            if gpu < 0:
                yield (i, "gpus"), f"found {gpu}, expected numbers of GPUs, from 0"
        for name in ("profile", "secondary_devices"):
            if group.get(name):
                yield (i, name), f"is for TensorRT models; {LEAVE_OUT}"
    if groups and all(group.get("passive", False) for group in groups):
        yield (len(groups) - 1, "passive"), "found only passive groups: the model would have no instance that answers"


def dynamic_batching(batching: dict[str, Any], declared: Declared) -> Iterator[Problem]:
    """Yield the problems of the dynamic batcher."""
    if not declared.model.max_batch_size:
        yield (), "has nothing to batch, for max_batch_size is 0; set it, and write batch first in every shape"
        return
    yield from preferred_batch_sizes(batching, declared)
    levels = batching.get("priority_levels", 0)
    queues = batching.get("priority_queue_policy", {})
    default = batching.get("default_priority_level", 0)
    if levels and not 1 <= default <= levels:
        at = ("default_priority_level",) if default else ("priority_levels",)
        yield at, f"found default_priority_level {default}, expected 1 to priority_levels, {levels}"
    for level in queues:
        if not levels:
            yield ("priority_queue_policy", level), "has no effect without priority_levels; set that, too"
        elif not 1 <= int(level) <= levels:
            yield ("priority_queue_policy", level), f"found {level}, expected 1 to priority_levels, {levels}"
    if not batching.get("preserve_ordering", False):
        return
    if levels > 1:
        yield (
            ("preserve_ordering",),
            f"found true with {levels} priority_levels, which change the order; drop one of the two",
        )
    policies: list[tuple[Location, dict[str, Any]]] = [
        (("default_queue_policy",), batching.get("default_queue_policy", {})),
        *((("priority_queue_policy", level), queue) for level, queue in queues.items()),
    ]
    for place, queue in policies:
        if queue.get("timeout_action") == "DELAY" and queue.get("default_timeout_microseconds", 0):
            yield (
                (*place, "timeout_action"),
                "found DELAY, which changes the order, with preserve_ordering: true; write REJECT",
            )


def preferred_batch_sizes(batching: dict[str, Any], declared: Declared) -> Iterator[Problem]:
    """Yield the problems of the batch sizes that a batcher prefers."""
    largest = declared.model.max_batch_size
    for i, size in enumerate(batching.get("preferred_batch_size", [])):
        if size < 1:
            yield ("preferred_batch_size", i), f"found {size}, expected a batch size from 1"
        elif size > largest:
            yield ("preferred_batch_size", i), f"found {size}, expected at most max_batch_size, {largest}"


def optimization(settings: dict[str, Any], declared: Declared) -> Iterator[Problem]:
    """Yield the settings that other backends have."""
    del declared
    if settings.get("cuda"):
        yield ("cuda",), f"is for TensorRT models; the PyTorch backend has no CUDA graphs; {LEAVE_OUT}"
    if settings.get("execution_accelerators"):
        yield ("execution_accelerators",), f"is for ONNX and TensorFlow models; {LEAVE_OUT}"
    if settings.get("eager_batching"):
        yield ("eager_batching",), f"is for TensorRT models; {LEAVE_OUT}"


def parameters(settings: dict[str, Any], declared: Declared) -> Iterator[Problem]:
    """Yield the problems of the PyTorch backend's parameters; those that it does not know, it ignores."""
    known = (*_BOOLEANS, *_THREADS)
    for key, parameter in settings.items():
        value = parameter.get("string_value", "")
        if key in _NOT_READ:
            yield (key,), _NOT_READ[key]
        elif key in _BOOLEANS and value.lower() not in _TRUE_FALSE:
            yield (key,), f'found {shown(value)}, expected "true" or "false"; the model would not load'
        elif key in _THREADS:
            yield from _thread_count(key, value, declared)
        elif key not in known and (near := difflib.get_close_matches(key.upper(), known, n=1, cutoff=0.85)):
            yield (key,), f'is ignored by the PyTorch backend; did you mean "{near[0]}"?'


def _thread_count(key: str, value: str, declared: Declared) -> Iterator[Problem]:
    if not (value.isdecimal() and int(value) > 0):
        yield (key,), f'found {shown(value)}, expected a number of threads in quotes, such as "2"'
        return
    for other, model in declared.pipeline.models.items():
        if other == declared.name:
            return
        theirs = _parameter(model, key)
        if theirs is not None and theirs != value:
            what = f'found "{value}", but {other} has "{theirs}"; a server has one setting'
            yield (key,), f"{what}, and the model that loads first wins: write the same for both"


def _parameter(model: Model, key: str) -> str | None:
    settings = model.config.get("parameters")
    value = settings.get(key) if isinstance(settings, dict) else None
    if isinstance(value, dict):
        value = value.get("string_value")
    return value if isinstance(value, str) else None


def model_transaction_policy(policy: dict[str, Any], declared: Declared) -> Iterator[Problem]:
    """Yield the problem of answers without number."""
    del declared
    if policy.get("decoupled", False):
        yield ("decoupled",), f"found true, but the PyTorch backend answers each request exactly once; {LEAVE_OUT}"


def response_cache(cache: dict[str, Any], declared: Declared) -> Iterator[Problem]:
    """Yield the problem of caching what depends on the requests before."""
    if cache.get("enable", False) and "sequence_batching" in declared.config:
        yield ("enable",), "found true, but Triton caches no answers of sequence_batching; drop one of the two"


def model_metrics(metrics: dict[str, Any], declared: Declared) -> Iterator[Problem]:
    """Yield what is missing from the metrics' settings."""
    if declared.pipeline.triton <= _WITHOUT_METRICS:
        yield (), f"Triton {declared.pipeline.triton} does not know it; take a newer one, or {LEAVE_OUT}"
    controls = metrics.get("metric_control", [])
    if not controls:
        yield (), "found no metric_control, expected at least one; or leave model_metrics out"
    for i, control in enumerate(controls):
        if not control.get("metric_identifier", {}).get("family"):
            example = "{family: nv_inference_first_response_histogram_ms}"
            yield ("metric_control", i), f"found no metric_identifier with a family, expected such as {example}"
        if not control.get("histogram_options", {}).get("buckets"):
            yield ("metric_control", i), "found no histogram_options with buckets, expected {buckets: [1, 10, 100]}"


def model_repository_agents(agents: dict[str, Any], declared: Declared) -> Iterator[Problem]:
    """Yield agents without a name."""
    del declared
    for i, agent in enumerate(agents.get("agents", [])):
        if not agent.get("name"):
            yield ("agents", i), "found no name, expected that of an agent, such as checksum"


RULES: dict[str, Callable[[Any, Declared], Iterator[Problem]]] = {
    rule.__name__: rule
    for rule in (
        version_policy,
        instance_group,
        dynamic_batching,
        optimization,
        parameters,
        model_transaction_policy,
        response_cache,
        model_metrics,
        model_repository_agents,
    )
}
