"""What a detector does between its nets: choose, suppress, move and crop boxes.

Plain torch: torchvision's operators are unknown to a server that carries only libtorch. A detector's answer
jumps where a comparison is a tie, so near-equal scores keep their order here and no coordinate is ever
rounded. A box is left, top, right, bottom in pixels; pixel i reaches from i to i + 1.

Source: Z. Zheng et al., "Enhancing Geometric Factors in Model Learning and Inference for Object Detection and
Instance Segmentation", 2020 (Cluster-NMS), for suppression as a fixed point.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor, nn


class Crop(nn.Module):
    """Square crops of one image, resized bilinearly; what lies beyond the image is 0, the middle grey.

    Args:
        side: Height and width of a crop.

    Args (forward):
        pixels: float32 [3, height, width]; boxes: float32 [n, 4], left, top, right, bottom in pixels.

    Returns (forward):
        float32 [n, 3, side, side].
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        # A buffer, not made in forward: a trace would write the device of the example into the program.
        self.steps: Tensor = nn.Buffer((torch.arange(side) + 0.5) / side, persistent=False)

    def forward(self, pixels: Tensor, boxes: Tensor) -> Tensor:
        left, top, right, bottom = boxes.unsqueeze(2).unbind(1)
        x = (left + (right - left) * self.steps) / pixels.shape[2] * 2 - 1
        y = (top + (bottom - top) * self.steps) / pixels.shape[1] * 2 - 1
        columns = x.unsqueeze(1).expand(-1, self.side, -1)
        rows = y.unsqueeze(2).expand(-1, -1, self.side)
        # All crops are sampled as one tall crop, because grid_sample wants as many images as grids.
        grid = torch.stack([columns, rows], dim=3).flatten(0, 1).unsqueeze(0)
        crops = F.grid_sample(pixels.unsqueeze(0), grid, mode="bilinear", align_corners=False)
        return crops.reshape(3, -1, self.side, self.side).transpose(0, 1)


def likeliest(scores: Tensor, threshold: float) -> Tensor:
    """Return int64 [n], the positions of the float32 [all] `scores` above the threshold, the highest first.

    Scores are ordered in steps of 1/1024, within a step as they come: in a regular pattern many are equal but
    for their last bits, and those depend on the machine. A score that is not a number passes no threshold.
    """
    passing = torch.nonzero(scores > threshold).squeeze(1)
    steps = (scores[passing] * 1024.0).round()
    return passing[torch.sort(steps, dim=0, descending=True, stable=True)[1]]


def survivors(boxes: Tensor, limit: float, of_smaller: bool) -> Tensor:
    """Return int64 [m], the boxes that greedy non-maximum suppression keeps, in order.

    A box is dropped if a kept one before it overlaps it by more than `limit`. Instead of box by box this goes
    round by round over all pairs: after round k the first k answers are final, so the only fixed point is the
    greedy answer; most images need a handful of rounds.

    Args:
        boxes: float32 [n, 4], the most important first.
        limit: The overlap that is still allowed, as a part of the union.
        of_smaller: Take it as a part of the smaller box instead.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0)
    areas = sides[:, 0] * sides[:, 1]
    upper_left = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    lower_right = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    overlap_sides = (lower_right - upper_left).clamp(min=0)
    overlap = overlap_sides[:, :, 0] * overlap_sides[:, :, 1]
    union = areas[:, None] + areas[None, :] - overlap
    whole = torch.minimum(areas[:, None], areas[None, :]) if of_smaller else union
    drops = torch.triu(overlap > whole * limit, diagonal=1)
    kept = torch.ones_like(areas, dtype=torch.bool)
    settled = False
    while not settled:
        once_more = torch.logical_not((drops & kept[:, None]).any(dim=0))
        settled = torch.equal(once_more, kept)
        kept = once_more
    return torch.nonzero(kept).squeeze(1)


def shifted(boxes: Tensor, offsets: Tensor) -> Tensor:
    """Return the float32 [n, 4] boxes with each edge moved by its offset times the box's width or height."""
    size = boxes[:, 2:] - boxes[:, :2]
    return boxes + offsets * torch.cat([size, size], dim=1)


def square(boxes: Tensor) -> Tensor:
    """Return float32 [n, 4] squares about the boxes' centres: their longer side, at least one pixel."""
    half = (boxes[:, 2:] - boxes[:, :2]).max(dim=1, keepdim=True)[0].clamp(min=1.0) / 2
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    return torch.cat([centre - half, centre + half], dim=1)
