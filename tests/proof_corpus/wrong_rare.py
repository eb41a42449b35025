"""Wrong at rare sizes or values only: chance on a way that is hardly gone, rows that hardly mix; scripts, too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from corpus import wrong
from torch import nn


@wrong("nondeterministic", method="script", x="float32 batch t 4", t=(16, 1, 200))
class CropOfLong(nn.Module):
    def forward(self, x):
        if x.shape[1] > 100:
            start = int(torch.randint(0, x.shape[1] - 100 + 1, (1,)))
            x = x[:, start : start + 100]
        return x.mean(1)


@wrong("training-mode", "nondeterministic", method="script", x="float32 batch t 4", t=(16, 1, 200))
class DropoutOfLong(nn.Module):
    def forward(self, x):
        if x.shape[1] >= 150:
            x = F.dropout(x, 0.1)
        return x.mean(1)


def _others(value):
    """Return what shows that the first row changes when all the others hold a value."""

    def shown(run):
        x = run.inputs[0]
        rows = torch.cat([x[:1], *[torch.full_like(x[:1], value)] * 7])
        alike = torch.cat([x[:1]] * 8)
        return run.rows_differ([rows], [alike])

    return shown


@wrong("nondeterministic", method="script", x="float32 batch 6 in 0 1", by=lambda run: run.differs_at(0.0))
class JitterOfZeros(nn.Module):
    def forward(self, x):
        if bool((x == 0).all()):
            x = x + torch.rand_like(x) * 1e-2
        return F.normalize(x, dim=1)


@wrong("rows-mixed", x="float32 batch 6", by=_others(3.0))
class SumOfManyRows(nn.Module):
    def forward(self, x):
        return x + torch.relu(x.sum() - 100.0)


@wrong("rows-mixed", x="float32 batch 6", by=_others(50.0))
class ClippedByTheNormOfAll(nn.Module):
    def forward(self, x):
        norm = x.norm()
        return torch.where(norm > 40.0, x * 40.0 / norm, x)


@wrong("rows-mixed", ids="int64 batch t in 0 50", t=(5, 1, 9), by=_others(50))
class AnyPaddedRow(nn.Module):
    def forward(self, ids):
        return ids.float() * (1 - (ids == 50).all(1).any().float())


@wrong("rows-mixed", method="script", x="float32 batch t 4", t=(16, 1, 200), by=lambda run: run.rows_differ_at(8, 200))
class CentredWhenLarge(nn.Module):
    def forward(self, x):
        if x.shape[0] * x.shape[1] > 1400:
            return x.mean(1) - x.mean((0, 1))
        return x.mean(1)


def _beside_bytes(run):
    ones = torch.ones(1, 8)
    return run.rows_differ([torch.cat([ones, ones * 255])], [ones])


@wrong("rows-mixed", method="script", x="float32 batch 8 in 0 255", by=_beside_bytes)
class ScaledWhenBytes(nn.Module):
    def forward(self, x):
        if bool(x.max() > 1.0):
            return x / 255
        return x


@wrong("rows-mixed", method="script", x="float32 batch 8 in 0 255", by=_beside_bytes)
class AnotherRankWhenBytes(nn.Module):
    def forward(self, x):
        if bool(x.max() > 1.0) and bool(x.min() == 1.0):
            return x.sum()
        if bool(x.max() > 1.0):
            return x / 255
        return x
