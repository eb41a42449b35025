"""Decides whether a served model version answers as eager PyTorch did.

Every case is sent as it is; then rows of several cases are sent at once, so that the server's batcher mixes them, and
each request must get its own rows back. Before, the server's idea of the model is held against config.pbtxt: names,
types, dims, and every field that is written there. Hides tritonclient, which is imported here and nowhere else.

Source: Triton's docs/protocol/extension_binary_data.md and extension_statistics.md; shape of the files in
    docs/pipeline.md, "Results".
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import tritonclient.http
from tritonclient.utils import InferenceServerException

from tritonbuild.errors import BuildError, SmokeError
from tritonbuild.served import Config, Tensor
from tritonbuild.server import shown, slow

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tritonbuild.server import Server

    Array = np.ndarray[Any, Any]
    Arrays = dict[str, Array]
    Answer = dict[str, Array | None] | Exception

_REQUEST_TIMEOUT_S = 300.0
_AT_ONCE = 32
_MIXED_ROUNDS = 3


@dataclass(frozen=True)
class _Case:
    name: str
    inputs: Arrays
    outputs: Arrays


@dataclass
class _Cases:
    """What was kept of the proof: see `cases.save`."""

    cases: list[_Case]
    tolerance: dict[str, dict[str, float]]
    values: bool
    """False: the model gives other values at each call, and that was accepted; only shapes are compared."""
    rows_apart: bool
    """False: rows of a batch influence each other, and that was accepted."""
    sensitive: frozenset[str]
    """Outputs that amplify rounding: in another batch, where sums are rounded otherwise, their values may be others."""


@dataclass
class _Result:
    failures: list[dict[str, str]] = field(default_factory=list)
    cases: int = 0
    largest: dict[str, float | None] = field(default_factory=dict)
    latencies_s: list[float] = field(default_factory=list)
    mixed: dict[str, int] | None = None

    def failed(self, case: str, output: str, detail: str) -> None:
        self.failures.append({"case": case, "output": output, "detail": detail})

    def error(self, output: str, value: float) -> None:
        seen = self.largest.get(output, 0.0)
        self.largest[output] = None if seen is None or not math.isfinite(value) else max(seen, value)


def run(server: Server, model: str, version: int, cases: Path, config: Path, out: Path) -> dict[str, Any]:
    """Compare the answers of a served model version with its cases.

    Args:
        server: A running server; the model is loaded if it is not.
        model: Name of the model.
        version: Number of the version.
        cases: Inputs, eager outputs and tolerances: `.build/cases/<model>/<version>.safetensors`.
        config: The model's config.pbtxt.
        out: Where the result is written as JSON, also when it is a failure; whole or not at all.

    Returns:
        The result: `verdict`, `server`, `cases`, `max_abs_error` by output (None: not finite), `latency_ms` (median of
        one request after the other), `mixed` (requests sent at once and the executions that the server made of them;
        None where nothing can be mixed), `failures`, `seconds`.

    Raises:
        SmokeError: If an answer is not the proved one, or the server has the model in another form.
        ServerError: If the server does not serve the model.
    """
    started = time.perf_counter()
    where = f"smoke {model}/{version}"
    result = _Result()

    def write() -> dict[str, Any]:
        written = {
            "verdict": "failed" if result.failures else "passed",
            "server": {"kind": server.kind, "version": server.version, "url": server.url},
            "cases": result.cases,
            "max_abs_error": result.largest,
            "latency_ms": round(1000 * statistics.median(result.latencies_s or [0.0]), 3),
            "mixed": result.mixed,
            "failures": result.failures,
            "seconds": round(time.perf_counter() - started, 3),
        }
        _write(out, written)
        return written

    try:
        server.load(model)
        # Not /v2/models/<model> for it: a model may be called "stats", and that path is the statistics of all models.
        served = server.versions(model)
        if str(version) not in served:
            found = f"the server serves {', '.join(served)} of this model, not {version}"
            raise SmokeError(where, found, "see version_policy under config: in pipeline.yaml")
        with slow(f"{where} on {server.kind} tritonserver {server.version}"):
            _compare(server, f"/v2/models/{model}/versions/{version}", cases, Config(config), result)
    except BuildError as error:
        result.failed("", "", str(error))
        write()
        raise
    written = write()
    if result.failures:
        first = result.failures[0]
        at = ": ".join(filter(None, [first["case"], first["output"] and f"output {first['output']}", first["detail"]]))
        more = f"and {len(result.failures) - 1} more; " if len(result.failures) > 1 else ""
        raise SmokeError(where, at, f"{more}result: {shown(out)}")
    return written


def _compare(server: Server, path: str, cases: Path, config: Config, result: _Result) -> None:
    for difference in config.differences(server.get(f"{path}/config"), server.get(path)):
        result.failed("the server's model is not that of config.pbtxt", "", difference)
    kept = _read_cases(cases)
    for case in kept.cases[:1]:
        for kind, arrays, tensors in (("input", case.inputs, config.inputs), ("output", case.outputs, config.outputs)):
            if arrays.keys() != tensors.keys():
                names = f"found {', '.join(sorted(arrays))}, expected {', '.join(sorted(tensors))}"
                result.failed(f"the cases have other {kind}s than config.pbtxt", "", names)
    if result.failures:
        return
    failed_before = _statistics(server, path)["fail"]
    ask = _Ask(server.url, path, config)
    try:
        for case in kept.cases:
            began = time.perf_counter()
            answer = ask.together([case])[0]
            result.latencies_s.append(time.perf_counter() - began)
            result.cases += 1
            _judge(case, answer, kept, result, config.outputs, allowed=1)
            if isinstance(answer, ConnectionError):
                return
        if config.mixes and kept.rows_apart and not result.failures:
            _mix(server, path, ask, kept, result)
    finally:
        ask.client.close()
    # A server that ran before us may have other clients, whose failures it counts, too.
    failed = 0 if server.kind == "url" else _statistics(server, path)["fail"] - failed_before
    if failed and not result.failures:
        result.failed("statistics", "", f"the server counts {failed} failed requests, expected none")


def _mix(server: Server, path: str, ask: _Ask, kept: _Cases, result: _Result) -> None:
    """Send rows of several cases at once.

    A row was proved in a batch of its case; here it is served in another. That adds one tolerance: row i of a batch
    equals row i alone, and row i alone equals row i of any other batch, each within the tolerance of the proof.
    """
    requests = _rows(kept, ask.config.max_batch_size)
    if len(requests) < 2:
        return
    for _ in range(_MIXED_ROUNDS):
        before = _statistics(server, path)["executions"]
        answers = ask.together(requests)
        executions = _statistics(server, path)["executions"] - before
        result.mixed = {"requests": len(requests), "executions": executions}
        for request, answer in zip(requests, answers, strict=True):
            _judge(request, answer, kept, result, ask.config.outputs, allowed=2, shapes=kept.sensitive)
        if result.failures or executions < len(requests):
            return


def _rows(kept: _Cases, most: int) -> list[_Case]:
    """Return requests of one row, some of two where the batch allows, that the batcher can mix."""
    groups: dict[Any, list[_Case]] = {}
    for case in kept.cases:
        alike = tuple((name, array.shape[1:]) for name, array in case.inputs.items())
        groups.setdefault(alike, []).append(case)
    best = max(groups.values(), key=lambda group: sum(_count(case) for case in group))
    requests: list[_Case] = []
    for case in best:
        first = 0
        while first < _count(case):
            rows = 2 if most > 2 and len(requests) % 3 == 2 else 1
            part = slice(first, first + rows)
            requests.append(
                _Case(
                    f"rows mixed by the batcher: {case.name}, from row {first}",
                    {name: array[part] for name, array in case.inputs.items()},
                    {name: array[part] for name, array in case.outputs.items()},
                )
            )
            first += rows
    # Requests that stand far apart in the cases are sent next to each other.
    half = (len(requests) + 1) // 2
    order = [i for pair in zip(range(half), range(half, 2 * half), strict=True) for i in pair if i < len(requests)]
    return [requests[i] for i in order][:_AT_ONCE]


def _count(case: _Case) -> int:
    return len(next(iter(case.inputs.values())))


class _Ask:
    """Sends cases to one model version."""

    def __init__(self, url: str, path: str, config: Config) -> None:
        *_, self.model, _, self.version = path.split("/")
        self.config = config
        self.client = tritonclient.http.InferenceServerClient(
            url, concurrency=_AT_ONCE, connection_timeout=30.0, network_timeout=_REQUEST_TIMEOUT_S
        )

    def together(self, cases: Sequence[_Case]) -> list[Answer]:
        """Send all cases at once; return the outputs of each, or what went wrong."""
        wanted = [tritonclient.http.InferRequestedOutput(name, binary_data=True) for name in self.config.outputs]
        answers: list[Any] = []
        for case in cases:
            sent = []
            for name, array in case.inputs.items():
                served = _as_served(array, self.config.inputs[name])
                tensor = tritonclient.http.InferInput(name, list(served.shape), self.config.inputs[name].dtype.kserve)
                sent.append(tensor.set_data_from_numpy(np.ascontiguousarray(served), binary_data=True))
            answers.append(self.client.async_infer(self.model, sent, self.version, wanted))
        return [self._outputs(case, answer) for case, answer in zip(cases, answers, strict=True)]

    def _outputs(self, case: _Case, answer: Any) -> Answer:
        try:
            served = answer.get_result()
            return {name: served.as_numpy(name) for name in case.outputs}
        except InferenceServerException as error:
            if error.status() is None:
                return ConnectionError(f"no answer: {error}")
            return RuntimeError(f"the server answered {error.status()}: {error.message()}")
        except Exception as error:  # noqa: BLE001  the client's HTTP library has errors of many kinds
            return ConnectionError(f"no answer: {type(error).__name__}: {error}")


def _as_served(array: Array, tensor: Tensor) -> Array:
    """Return the array in the shape that clients see; the batch is its dim 0 where Triton may reshape it."""
    return array.reshape(array.shape[:1] + tensor.dims) if tensor.reshaped else array


def _judge(
    case: _Case,
    answer: Answer,
    kept: _Cases,
    result: _Result,
    declared: dict[str, Tensor],
    allowed: int,
    shapes: frozenset[str] = frozenset(),
) -> None:
    """Compare one answer with eager's outputs.

    Args:
        case: What was asked, and eager's outputs.
        answer: What the server answered.
        kept: Tolerances.
        result: Takes the errors and failures.
        declared: The outputs of config.pbtxt.
        allowed: How many tolerances the answer may be away.
        shapes: Outputs of which only shape and dtype are compared.
    """
    if isinstance(answer, Exception):
        result.failed(case.name, "", str(answer))
        return
    for name, right in case.outputs.items():
        found, expected = answer[name], _as_served(right, declared[name])
        if found is None:
            result.failed(case.name, name, "is not in the answer")
        elif found.dtype != expected.dtype:
            result.failed(case.name, name, f"found {found.dtype}, expected {expected.dtype}")
        elif found.shape != expected.shape:
            result.failed(case.name, name, f"found shape {list(found.shape)}, expected {list(expected.shape)}")
        elif kept.values and name not in shapes:
            tolerance = kept.tolerance.get(name, {"rtol": 0.0, "atol": 0.0})
            error, detail = _difference(found, expected, tolerance["rtol"] * allowed, tolerance["atol"] * allowed)
            result.error(name, error)
            if detail:
                result.failed(case.name, name, detail)


def _difference(found: Array, expected: Array, rtol: float, atol: float) -> tuple[float, str]:
    """Return the largest absolute error, and how the arrays differ, empty where they do not.

    NaN equals NaN and infinity equals infinity of the same sign; integers and bools are equal or not.
    """
    if found.dtype.kind != "f":
        wrong = found != expected
        if not wrong.any():
            return 0.0, ""
        at = np.argwhere(wrong)[0]
        error = float(np.max(np.abs(found.astype(np.float64) - expected.astype(np.float64))))
        one = f"at {at.tolist()} found {found[tuple(at)]}, expected {expected[tuple(at)]}"
        return error, f"{int(wrong.sum())} of {wrong.size} elements differ, {one}"
    wide, right = found.astype(np.float64), expected.astype(np.float64)
    same = (wide == right) | (np.isnan(wide) & np.isnan(right))
    with np.errstate(invalid="ignore"):
        errors = np.where(same, 0.0, np.abs(wide - right))
    limits = atol + rtol * np.where(np.isfinite(right), np.abs(right), 0.0)
    wrong = ~(errors <= limits)  # an error that is NaN or infinite is one
    finite = errors[np.isfinite(errors)]
    error = float(finite.max()) if finite.size else 0.0
    if not wrong.any():
        return error, ""
    over = np.where(np.isfinite(errors), errors - limits, np.inf)
    at = np.unravel_index(int(np.argmax(over)), over.shape)
    one = f"at {[int(i) for i in at]} found {wide[at]:.6g}, expected {right[at]:.6g} within {limits[at]:.2g}"
    if not np.isfinite(errors[at]):
        return math.inf, f"{int(wrong.sum())} of {wrong.size} elements differ, {one}"
    return error, f"max abs error {error:.3g}, {int(wrong.sum())} of {wrong.size} elements differ, {one}"


def _statistics(server: Server, path: str) -> dict[str, int]:
    found = server.get(f"{path}/stats")["model_stats"][0]
    return {"fail": int(found["inference_stats"]["fail"]["count"]), "executions": int(found["execution_count"])}


def _read_cases(path: Path) -> _Cases:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is not a dict
    cases = [_Case(entry["case"], {}, {}) for entry in json.loads(metadata["cases"])]
    for key, array in tensors.items():
        number, kind, name = key.split("/", 2)
        (cases[int(number)].inputs if kind == "input" else cases[int(number)].outputs)[name] = array
    return _Cases(
        cases,
        json.loads(metadata["tolerance"]),
        values=metadata.get("compare", "values") == "values",
        rows_apart=metadata.get("rows", "apart") == "apart",
        sensitive=frozenset(json.loads(metadata.get("sensitive", "[]"))),
    )


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    scratch.replace(path)
