"""A small U-Net that labels every pixel and, like torchvision's segmentation models, returns a dict.

Triton carries tensors, not dicts: the build flattens `{"out": ..., "aux": ...}` to two outputs in the order
of the dict. Height and width may vary, but only in steps of 8: three times the image is halved, and each half
meets its double again on the way up.

Source: O. Ronneberger, P. Fischer, T. Brox, "U-Net: Convolutional Networks for Biomedical Image
Segmentation", MICCAI 2015, section 2 and figure 1 (convolutions here are padded, so that the answer is as
large as the image); H. Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017, section 3.3, for the
auxiliary answer of a deep layer.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor, nn


class UNet(nn.Module):
    """Semantic segmentation.

    Args:
        classes: Labels that a pixel may have.
        width: Channels at full size; each halving of the image doubles them.

    Args (forward):
        image: float32 [batch, 3, height, width], height and width multiples of 8.

    Returns (forward):
        {"out": float32 [batch, classes, height, width], "aux": the same, from the smallest image}, not
        normalised.
    """

    def __init__(self, classes: int = 5, width: int = 12) -> None:
        super().__init__()
        channels = [width, 2 * width, 4 * width, 8 * width]
        self.entry = twice(3, channels[0])
        self.down = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), twice(fine, coarse)) for fine, coarse in pairwise(channels)
        )
        self.enlarge = nn.ModuleList(
            nn.ConvTranspose2d(coarse, fine, 2, stride=2)
            for fine, coarse in zip(channels[-2::-1], channels[:0:-1], strict=True)
        )
        self.merge = nn.ModuleList(twice(2 * fine, fine) for fine in channels[-2::-1])
        self.label = nn.Conv2d(channels[0], classes, 1)
        self.label_coarse = nn.Conv2d(channels[-1], classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features = self.entry(image)
        passed = []
        for down in self.down:
            passed.append(features)
            features = down(features)
        coarse = self.label_coarse(features)
        for enlarge, merge in zip(self.enlarge, self.merge, strict=True):
            features = merge(torch.cat([passed.pop(), enlarge(features)], dim=1))
        aux = F.interpolate(coarse, size=image.shape[-2:], mode="bilinear", align_corners=False)
        return {"out": self.label(features), "aux": aux}


def twice(channels_in: int, channels_out: int) -> nn.Sequential:
    """Return two 3 x 3 convolutions, each with batch normalisation and ReLU; height and width stay."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
        nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )
