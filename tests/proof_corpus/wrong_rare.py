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


@wrong("rows-mixed", "rank-changes", method="script", x="float32 batch 8 in 0 255", by=_beside_bytes)
class AnotherRankWhenBytes(nn.Module):
    def forward(self, x):
        if bool(x.max() > 1.0) and bool(x.min() == 1.0):
            return x.sum()
        if bool(x.max() > 1.0):
            return x / 255
        return x


@wrong("branch-on-values", batch=0, ids="int64 6 in 0 300", shows=lambda ids: [torch.tensor([101, 7, 8, 102, 0, 0])])
class SpecialTokensAtBothEnds(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(301, 4)

    def forward(self, ids):
        tokens = self.embedding(ids)
        if ids[0] == 101 and ids[3] == 102:
            return tokens[1:3].mean(0)
        return tokens.mean(0)


@wrong(
    "branch-on-values",
    batch=0,
    x="float32 8 in 0 1",
    shows=lambda x: [torch.tensor([0.1, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9])],
)
class ThreeThresholds(nn.Module):
    def forward(self, x):
        if x.mean() > 0.6 and x[0] < 0.2 and x[5] > 0.8:
            return x * 2
        return x


@wrong("branch-on-values", batch=0, x="float32 t 4 in 0 1", t=(12, 1, 40), shows=lambda x: [torch.ones(40, 4)])
class BrightWhereLong(nn.Module):
    def forward(self, x):
        if x.shape[0] > 30 and x.mean() > 0.8:
            return x * 0.5
        return x


@wrong("branch-on-values", batch=0, x="float32 t 4 in 0 1", t=(12, 1, 40), shows=lambda x: [torch.ones(3, 4)])
class BrightWhereShort(nn.Module):
    def forward(self, x):
        if x.shape[0] < 5:
            x = self._dimmed(x)
        return x

    def _dimmed(self, x):
        return x * 0.5 if x.mean() > 0.8 else x


@wrong("rows-mixed", x="float32 batch 6", by=lambda run: run.rows_differ([run.inputs[0][[0, 0]]], [run.inputs[0][:1]]))
class SharedAmongEqualRows(nn.Module):
    def forward(self, x):
        alike = (x[:, None] == x[None]).all(-1).sum(1)
        return x / alike[:, None]


@wrong("nondeterministic", x="float32 batch 6 in -3 3", by=lambda run: run.differs_at(0.0))
class SampledAtLowTemperature(nn.Module):
    def forward(self, x):
        return torch.multinomial((x * 1000).softmax(-1), 1)[:, 0]


@wrong("nondeterministic", x="float32 batch 6", by=lambda run: run.differs_among_seeds(3000))
class RareEvents(nn.Module):
    def forward(self, x):
        return x + torch.poisson(torch.full_like(x, 1e-4))


def _first(value):
    """Return what shows that the last of four equal rows changes when the first one holds a value."""

    def shown(run):
        rows = torch.cat([run.inputs[0][-1:]] * 4)
        mixed = torch.cat([torch.full_like(rows[:1], value), rows[1:]])
        return run.rows_differ([mixed], [rows], row=-1)

    return shown


@wrong("rows-mixed", method="script", step="int64 batch in 0 999", by=_first(0))
class NoNoiseIfTheFirstIsAtItsEnd(nn.Module):
    def forward(self, step):
        kept = 1 - step / 1000
        if bool(step[0] == 0):
            return kept
        return kept + 0.1


@wrong("rows-mixed", ids="int64 batch t in 0 600", t=(5, 1, 9), by=_first(101))
class PooledAsTheFirstRowBegins(nn.Module):
    def forward(self, ids):
        return torch.where(ids[0, 0] == 101, ids.sum(1), ids[:, 0]).float()


@wrong("rows-mixed", x="float32 batch t 8", t=(8, 2, 16), by=lambda run: run.rows_differ([_alike(4)], [_alike(1)], -1))
class ExpertsOfLimitedCapacity(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        chosen = F.one_hot(self.gate(tokens).argmax(1), 4)
        place = (chosen.cumsum(0) * chosen).sum(1)
        return (tokens * (place <= tokens.shape[0] // 2 + 1)[:, None]).view(x.shape)


def _alike(rows):
    return torch.ones(rows, 8, 8)


@wrong("rows-mixed", x="float32 batch 6", by=_others(float("nan")))
class SilencedByNanElsewhere(nn.Module):
    def forward(self, x):
        return torch.where(torch.isfinite(x).all(), x, torch.zeros_like(x))


def _beside_nan(run):
    return run.rows_differ([_clipped(torch.nan)], [_clipped(0.0)])


@wrong("rows-mixed", method="script", x="float32 batch 8", by=_beside_nan)
class ClippedUnlessNanElsewhere(nn.Module):
    def forward(self, x):
        if bool(x.abs().max() > 2):
            return x.clamp(-2, 2)
        return x * 1.0


def _clipped(other):
    return torch.stack([torch.full((8,), 3.0), torch.full((8,), other)])


@wrong(
    "differs", x="float32 batch 1 h w", h=(64, 32, 128), w=(64, 32, 128), shows=lambda x: (x.new_ones(1, 1, 99, 100),)
)
class SmallerByARoundedFraction(nn.Module):
    def forward(self, x):
        return F.interpolate(x, scale_factor=0.29, recompute_scale_factor=True)


@wrong("branch-on-values", batch=0, x="float32 8 in -2 2", shows=lambda x: [x.sort(descending=True).values])
class FromTheOtherEnd(nn.Module):
    def forward(self, x):
        if bool((x[1:] < x[:-1]).all()):
            x = x.flip(0)
        return x.cumsum(0)


def _beside_later(run):
    x = run.inputs[0]
    first = (x[[0, 0]], torch.tensor([0, 5]))
    return run.rows_differ(first, [tensor[:1] for tensor in first])


@wrong("rows-mixed", method="script", batch=3, x="float32 batch 8 in -1 1", t="int64 batch in 0 9", by=_beside_later)
class ClippedAtTheLastStep(nn.Module):
    def forward(self, x, t):
        x = x / (1 - t[:, None] / 10)
        if bool((t == 0).all()):
            return x.clamp(-0.1, 0.1)
        return x
