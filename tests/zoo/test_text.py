"""The text encoder: padding, empty texts and lengths, and its trace against eager."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from zoo import text

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Saved


@pytest.fixture(scope="module")
def encoder(built: Callable[..., Any]) -> torch.nn.Module:
    return built(text.build, layers=2, hidden=128)


def texts(batch: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return ids and masks with holes; row 0 has every token, row 1 none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 30522, (batch, tokens), generator=generator)
    mask = torch.randint(0, 2, (batch, tokens), generator=generator)
    mask[:1] = 1
    mask[1:2] = 0
    return ids, mask


def test_rows_have_length_1_also_without_a_token(encoder: torch.nn.Module) -> None:
    embeddings = encoder(*texts(4, 9))
    assert embeddings.shape == (4, 128)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("tokens", [1, 2, 31, 512])
def test_a_row_is_what_it_is_alone(tokens: int, encoder: torch.nn.Module) -> None:
    ids, mask = texts(5, tokens)
    embeddings = encoder(ids, mask)
    for row in range(5):
        alone = encoder(ids[row : row + 1], mask[row : row + 1])[0]
        torch.testing.assert_close(alone, embeddings[row], rtol=1e-4, atol=1e-6)


def test_padding_does_not_count(encoder: torch.nn.Module) -> None:
    ids, mask = texts(3, 12)
    mask[:, 0] = 1
    padded_ids = torch.cat([ids, torch.full((3, 8), 7)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros(3, 8, dtype=torch.int64)], dim=1)
    expected = encoder(ids, mask)
    torch.testing.assert_close(encoder(padded_ids, padded_mask), expected, rtol=1e-4, atol=1e-6)
    padded_ids[:, 12:] = 30521
    torch.testing.assert_close(encoder(padded_ids, padded_mask), expected, rtol=1e-4, atol=1e-6)


def test_texts_order_and_masks_matter(encoder: torch.nn.Module) -> None:
    ids, mask = texts(1, 12)
    one = encoder(ids, mask)
    shorter = mask.clone()
    shorter[:, 6:] = 0
    for other in (encoder(ids.flip(1), mask), encoder(ids, shorter), encoder(texts(1, 12, seed=1)[0], mask)):
        assert (one - other).norm() > 0.1


def test_pooling_is_the_mean_over_tokens_or_the_first_place() -> None:
    features = torch.tensor([[[1.0, 10.0], [3.0, 30.0], [8.0, 80.0]]]).expand(3, 3, 2)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 1]])
    assert text.Pooling()(features, mask).tolist() == [[2.0, 20.0], [1.0, 10.0], [8.0, 80.0]]
    assert text.Pooling()(features[:1], mask[:1]).tolist() == [[2.0, 20.0]]


@pytest.mark.parametrize("example", [(2, 16), (1, 1)])
def test_a_trace_with_scripted_pooling_is_the_eager_encoder(
    example: tuple[int, int], encoder: torch.nn.Module, saved: Saved
) -> None:
    ids = torch.zeros(example, dtype=torch.int64)
    traced = saved(encoder, (ids, torch.ones_like(ids)), ["pooling"])
    for batch, tokens in ((1, 1), (1, 16), (2, 1), (3, 2), (8, 128), (1, 512), (5, 77)):
        drawn = texts(batch, tokens)
        expected = encoder(*drawn)
        for _ in range(3):
            assert torch.equal(traced(*drawn), expected), (batch, tokens)
        full = (drawn[0], torch.ones_like(drawn[1]))
        assert torch.equal(traced(*full), encoder(*full))
        empty = (drawn[0], torch.zeros_like(drawn[1]))
        assert torch.equal(traced(*empty), encoder(*empty))


def test_a_trace_of_pooling_freezes_the_branch_of_the_example(encoder: torch.nn.Module, saved: Saved) -> None:
    ids = torch.zeros(2, 16, dtype=torch.int64)
    traced = saved(encoder, (ids, torch.ones_like(ids)))
    drawn = texts(3, 16)
    assert torch.equal(traced(drawn[0][:1], drawn[1][:1]), encoder(drawn[0][:1], drawn[1][:1]))
    assert traced(*drawn)[1].isnan().all()
    assert encoder(*drawn).isfinite().all()


def test_heads_must_divide_the_hidden_size() -> None:
    with pytest.raises(ValueError, match=r"^hidden 130 must be a multiple of heads 4$"):
        text.build(hidden=130)
