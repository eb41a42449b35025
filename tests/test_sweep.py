"""The sweep over torchvision: what it declares, and that its rows say what the build found."""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path


def load() -> Any:
    spec = importlib.util.spec_from_file_location("torchvision_sweep", ROOT / "benchmarks/torchvision_sweep.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


sweep = load()


def test_what_is_wanted_is_small_or_a_detector() -> None:
    found = {each.name: each for each in sweep.subjects(["resnet18", "vit_b_16", "regnet_y_400mf", "fcos*", "raft*"])}
    assert [*found] == ["regnet_y_400mf", "resnet18", "fcos_resnet50_fpn"]
    assert found["resnet18"].parameters == 11_689_512
    assert found["regnet_y_400mf"].parameters == 4_344_144
    assert found["resnet18"].declaration() == {
        "entry_point": "torchvision.models.resnet:resnet18",
        "kwargs": {"weights": None},
        "max_batch_size": 2,
        "axes": {"height": {"example": 48, "min": 32, "max": 64}, "width": {"example": 48, "min": 32, "max": 64}},
        "inputs": {"image": {"dtype": "float32", "shape": ["batch", 3, "height", "width"], "range": [-2, 2]}},
        "trace": {"cases": 6, "budget_s": 5},
    }


@pytest.mark.slow
def test_two_models_are_built_proved_and_served(tmp_path: Path) -> None:
    chosen = sweep.subjects(["squeezenet1_1", "shufflenet_v2_x0_5"])
    rows = sweep.sweep(chosen, tmp_path)
    assert [(row["model"], row["verdict"], row["smoke"], row["candidate"], row["reason"]) for row in rows] == [
        ("squeezenet1_1", "passed", "passed", "trace", ""),
        ("shufflenet_v2_x0_5", "passed", "passed", "trace", ""),
    ]
    assert all(row["apart"] < 1e-5 for row in rows)
    text = sweep.page(rows, sweep.subjects(["resnet18"]), "2000-01-01")
    assert "2 pass and are served, 0 do not, 1 were not run." in text
    assert "## Not run\n\n`resnet18`\n" in text


def test_a_model_that_stops_is_listed_with_its_reason(tmp_path: Path) -> None:
    (subject,) = sweep.subjects(["squeezenet1_1"])
    proof = tmp_path / ".build/proof/squeezenet1_1/1.json"
    proof.parent.mkdir(parents=True)
    proof.write_text(json.dumps({"verdict": "failed", "error": "trace squeezenet1_1/1: frozen-size: case batch=1"}))
    row = sweep.row(subject, tmp_path)
    assert (row["verdict"], row["smoke"], row["max_abs_error"]) == ("failed", "not run", None)
    assert (
        "* **squeezenet1_1** (1.2 M, batch, height, width, 32 to 64): trace squeezenet1_1/1: frozen-size: case batch=1"
        in sweep.page([row], [], "2000-01-01")
    )


def test_the_second_look_sees_a_wrong_script(tmp_path: Path) -> None:
    (subject,) = sweep.subjects(["squeezenet1_1"])
    wrong = torch.jit.trace(
        torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()), torch.ones(1, 3, 9, 9)
    )
    torch.jit.save(wrong, str(tmp_path / "model.pt"))
    assert sweep.compare(subject, tmp_path / "model.pt", draws=1)["apart"] == float("inf")
