"""The documented command makes the file that pipeline.yaml pins, without torch, whole or not at all."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file

from tritonbuild import spec

ROOT = Path(__file__).parents[2]


def make(*arguments: str, cwd: Path) -> None:
    subprocess.run([sys.executable, "-m", "zoo.make_weights", *arguments], cwd=cwd, check=True, timeout=60)


def test_the_command_makes_the_file_that_pipeline_yaml_pins(tmp_path: Path) -> None:
    weights = spec.load(ROOT / "pipeline.yaml").versions["resnet18"][2].weights
    assert weights
    make(weights.path, cwd=tmp_path)
    file = tmp_path / weights.path
    assert hashlib.sha256(file.read_bytes()).hexdigest() == weights.sha256
    assert [path.name for path in file.parent.iterdir()] == ["resnet18.safetensors"]


def test_it_is_a_state_dict_of_resnet18_with_answers_of_ordinary_size(tmp_path: Path) -> None:
    make("w.safetensors", cwd=tmp_path)
    weights = load_file(tmp_path / "w.safetensors")
    resnet = torchvision.models.resnet18().eval()
    own = resnet.state_dict()
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in own.items()
    }
    resnet.load_state_dict(weights)
    with torch.no_grad():
        logits = resnet(torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
    assert 0.1 < logits.std() < 10
    assert (logits[0] - logits[1]).abs().max() > 0.01


def test_another_seed_makes_another_file(tmp_path: Path) -> None:
    make("a.safetensors", cwd=tmp_path)
    make("b.safetensors", "--seed", "3", cwd=tmp_path)
    assert (tmp_path / "a.safetensors").read_bytes() != (tmp_path / "b.safetensors").read_bytes()


def test_torch_is_not_imported() -> None:
    program = "import sys, zoo.make_weights; sys.exit('torch' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
