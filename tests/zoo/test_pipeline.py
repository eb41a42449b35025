"""The example pipeline.yaml is valid, and what it declares is what its entry points do."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tritonbuild import spec

if TYPE_CHECKING:
    from collections.abc import Callable

PIPELINE = spec.load(Path(__file__).parents[2] / "pipeline.yaml")


def draw(version: spec.ModelVersion, seed: int) -> list[torch.Tensor]:
    """Return inputs of the example sizes, uniform in their declared ranges."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for declared in version.inputs.values():
        shape = [version.all_axes[size].example if isinstance(size, str) else size for size in declared.shape]
        assert declared.range
        low, high = declared.range
        dtype = getattr(torch, declared.dtype)
        if dtype.is_floating_point:
            drawn.append((torch.rand(shape, generator=generator) * (high - low) + low).to(dtype))
        else:
            drawn.append(torch.randint(int(low), int(high) + 1, shape, generator=generator, dtype=dtype))
    return drawn


def flat(answers: Any) -> list[torch.Tensor]:
    match answers:
        case dict():
            return list(answers.values())
        case tuple():
            return list(answers)
    return [answers]


def test_it_shows_what_it_should() -> None:
    assert [version.label for version in PIPELINE.all_versions()] == [
        "resnet18/1",
        "resnet18/2",
        "facenet/1",
        "pnet/1",
        "rnet/1",
        "onet/1",
        "mtcnn/1",
        "text_encoder/1",
        "segmentation/1",
    ]


@pytest.mark.parametrize("label", [version.label for version in PIPELINE.all_versions()])
def test_every_output_is_declared_and_depends_on_the_input(label: str, built: Callable[..., Any]) -> None:
    version = next(version for version in PIPELINE.all_versions() if version.label == label)
    module, _, attribute = version.entry_point.partition(":")
    net = built(getattr(importlib.import_module(module), attribute), seed=version.seed, **version.kwargs)
    one, other = (flat(net(*draw(version, seed))) for seed in (0, 1))
    assert len(one) == len(other) == len(version.outputs)
    for a, b in zip(one, other, strict=True):
        assert a.shape != b.shape or (a - b).abs().max() > 1e-3
