"""The arithmetic between a detector's nets, against torchvision and against plain loops."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor

from zoo.boxes import Crop, likeliest, shifted, square, survivors


def scattered(n: int, seed: int) -> Tensor:
    """Return n boxes of sides 1 to 9 in a square of 20, so that most overlap."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * 20
    return torch.cat([corner, corner + 1 + torch.rand(n, 2, generator=generator) * 8], dim=1)


def greedy(boxes: Tensor, limit: float) -> list[int]:
    """Return what suppression by the smaller box keeps, one box after the other."""
    kept: list[int] = []
    for i, (left, top, right, bottom) in enumerate(boxes.tolist()):
        overlaps = []
        for k in kept:
            l2, t2, r2, b2 = boxes[k].tolist()
            shared = max(0.0, min(right, r2) - max(left, l2)) * max(0.0, min(bottom, b2) - max(top, t2))
            overlaps.append(shared / min((right - left) * (bottom - top), (r2 - l2) * (b2 - t2)))
        if all(overlap <= limit for overlap in overlaps):
            kept.append(i)
    return kept


@pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 100, 300])
@pytest.mark.parametrize("limit", [0.1, 0.5, 0.7])
def test_survivors_of_union_are_those_of_torchvision(n: int, limit: float) -> None:
    for seed in range(5):
        boxes = scattered(n, seed)
        expected = torchvision.ops.nms(boxes, torch.arange(n, 0, -1, dtype=torch.float32), limit)
        assert survivors(boxes, limit, False).tolist() == expected.tolist()


@pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 60])
def test_survivors_of_the_smaller_are_those_of_a_plain_loop(n: int) -> None:
    for seed in range(5):
        boxes = scattered(n, seed)
        assert survivors(boxes, 0.6, True).tolist() == greedy(boxes, 0.6)


def test_a_dropped_box_drops_none() -> None:
    chain = torch.tensor([[0.0, 0.0, 10.0, 10.0], [4.0, 0.0, 14.0, 10.0], [8.0, 0.0, 18.0, 10.0]])
    assert survivors(chain, 0.3, False).tolist() == [0, 2]


def test_an_overlap_of_exactly_the_limit_is_allowed() -> None:
    half = torch.tensor([[0.0, 0.0, 12.0, 12.0], [4.0, 0.0, 16.0, 12.0], [2.0, 0.0, 14.0, 12.0]])
    assert survivors(half, 0.5, False).tolist() == [0, 1]


def test_boxes_without_area_or_number_end_the_rounds() -> None:
    odd = torch.tensor([[3.0, 3.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [torch.nan] * 4, [torch.inf] * 4])
    assert survivors(odd, 0.5, False).tolist() == [0, 1, 2, 3]


def test_likeliest_are_above_the_threshold_and_keep_the_order_of_equals() -> None:
    scores = torch.tensor([0.3, 0.9, 0.5, torch.nan, 0.9, 0.50000006, 0.95])
    assert likeliest(scores, 0.5).tolist() == [6, 1, 4, 5]
    assert likeliest(scores, 0.4).tolist() == [6, 1, 4, 2, 5]
    assert likeliest(scores, 0.99).tolist() == []
    assert likeliest(torch.zeros(0), 0.1).tolist() == []


def test_shifted_moves_edges_by_parts_of_the_side() -> None:
    boxes = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
    assert shifted(boxes, torch.tensor([[0.5, -0.25, 0.0, 0.25]])).tolist() == [[20.0, 10.0, 30.0, 70.0]]


def test_square_keeps_the_centre_and_the_longer_side() -> None:
    boxes = torch.tensor([[0.0, 0.0, 4.0, 10.0], [5.0, 5.0, 5.0, 5.0], [9.0, 9.0, 3.0, 1.0]])
    assert square(boxes).tolist() == [[-3.0, 0.0, 7.0, 10.0], [4.5, 4.5, 5.5, 5.5], [5.5, 4.5, 6.5, 5.5]]


def test_a_crop_in_the_size_of_its_box_is_the_pixels_themselves() -> None:
    pixels = torch.arange(3 * 6 * 8, dtype=torch.float32).reshape(3, 6, 8)
    crops = Crop(4)(pixels, torch.tensor([[2.0, 1.0, 6.0, 5.0], [0.0, 0.0, 4.0, 4.0]]))
    torch.testing.assert_close(crops, torch.stack([pixels[:, 1:5, 2:6], pixels[:, 0:4, 0:4]]))


def test_a_crop_beyond_the_image_is_grey_there() -> None:
    crops = Crop(4)(torch.ones(3, 4, 4), torch.tensor([[-2.0, 0.0, 2.0, 4.0], [50.0, 50.0, 60.0, 60.0]]))
    assert crops[0, 0].tolist() == [[0.0, 0.0, 1.0, 1.0]] * 4
    assert not crops[1].any()


def test_a_crop_half_as_large_blends_four_pixels() -> None:
    pixels = torch.arange(3 * 16, dtype=torch.float32).reshape(3, 4, 4)
    expected = pixels.reshape(3, 2, 2, 2, 2).mean(dim=(2, 4))
    torch.testing.assert_close(Crop(2)(pixels, torch.tensor([[0.0, 0.0, 4.0, 4.0]]))[0], expected)


def test_no_boxes_give_no_crops() -> None:
    assert Crop(24)(torch.ones(3, 30, 40), torch.zeros(0, 4)).shape == (0, 3, 24, 24)
