"""Served answers against stored ones, on a real server: what passes, and what must not."""

from __future__ import annotations

import itertools
import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tritonbuild import server, smoke
from tritonbuild.errors import ServerError, SmokeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")


class Squares(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x * x, x.sum(1), x > 0


class Mixes(nn.Module):
    """Wrong in a batch of strangers: each row sees the others."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(0, keepdim=True)


class Divides(nn.Module):
    def forward(self, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        return x / 0, n * 2


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.rand_like(x)


CONFIGS = {
    "squares": """
        max_batch_size: 8
        input { name: "x" data_type: TYPE_FP32 dims: [ -1 ] }
        output { name: "square" data_type: TYPE_FP32 dims: [ -1 ] }
        output { name: "sum" data_type: TYPE_FP32 dims: [ 1 ] reshape { shape: [ ] } }
        output { name: "positive" data_type: TYPE_BOOL dims: [ -1 ] }
        dynamic_batching { preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100000 }
        parameters { key: "INFERENCE_MODE" value { string_value: "true" } }
        version_policy { specific { versions: [ 1 ] } }
        """,
    "mixes": """
        max_batch_size: 4
        input { name: "x" data_type: TYPE_FP32 dims: [ 3 ] }
        output { name: "y" data_type: TYPE_FP32 dims: [ 3 ] }
        dynamic_batching { max_queue_delay_microseconds: 100000 }
        """,
    "divides": """
        input { name: "x" data_type: TYPE_FP32 dims: [ -1, 2 ] }
        input { name: "n" data_type: TYPE_INT64 dims: [ 2 ] }
        output { name: "y" data_type: TYPE_FP32 dims: [ -1, 2 ] }
        output { name: "m" data_type: TYPE_INT64 dims: [ 2 ] }
        """,
    "stats": """
        max_batch_size: 2
        input { name: "x" data_type: TYPE_FP32 dims: [ 3 ] }
        output { name: "y" data_type: TYPE_FP32 dims: [ 3 ] }
        """,
    "random": """
        max_batch_size: 2
        input { name: "x" data_type: TYPE_FP32 dims: [ 3 ] }
        output { name: "y" data_type: TYPE_FP32 dims: [ 3 ] }
        """,
}
NAMES = {
    "squares": (["x"], ["square", "sum", "positive"]),
    "mixes": (["x"], ["y"]),
    "divides": (["x", "n"], ["y", "m"]),
    "random": (["x"], ["y"]),
    "stats": (["x"], ["y"]),
}
MODULES = {"squares": Squares(), "mixes": Mixes(), "divides": Divides(), "random": Random(), "stats": Doubles()}
ID = "[request id: <id_unknown>]"


def drawn(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(model: str) -> list[tuple[Tensor, ...]]:
    if model == "squares":
        return [(drawn((rows, width), rows),) for rows, width in ((1, 5), (2, 5), (5, 5), (8, 2))]
    if model == "divides":
        odd = torch.tensor([[0.0, 1.0], [-1.0, float("nan")]])
        return [(odd, torch.tensor([1, 2**40])), (odd[:1], torch.tensor([-1, 0]))]
    return [(drawn((rows, 3), rows),) for rows in (1, 2)]


def save(path: Path, model: str, metadata: dict[str, str] | None = None, **changed: Tensor) -> Path:
    """Write a model's cases; a keyword `_1_output_sum` replaces the tensor `1/output/sum`."""
    tensors, cases = {}, []
    for i, arguments in enumerate(inputs(model)):
        results = MODULES[model](*arguments)
        results = results if isinstance(results, tuple) else (results,)
        ins, outs = NAMES[model]
        tensors |= {f"{i}/input/{name}": tensor.clone() for name, tensor in zip(ins, arguments, strict=True)}
        tensors |= {f"{i}/output/{name}": tensor.clone() for name, tensor in zip(outs, results, strict=True)}
        cases.append({"case": f"batch={len(arguments[0])} seed={i}", "sizes": {}})
    for key, tensor in changed.items():
        tensors[key[1:].replace("_", "/", 2)] = tensor
    tolerance = {name: {"rtol": 1e-6, "atol": 1e-6} for name in NAMES[model][1]}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"cases": json.dumps(cases), "tolerance": json.dumps(tolerance), **(metadata or {})})
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smoke") / "models"
    for name, module in MODULES.items():
        (folder / name / "1").mkdir(parents=True)
        torch.jit.script(module).save(folder / name / "1" / "model.pt")
        head = f'name: "{name}"\nbackend: "pytorch"\nplatform: "pytorch_libtorch"\n'
        (folder / name / "config.pbtxt").write_text(head + CONFIGS[name])
    return folder


@pytest.fixture(scope="module")
def running(models: Path) -> Iterator[server.Server]:
    with server.embedded(models, models.parent / "build") as found:
        found.load(*MODULES)
        yield found


@pytest.fixture
def run(running: server.Server, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Smoke one model; say what came of it."""
    monkeypatch.chdir(tmp_path)

    def smoked(model: str, on: server.Server = running, version: int = 1, config: str = "", **saved: Any) -> Any:
        cases = save(tmp_path / "cases.safetensors", model, **saved)
        text = (models / model / "config.pbtxt").read_text()
        (tmp_path / "config.pbtxt").write_text(config or text)
        return smoke.run(on, model, version, cases, tmp_path / "config.pbtxt", tmp_path / "out" / "result.json")

    return smoked


def written(tmp_path: Path) -> Any:
    return json.loads((tmp_path / "out" / "result.json").read_text())


def test_a_right_model_passes_and_the_result_is_written(run: Any, running: server.Server, tmp_path: Path) -> None:
    result = run("squares")

    latency, seconds, mixed = (result.pop(name) for name in ("latency_ms", "seconds", "mixed"))
    assert result == {
        "verdict": "passed",
        "server": {"kind": "embedded", "version": "2.51.0", "url": running.url},
        "cases": 4,
        "max_abs_error": {"square": 0.0, "sum": pytest.approx(0, abs=1e-6), "positive": 0.0},
        "failures": [],
    }
    assert 0 < latency < 1000 * seconds
    # 8 rows of width 5 in 8 requests, or in fewer where one asks for two rows
    assert mixed["requests"] == 7
    assert 0 < mixed["executions"] < 7
    assert written(tmp_path) == {**result, "latency_ms": latency, "seconds": seconds, "mixed": mixed}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["result.json"]


def test_nan_infinity_and_large_integers_are_equal_to_themselves(run: Any) -> None:
    result = run("divides")

    assert (result["verdict"], result["max_abs_error"], result["mixed"]) == ("passed", {"y": 0.0, "m": 0.0}, None)


def test_a_server_that_runs_already(run: Any, running: server.Server) -> None:
    with server.at(f"http://{running.url}/") as found:
        result = run("squares", on=found)

    assert (result["verdict"], result["server"]["kind"]) == ("passed", "url")


def test_failures_that_only_the_server_counts(
    run: Any, running: server.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a server that ran before us may be another client's."""
    counts = itertools.count()
    monkeypatch.setattr(smoke, "_statistics", lambda *_: {"fail": next(counts), "executions": 0})
    with pytest.raises(SmokeError) as caught:
        run("stats")
    with server.at(running.url) as found:
        assert run("stats", on=found)["verdict"] == "passed"

    assert str(caught.value) == (
        "smoke stats/1: statistics: the server counts 1 failed requests, expected none\n    result: out/result.json"
    )


def test_a_wrong_answer_is_told_with_case_output_and_error(run: Any, tmp_path: Path) -> None:
    wrong = inputs("squares")[1][0] ** 2
    wrong[1, 2] += 0.5
    with pytest.raises(SmokeError) as caught:
        run("squares", _1_output_square=wrong)

    value = wrong[1, 2].item()
    assert str(caught.value) == (
        "smoke squares/1: batch=2 seed=1: output square: max abs error 0.5, 1 of 10 elements differ, "
        f"at [1, 2] found {value - 0.5:.6g}, expected {value:.6g} within {1e-6 + 1e-6 * abs(value):.2g}\n"
        "    result: out/result.json"
    )
    result = written(tmp_path)
    assert result["verdict"] == "failed"
    assert result["cases"] == 4
    assert result["max_abs_error"]["square"] == pytest.approx(0.5)
    assert result["failures"] == [
        {"case": "batch=2 seed=1", "output": "square", "detail": str(caught.value).split("square: ")[1].split("\n")[0]}
    ]


@pytest.mark.parametrize(
    ("model", "changed", "said"),
    [
        (
            "divides",
            {"_0_output_y": torch.tensor([[float("nan"), float("-inf")], [float("-inf"), float("nan")]])},
            "batch=2 seed=0: output y: 1 of 4 elements differ, at [0, 1] found inf, expected -inf within 1e-06",
        ),
        (
            "divides",
            {"_0_output_y": torch.tensor([[float("nan"), float("inf")], [float("-inf"), 7.0]])},
            "batch=2 seed=0: output y: 1 of 4 elements differ, at [1, 1] found nan, expected 7 within 8e-06",
        ),
        (
            "divides",
            {"_0_output_m": torch.tensor([2, 2**41 + 1])},
            "batch=2 seed=0: output m: 1 of 2 elements differ, at [1] found 2199023255552, expected 2199023255553",
        ),
        (
            "squares",
            {"_0_output_positive": ~(inputs("squares")[0][0] > 0)},
            "batch=1 seed=0: output positive: 5 of 5 elements differ, at [0, 0] found True, expected False",
        ),
        (
            "squares",
            {"_0_output_sum": inputs("squares")[0][0].double().sum(1)},
            "batch=1 seed=0: output sum: found float32, expected float64",
        ),
        (
            "squares",
            {"_0_output_sum": torch.zeros(2)},
            "batch=1 seed=0: output sum: found shape [1, 1], expected [2, 1]",
        ),
        (
            "squares",
            {"_0_input_x": torch.zeros(9, 5)},
            f"batch=1 seed=0: the server answered 400: {ID} inference request batch-size must be <= 8 for 'squares'",
        ),
    ],
)
def test_each_kind_of_difference(run: Any, model: str, changed: dict[str, Tensor], said: str) -> None:
    with pytest.raises(
        SmokeError, match="^" + re.escape(f"smoke {model}/1: {said}\n    result: out/result.json") + "$"
    ):
        run(model, **changed)


def test_an_error_that_is_not_finite_is_null_in_the_result(run: Any, tmp_path: Path) -> None:
    with pytest.raises(SmokeError):
        run("divides", _0_output_y=torch.zeros(2, 2))

    assert written(tmp_path)["max_abs_error"] == {"y": None, "m": 0.0}


def test_rows_that_the_batcher_mixes_must_stay_apart(run: Any, tmp_path: Path) -> None:
    with pytest.raises(SmokeError) as caught:
        run("mixes")

    first = re.compile(
        r"smoke mixes/1: rows mixed by the batcher: batch=\d seed=\d, from row \d: output y: max abs error [0-9.]+, "
        r"\d of [36] elements differ, at \[\d, \d\] found \S+, expected \S+ within \S+\n"
        r"    (and \d more; )?result: out/result.json"
    )
    assert first.fullmatch(str(caught.value))
    assert written(tmp_path)["cases"] == 2, "each case for itself was right"


def test_rows_that_may_mix_by_declaration_are_not_mixed(run: Any) -> None:
    assert run("mixes", metadata={"rows": "mixed"})["mixed"] is None


def test_an_output_that_amplifies_rounding_is_not_compared_where_rows_are_mixed(run: Any) -> None:
    assert run("mixes", metadata={"sensitive": '["y"]'})["mixed"]["requests"] == 3
    with pytest.raises(SmokeError, match=r": output y: found shape \[1, 3\], expected \[1, 4\]\n"):
        run("mixes", metadata={"sensitive": '["y"]'}, _0_output_y=torch.zeros(1, 4))


def test_a_model_may_have_the_name_of_a_path_of_the_server(run: Any) -> None:
    assert run("stats")["verdict"] == "passed"


def test_a_model_of_chance_is_compared_by_shape(run: Any) -> None:
    with pytest.raises(SmokeError):
        run("random", metadata={"compare": "values"})

    assert run("random", metadata={"compare": "shapes"})["verdict"] == "passed"
    with pytest.raises(SmokeError, match=r"output y: found shape \[1, 3\], expected \[1, 4\]\n"):
        run("random", metadata={"compare": "shapes"}, _0_output_y=torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("max_batch_size: 8", "max_batch_size: 16", "config: max_batch_size: found 8, expected 16"),
        ("[ 4, 8 ]", "[ 8 ]", "config: dynamic_batching.preferred_batch_size: found [4, 8], expected [8]"),
        ("100000", "1", "config: dynamic_batching.max_queue_delay_microseconds: found 100000, expected 1"),
        ('"true"', '"false"', "config: parameters[INFERENCE_MODE].string_value: found 'true', expected 'false'"),
        ("INFERENCE_MODE", "DISABLE_CUDNN", "config: parameters[DISABLE_CUDNN]: missing"),
        ("[ 1 ] } }", "[ 1, 2 ] } }", "config: version_policy.specific.versions: found [1], expected [1, 2]"),
        ("dynamic_batching", "sequence_batching { } #", "config: sequence_batching: missing"),
        ('input { name: "x"', 'input { name: "z"', "config: input[0].name: found 'x', expected 'z'"),
        ("[ -1 ] }\n        output", "[ 5 ] }\n        output", "config: input[0].dims: found [-1], expected [5]"),
        (
            'output { name: "sum" data_type: TYPE_FP32 dims: [ 1 ] reshape { shape: [ ] } }',
            "",
            "config: output: found 3 entries, expected 2",
        ),
    ],
)
def test_a_server_with_the_model_in_another_form(run: Any, models: Path, old: str, new: str, said: str) -> None:
    text = (models / "squares" / "config.pbtxt").read_text()
    assert old in text
    with pytest.raises(SmokeError) as caught:
        run("squares", config=text.replace(old, new, 1))

    first = str(caught.value).split("\n")[0]
    assert first == f"smoke squares/1: the server's model is not that of config.pbtxt: {said}"


def test_the_metadata_is_compared_too(run: Any, models: Path, tmp_path: Path) -> None:
    text = (models / "squares" / "config.pbtxt").read_text()
    with pytest.raises(SmokeError):
        run("squares", config=text.replace("TYPE_BOOL", "TYPE_UINT8"))

    assert [failure["detail"] for failure in written(tmp_path)["failures"]] == [
        "config: output[2].data_type: found 'TYPE_BOOL', expected 'TYPE_UINT8'",
        "metadata: outputs: positive: found BOOL [-1, -1], expected UINT8 [-1, -1]",
    ]


def test_cases_of_another_interface(run: Any) -> None:
    with pytest.raises(SmokeError) as caught:
        run("squares", _0_output_other=torch.zeros(1))

    assert str(caught.value) == (
        "smoke squares/1: the cases have other outputs than config.pbtxt: "
        "found other, positive, square, sum, expected positive, square, sum\n"
        "    result: out/result.json"
    )


def test_a_version_that_is_not_served(run: Any, tmp_path: Path) -> None:
    with pytest.raises(SmokeError) as caught:
        run("squares", version=7)

    assert str(caught.value) == (
        "smoke squares/7: the server serves 1 of this model, not 7\n"
        "    see version_policy under config: in pipeline.yaml"
    )
    assert written(tmp_path)["failures"] == [{"case": "", "output": "", "detail": str(caught.value)}]


def test_a_model_that_is_not_served(run: Any, running: server.Server, tmp_path: Path) -> None:
    with server.at(running.url) as found, pytest.raises(ServerError) as caught:
        smoke.run(found, "other", 1, tmp_path / "cases", tmp_path / "config.pbtxt", tmp_path / "out" / "result.json")

    assert str(caught.value) == (
        f"load other: the server at {running.url} does not serve this model; its models are: "
        "divides, mixes, random, squares, stats"
    )
    assert written(tmp_path)["verdict"] == "failed"


def test_a_server_that_ends_meanwhile(models: Path, run: Any, tmp_path: Path) -> None:
    """The cases of a server that is gone are not all waited for."""
    with server.embedded(models, tmp_path / "build") as gone:
        gone.load("divides")
        config = gone.get("/v2/models/divides/versions/1/config"), gone.get("/v2/models/divides/versions/1")
        stats = gone.get("/v2/models/divides/versions/1/stats")

    answers = {"config": config[0], "1": config[1], "stats": stats}
    gone.load = lambda *models: None  # type: ignore[method-assign]
    gone.versions = lambda model: ["1"]  # type: ignore[method-assign]
    gone.get = lambda path: answers[path.rsplit("/", 1)[1]]  # type: ignore[method-assign]
    with pytest.raises(SmokeError) as caught:
        run("divides", on=gone)

    first = str(caught.value).split("\n")[0]
    assert first == "smoke divides/1: batch=2 seed=0: no answer: ConnectionRefusedError: [Errno 111] Connection refused"
    assert written(tmp_path)["cases"] == 1


def test_equal_bits_need_no_tolerance() -> None:
    array = np.array([np.nan, np.inf, -np.inf, 0.0, 1e38], np.float32)

    assert smoke._difference(array, array.copy(), 0, 0) == (0.0, "")
    assert smoke._difference(array[3:], array[3:] + 1, 0, 1) == (1.0, "")
