"""Inception-ResNet-v1: facts of the paper, and its trace against eager."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from zoo.facenet import InceptionResnetV1

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Saved


@pytest.fixture(scope="module")
def facenet(built: Callable[..., Any]) -> torch.nn.Module:
    return built(InceptionResnetV1)


@pytest.fixture(scope="module")
def faces() -> torch.Tensor:
    return torch.rand(4, 3, 160, 160, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_it_has_the_published_number_of_parameters(facenet: torch.nn.Module) -> None:
    assert sum(parameter.numel() for parameter in facenet.parameters()) == 23_482_624


def test_the_grids_are_those_of_the_paper(facenet: Any, faces: torch.Tensor) -> None:
    after_stem = facenet.stem(faces[:1])
    after_a = facenet.reduction_a(facenet.blocks_a(after_stem))
    after_b = facenet.reduction_b(facenet.blocks_b(after_a))
    assert [tuple(grid.shape) for grid in (after_stem, after_a, after_b)] == [
        (1, 256, 17, 17),
        (1, 896, 8, 8),
        (1, 1792, 3, 3),
    ]
    assert facenet.stem(torch.zeros(1, 3, 299, 299)).shape == (1, 256, 35, 35)  # the paper's own size


def test_embeddings_lie_on_the_unit_sphere_and_apart(facenet: torch.nn.Module, faces: torch.Tensor) -> None:
    embeddings = facenet(faces)
    assert embeddings.shape == (4, 512)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))
    distances = torch.cdist(embeddings, embeddings)
    assert distances[~torch.eye(4, dtype=torch.bool)].min() > 0.01


def test_a_trace_is_right_for_every_batch_and_rows_do_not_mix(
    facenet: torch.nn.Module, faces: torch.Tensor, saved: Saved
) -> None:
    traced = saved(facenet, (faces[:2],))
    for batch in (1, 3, 4):
        assert torch.equal(traced(faces[:batch]), facenet(faces[:batch]))
    torch.testing.assert_close(facenet(faces)[2], facenet(faces[2:3])[0])
