"""What is different on a GPU: where models are traced and proved, and that another device is another trace."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tritonbuild import keys

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Project

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(keys.device_kind() != "cuda", reason="needs a GPU: this machine has none"),
]

PIPELINE = """\
triton: "26.07"
device: {device}
models:
  resnet18:
    entry_point: torchvision.models:resnet18
    max_batch_size: 4
    inputs: {{image: {{dtype: float32, shape: [batch, 3, 64, 64], range: [-2, 2]}}}}
  positions:
    entry_point: positions:Positions
    max_batch_size: 4
    axes: {{length: {{example: 8, min: 1, max: 32}}}}
    inputs: {{x: {{dtype: float32, shape: [batch, length]}}}}
"""
POSITIONS = """\
import torch


class Positions(torch.nn.Module):
    def forward(self, x):
        return x + torch.arange(x.shape[1], device=x.device)
"""


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_models_are_traced_and_proved_on_the_gpu(device: str, project: Callable[[dict[str, str]], Project]) -> None:
    made = project({"pipeline.yaml": PIPELINE.format(device=device), "positions.py": POSITIONS})
    ran = made.doit("trace", "config")
    assert ran.code == 0, ran.out
    for name in ("resnet18", "positions"):
        proof = json.loads((made.root / f".build/proof/{name}/1.json").read_text())
        assert proof["verdict"] == "passed"
        assert proof["device"].startswith("cuda")
        assert proof["settings"] == {"tf32": False, "cudnn_deterministic": True, "cudnn_benchmark": False}
    assert made.doit("trace", "config").tasks == []


def test_another_device_is_another_trace(project: Callable[[dict[str, str]], Project]) -> None:
    made = project({"pipeline.yaml": PIPELINE.format(device="auto"), "positions.py": POSITIONS})
    assert made.doit("trace").code == 0
    made.write({"pipeline.yaml": PIPELINE.format(device="cpu")})
    ran = made.doit("trace")
    assert (ran.code, ran.tasks) == (0, ["trace:resnet18/1", "trace:positions/1"])
    proof = json.loads((made.root / ".build/proof/positions/1.json").read_text())
    assert proof["device"] == "cpu"
