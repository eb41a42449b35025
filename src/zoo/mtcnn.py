"""MTCNN, the cascaded face detector: P-Net, R-Net, O-Net, and the whole of it as one model, `Detector`.

The nets are convolutions and are right as traces. What stands between them depends on the image: how many
levels its pyramid has, which cells pass a threshold, which boxes suppress which. Those four stages are
submodules of their own (`pyramid`, `propose`, `refine`, `decide`), so that pipeline.yaml can have them
scripted inside a trace.

A detector's answer jumps where a comparison is a tie, so no comparison here hangs on the last bit of a
number: see `boxes`, and `Propose`, where boxes of one level are compared in whole pixels.

Source: K. Zhang, Z. Zhang, Z. Li, Y. Qiao, "Joint Face Detection and Alignment Using Multitask Cascaded
Convolutional Networks", IEEE Signal Processing Letters 23(10), 2016; figures 1 and 2. The numbers that the
paper leaves open (pyramid factor, overlaps) are the usual ones.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor, nn

from zoo.boxes import Crop, likeliest, shifted, square, survivors

if TYPE_CHECKING:
    from collections.abc import Sequence

WINDOW = 12
"""Side of the square of pixels that one cell of P-Net's map sees."""

STRIDE = 2
"""Pixels from one cell of P-Net's map to the next."""


class PNet(nn.Module):
    """Proposal network: for each 12 x 12 window of the image, every two pixels: is it a face, where exactly.

    Args (forward):
        image: float32 [batch, 3, height, width], values around [-1, 1]; height and width from 12.

    Returns (forward):
        probabilities: float32 [batch, 2, rows, columns], no face and face, sum 1; rows = ceil(height / 2) -
            5.
        offsets: float32 [batch, 4, rows, columns], to add to left, top, right, bottom, as parts of the
            window.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 10, 3),
            nn.PReLU(10),
            nn.MaxPool2d(2, 2, ceil_mode=True),
            nn.Conv2d(10, 16, 3),
            nn.PReLU(16),
            nn.Conv2d(16, 32, 3),
            nn.PReLU(32),
        )
        self.face = nn.Conv2d(32, 2, 1)
        self.offsets = nn.Conv2d(32, 4, 1)
        _initialise(self)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(image)
        return self.face(features).softmax(dim=1), self.offsets(features)


class RNet(nn.Module):
    """Refinement network: is the 24 x 24 crop a face, and where exactly.

    Args (forward):
        crop: float32 [batch, 3, 24, 24], values around [-1, 1].

    Returns (forward):
        probabilities: float32 [batch, 2]; offsets: float32 [batch, 4], as in `PNet`, as parts of the crop.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 28, 3),
            nn.PReLU(28),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Conv2d(28, 48, 3),
            nn.PReLU(48),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Conv2d(48, 64, 2),
            nn.PReLU(64),
            nn.Flatten(),
            nn.Linear(64 * 3 * 3, 128),
            nn.PReLU(128),
        )
        self.face = nn.Linear(128, 2)
        self.offsets = nn.Linear(128, 4)
        _initialise(self)

    def forward(self, crop: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(crop)
        return self.face(features).softmax(dim=1), self.offsets(features)


class ONet(nn.Module):
    """Output network: is the 48 x 48 crop a face, where exactly, and where are its five landmarks.

    Args (forward):
        crop: float32 [batch, 3, 48, 48], values around [-1, 1].

    Returns (forward):
        probabilities: float32 [batch, 2]; offsets: float32 [batch, 4], as in `PNet`, as parts of the crop.
        landmarks: float32 [batch, 5, 2], x and y of eyes, nose, corners of the mouth, as parts of the crop.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3),
            nn.PReLU(32),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Conv2d(32, 64, 3),
            nn.PReLU(64),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Conv2d(64, 64, 3),
            nn.PReLU(64),
            nn.MaxPool2d(2, 2, ceil_mode=True),
            nn.Conv2d(64, 128, 2),
            nn.PReLU(128),
            nn.Flatten(),
            nn.Linear(128 * 3 * 3, 256),
            nn.PReLU(256),
        )
        self.face = nn.Linear(256, 2)
        self.offsets = nn.Linear(256, 4)
        self.landmarks = nn.Linear(256, 10)
        _initialise(self)

    def forward(self, crop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.features(crop)
        landmarks = self.landmarks(features).unflatten(1, (5, 2))
        return self.face(features).softmax(dim=1), self.offsets(features), landmarks


class Detector(nn.Module):
    """The whole of MTCNN: an image in, a variable number of faces out.

    Args:
        smallest_face: Side in pixels of the smallest face to look for.
        shrink: Size of a pyramid level as a part of the one before.
        thresholds: The face probabilities that P-Net's, R-Net's and O-Net's boxes must exceed.
        most: Windows that P-Net hands on at most, the likeliest: it bounds the time that an image can take.

    Args (forward):
        image: uint8 [3, height, width], any size; no face is found in one smaller than `smallest_face`.

    Returns (forward), the likeliest face first, n = 0 where there is none:
        boxes: float32 [n, 4], left, top, right, bottom in pixels of the image; they may reach beyond it.
        scores: float32 [n], the face probability.
        landmarks: float32 [n, 5, 2], x and y in pixels of the image.
    """

    def __init__(
        self,
        smallest_face: float = 20.0,
        shrink: float = 0.709,
        thresholds: Sequence[float] = (0.6, 0.7, 0.7),
        most: int = 512,
    ) -> None:
        super().__init__()
        proposal, refinement, decision = thresholds
        self.pyramid = Pyramid(float(smallest_face), float(shrink))
        self.pnet = PNet()
        self.propose = Propose(float(proposal), most)
        self.crop_24 = Crop(24)
        self.rnet = RNet()
        self.refine = Refine(float(refinement))
        self.crop_48 = Crop(48)
        self.onet = ONet()
        self.decide = Decide(float(decision))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pixels = (image.to(torch.float32) - 127.5) / 128.0
        mosaic, cells, windows = self.pyramid(pixels)
        boxes = self.propose(*self.pnet(mosaic), cells, windows)
        boxes = self.refine(*self.rnet(self.crop_24(pixels, boxes)), boxes)
        boxes, scores, landmarks = self.decide(*self.onet(self.crop_48(pixels, boxes)), boxes)
        return boxes, scores, landmarks


class Pyramid(nn.Module):
    """The image at all scales, side by side in one mosaic: P-Net runs once, however many levels there are.

    A cell of P-Net sees 12 x 12 pixels and nothing else. So a cell whose window lies inside one level has the
    value that it would have in that level alone, provided that the level starts at a multiple of P-Net's
    stride; the other cells of the mosaic are left out.
    """

    def __init__(self, smallest_face: float, shrink: float) -> None:
        super().__init__()
        if smallest_face <= 0 or not 0 < shrink < 1:
            raise ValueError(f"smallest_face {smallest_face} must be above 0 and shrink {shrink} between 0 and 1")
        self.largest_scale = WINDOW / smallest_face
        self.shrink = shrink
        self.window = WINDOW
        self.stride = STRIDE

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mosaic, the cells of P-Net's map that count, and their windows.

        Args:
            pixels: float32 [3, height, width].

        Returns:
            mosaic: float32 [1, 3, mosaic height, mosaic width], at least 12 x 12.
            cells: int64 [n], positions in the flattened map of P-Net over the mosaic, level by level.
            windows: float32 [n, 4], what each of them sees: left, top, right, bottom in pixels of the image.
        """
        height = pixels.shape[-2]
        width = pixels.shape[-1]
        sizes: list[tuple[int, int]] = []
        scale = self.largest_scale
        while min(height, width) * scale >= self.window:
            sizes.append((math.ceil(height * scale), math.ceil(width * scale)))
            scale = scale * self.shrink

        mosaic_height = self.window
        mosaic_width = 0
        for level_height, level_width in sizes:
            mosaic_height = max(mosaic_height, level_height)
            mosaic_width += level_width + level_width % self.stride
        mosaic_width = max(mosaic_width, self.window)
        # The width is even, so no cell's window is cut off on the right: P-Net's map has exactly these columns.
        columns = (mosaic_width - self.window) // self.stride + 1

        device = pixels.device
        mosaic = torch.zeros([1, pixels.shape[0], mosaic_height, mosaic_width], device=device)
        cells = [torch.zeros([0], dtype=torch.int64, device=device)]
        windows = [torch.zeros([0, 4], device=device)]
        left = 0
        for level_height, level_width in sizes:
            level = F.interpolate(pixels.unsqueeze(0), size=[level_height, level_width], mode="area")
            mosaic[:, :, :level_height, left : left + level_width] = level
            rows_here = (level_height - self.window) // self.stride + 1
            columns_here = (level_width - self.window) // self.stride + 1
            row = torch.arange(rows_here, device=device).repeat_interleave(columns_here)
            column = torch.arange(columns_here, device=device).repeat(rows_here)
            cells.append(row * columns + left // self.stride + column)
            x = column.to(torch.float32) * self.stride
            y = row.to(torch.float32) * self.stride
            corners = torch.stack([x, y, x + self.window, y + self.window], dim=1)
            to_image = torch.tensor([width / level_width, height / level_height], device=device)
            windows.append(corners * to_image.repeat(2))
            left += level_width + level_width % self.stride
        return mosaic, torch.cat(cells), torch.cat(windows)


class Propose(nn.Module):
    """P-Net's map to square boxes: threshold, suppression in each level and across levels, offsets."""

    def __init__(self, threshold: float, most: int) -> None:
        super().__init__()
        if most < 1:
            raise ValueError(f"most {most} must be at least 1")
        self.threshold = threshold
        self.most = most
        self.window = WINDOW
        self.stride = STRIDE

    def forward(self, probabilities: Tensor, offsets: Tensor, cells: Tensor, windows: Tensor) -> Tensor:
        """Return float32 [n, 4] square boxes in pixels of the image, the likeliest first.

        Args:
            probabilities: float32 [1, 2, rows, columns]; offsets: float32 [1, 4, rows, columns].
            cells: int64 [cells], positions in the flattened map.
            windows: float32 [cells, 4], what they see, in pixels of the image.
        """
        columns = probabilities.shape[3]
        scores = probabilities[0, 1].flatten()[cells]
        chosen = likeliest(scores, self.threshold)[: self.most]
        # Levels do not overlap in the mosaic, so suppression there is suppression within each level; and its
        # coordinates are whole numbers: two windows four pixels apart overlap by exactly one half, a tie that
        # scaled coordinates would break by their last bit.
        x = (cells[chosen] % columns).to(torch.float32) * self.stride
        y = cells[chosen].div(columns, rounding_mode="floor").to(torch.float32) * self.stride
        chosen = chosen[survivors(torch.stack([x, y, x + self.window, y + self.window], dim=1), 0.5, False)]
        chosen = chosen[survivors(windows[chosen], 0.7, False)]
        return square(shifted(windows[chosen], offsets[0].flatten(1)[:, cells[chosen]].t()))


class Refine(nn.Module):
    """R-Net's answers to square boxes: threshold, suppression, offsets."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, probabilities: Tensor, offsets: Tensor, boxes: Tensor) -> Tensor:
        """Return float32 [m, 4] square boxes, the likeliest first, from the `boxes` that R-Net looked at.

        Args:
            probabilities: float32 [n, 2]; offsets: float32 [n, 4].
            boxes: float32 [n, 4], pixels of the image.
        """
        chosen = likeliest(probabilities[:, 1], self.threshold)
        chosen = chosen[survivors(boxes[chosen], 0.7, False)]
        return square(shifted(boxes[chosen], offsets[chosen]))


class Decide(nn.Module):
    """O-Net's answers to faces: threshold, offsets, suppression."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(
        self, probabilities: Tensor, offsets: Tensor, landmarks: Tensor, boxes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the faces among the `boxes` that O-Net looked at, as `Detector` returns them.

        Args:
            probabilities: float32 [n, 2]; offsets: float32 [n, 4]; landmarks: float32 [n, 5, 2].
            boxes: float32 [n, 4], pixels of the image.
        """
        chosen = likeliest(probabilities[:, 1], self.threshold)
        faces = shifted(boxes[chosen], offsets[chosen])
        kept = survivors(faces, 0.7, True)
        chosen = chosen[kept]
        corner = boxes[chosen][:, :2].unsqueeze(1)
        size = (boxes[chosen][:, 2:] - boxes[chosen][:, :2]).unsqueeze(1)
        return faces[kept], probabilities[chosen, 1], corner + landmarks[chosen] * size


def _initialise(net: PNet | RNet | ONet) -> None:
    """Draw weights that keep the signal's size from layer to layer, and small offsets: boxes stay boxes."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, a=0.25)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    with torch.no_grad():
        net.offsets.weight *= 0.1
