"""FaceNet: a 160 x 160 face to a point on the unit sphere in 512 dimensions; near points are the same person.

The network is Inception-ResNet-v1 as it is used for faces: one more block of the last kind, without an
activation, and a linear embedding in place of the classifier.

Source: F. Schroff, D. Kalenichenko, J. Philbin, "FaceNet: A Unified Embedding for Face Recognition and
Clustering", CVPR 2015, section 3; C. Szegedy, S. Ioffe, V. Vanhoucke, A. Alemi, "Inception-v4,
Inception-ResNet and the Impact of Residual Connections on Learning", 2016: figures 10 to 14, table 1, and
section 3.3 for the scaling of residuals.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor, nn


class InceptionResnetV1(nn.Module):
    """Face embedding.

    Args:
        embedding: Dimensions of the embedding.

    Args (forward):
        image: float32 [batch, 3, 160, 160], one face each, values around [-1, 1].

    Returns (forward):
        float32 [batch, embedding], rows of length 1.
    """

    def __init__(self, embedding: int = 512) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            Convolution(3, 32, 3, stride=2),
            Convolution(32, 32, 3),
            Convolution(32, 64, 3, padding=1),
            nn.MaxPool2d(3, 2),
            Convolution(64, 80, 1),
            Convolution(80, 192, 3),
            Convolution(192, 256, 3, stride=2),
        )
        self.blocks_a = nn.Sequential(*(block_a() for _ in range(5)))
        self.reduction_a = Reduction(
            Convolution(256, 384, 3, stride=2),
            nn.Sequential(
                Convolution(256, 192, 1),
                Convolution(192, 192, 3, padding=1),
                Convolution(192, 256, 3, stride=2),
            ),
        )
        self.blocks_b = nn.Sequential(*(block_b() for _ in range(10)))
        self.reduction_b = Reduction(
            nn.Sequential(Convolution(896, 256, 1), Convolution(256, 384, 3, stride=2)),
            nn.Sequential(Convolution(896, 256, 1), Convolution(256, 256, 3, stride=2)),
            nn.Sequential(
                Convolution(896, 256, 1),
                Convolution(256, 256, 3, padding=1),
                Convolution(256, 256, 3, stride=2),
            ),
        )
        self.blocks_c = nn.Sequential(*(block_c() for _ in range(5)), block_c(scale=1.0, last=True))
        self.embedding = nn.Linear(1792, embedding, bias=False)
        self.normalisation = nn.BatchNorm1d(embedding, eps=1e-3)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, image: Tensor) -> Tensor:
        features = self.stem(image)
        features = self.reduction_a(self.blocks_a(features))
        features = self.reduction_b(self.blocks_b(features))
        pooled = self.blocks_c(features).mean(dim=(2, 3))
        return F.normalize(self.normalisation(self.embedding(pooled)), dim=1)


class Convolution(nn.Sequential):
    """Convolution without bias, batch normalisation, ReLU: the unit that the papers draw as one box."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False),
            nn.BatchNorm2d(channels_out, eps=1e-3),
            nn.ReLU(),
        )


class Residual(nn.Module):
    """Parallel branches, joined by a 1 x 1 convolution, scaled, added to what came in.

    Args:
        branches: Each takes float32 [batch, channels, height, width] and keeps height and width.
        joined: Channels of all branches together.
        channels: Channels in and out.
        scale: What the sum of the branches is multiplied by; small ones keep deep networks stable.
        last: Leave the ReLU out.
    """

    def __init__(self, *branches: nn.Module, joined: int, channels: int, scale: float, last: bool) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.join = nn.Conv2d(joined, channels, 1)
        self.scale = scale
        self.activation = nn.Identity() if last else nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        joined = torch.cat([branch(features) for branch in self.branches], dim=1)
        result: Tensor = self.activation(features + self.scale * self.join(joined))
        return result


def block_a() -> Residual:
    """Return an Inception-ResNet-A block (figure 10): 256 channels."""
    return Residual(
        Convolution(256, 32, 1),
        nn.Sequential(Convolution(256, 32, 1), Convolution(32, 32, 3, padding=1)),
        nn.Sequential(Convolution(256, 32, 1), Convolution(32, 32, 3, padding=1), Convolution(32, 32, 3, padding=1)),
        joined=96,
        channels=256,
        scale=0.17,
        last=False,
    )


def block_b() -> Residual:
    """Return an Inception-ResNet-B block (figure 11): 896 channels."""
    return Residual(
        Convolution(896, 128, 1),
        nn.Sequential(
            Convolution(896, 128, 1),
            Convolution(128, 128, (1, 7), padding=(0, 3)),
            Convolution(128, 128, (7, 1), padding=(3, 0)),
        ),
        joined=256,
        channels=896,
        scale=0.10,
        last=False,
    )


def block_c(scale: float = 0.20, last: bool = False) -> Residual:
    """Return an Inception-ResNet-C block (figure 13): 1792 channels."""
    return Residual(
        Convolution(1792, 192, 1),
        nn.Sequential(
            Convolution(1792, 192, 1),
            Convolution(192, 192, (1, 3), padding=(0, 1)),
            Convolution(192, 192, (3, 1), padding=(1, 0)),
        ),
        joined=384,
        channels=1792,
        scale=scale,
        last=last,
    )


class Reduction(nn.Module):
    """Branches of stride 2 beside a max-pooling of stride 2: half the size, all channels side by side."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList([*branches, nn.MaxPool2d(3, 2)])

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([branch(features) for branch in self.branches], dim=1)
