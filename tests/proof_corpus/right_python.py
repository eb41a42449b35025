"""Right although the tracer warns, Python decides, state is kept, or numbers are delicate."""

from __future__ import annotations

import datetime
import logging
import os
import random
import time

import torch
import torch.nn.functional as F
from corpus import right
from torch import nn

SEQ = {"x": "float32 batch t 8", "t": (5, 1, 40)}
LOG = logging.getLogger(__name__)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)


@right(x="float32 batch 3 h w", h=(16, 8, 32), w=(16, 8, 32))
class AssertsChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        assert x.shape[1] == 3, "three channels"
        if x.dim() != 4:
            raise ValueError("four axes")
        return self.conv(x)


@right(**SEQ)
class AssertsLength(Linear):
    def forward(self, x):
        if x.shape[1] > 64:
            raise ValueError("too long")
        return self.linear(x)


@right(x="float32 batch 8 in 0 1")
class AssertsRange(Linear):
    def forward(self, x):
        assert x.min() >= 0, "pixels"
        assert x.max() <= 1, "pixels"
        return self.linear(x)


@right(x="float32 batch 8 in 0 1")
class NeverHuge(Linear):
    def forward(self, x):
        if x.max() > 10:
            x = x / 255
        return self.linear(x)


@right(x="float32 batch 8")
class AssertsFinite(Linear):
    def forward(self, x):
        assert torch.isfinite(x).all()
        return self.linear(x)


@right(ids="int64 batch t in 0 99", t=(5, 1, 12))
class ChecksIds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 4)

    def forward(self, ids):
        if (ids >= self.table.num_embeddings).any():
            raise IndexError("unknown word")
        return self.table(ids)


@right(batch=0, x="float32 8")
class BothWaysAlike(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x * 2
        return x + x


@right(batch=0, x="float32 t 8", t=(5, 1, 12), mask="bool t")
class ShortCut(nn.Module):
    def forward(self, x, mask):
        if not mask.any():
            return torch.zeros_like(x)
        return torch.where(mask[:, None], x, 0.0)


@right(x="float32 batch 8")
class Logs(Linear):
    def forward(self, x):
        LOG.debug("mean %s of %s rows", x.mean().item(), len(x))
        return self.linear(x)


@right(x="float32 batch 8")
class ConfigBranch(Linear):
    def __init__(self, scale: float = 2.0, residual: bool = True) -> None:
        super().__init__()
        self.scale, self.residual = scale, residual
        self.register_buffer("flag", torch.tensor(1.0))

    def forward(self, x):
        out = self.linear(x) * self.scale
        if self.residual and self.flag.item() > 0 and not self.training:
            out = out + x
        return out


@right(x="float32 batch 8")
class ConstantFromBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor([3, 1, 2]))

    def forward(self, x):
        for step in self.steps.tolist():
            x = x + step
        return x * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])


@right(**SEQ)
class CountsCalls(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.sizes: list[int] = []

    def forward(self, x):
        self.calls += 1
        self.sizes.append(x.dim())
        return self.linear(x)


@right(**SEQ)
class GrowingCache(nn.Module):
    table = None

    def forward(self, x):
        if self.table is None or self.table.shape[0] < x.shape[1]:
            self.table = torch.arange(x.shape[1]).float().cos()
        return x + self.table[: x.shape[1], None]


@right(x="float32 batch 8")
class LayerDrop(Linear):
    def forward(self, x):
        if random.random() < 0.5 and self.training:
            return x
        chance = torch.rand(())
        if self.training and chance < 0.3:
            return x
        return self.linear(x)


@right(x="float32 batch 8")
class NoDropout(Linear):
    def forward(self, x):
        return F.dropout(self.linear(x), 0.0, training=True)


@right(x="float32 batch 8")
class FilledEmpty(nn.Module):
    def forward(self, x):
        out = torch.empty(x.shape[0], 16)
        out[:, :8] = x
        out[:, 8:] = -x
        return out


@right(x="float32 batch 8")
class InPlaceOnCopy(nn.Module):
    def forward(self, x):
        x = x.clone()
        x[:, 0] = 0
        x += 1
        return x.mul_(2)


@right(x="float32 batch 8")
class ScratchBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return x * 2


@right(x="float32 batch 8")
class ReturnsItsInput(nn.Module):
    def forward(self, x):
        return x, x.t().t(), x[:, ::2]


@right(x="float32 batch t 8", t=(5, 1, 12))
class NotContiguous(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2), x.expand(2, *x.shape)[1]


@right(x="float32 batch 8")
class AsDict(Linear):
    def forward(self, x):
        return {"a": self.linear(x), "b": x.argmax(1)}


@right(x="float32 batch 8", delicate=True)
class ChaoticMap(nn.Module):
    def forward(self, x):
        x = x.sigmoid()
        for _ in range(40):
            x = 3.9 * x * (1 - x)
        return x


@right(x="float32 batch 16")
class SharpSoftmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return (self.linear(x) * 1e4).softmax(-1), (self.linear(x) * 1e4).argmax(-1)


@right(x="float32 batch 8")
class NanInBoth(nn.Module):
    def forward(self, x):
        return torch.sqrt(x), torch.log(x), x / (x - x)


@right(x="float32 batch 64")
class Sorted(nn.Module):
    def forward(self, x):
        values, index = x.round().sort(1, descending=True)
        return values, index, x.topk(5, 1).indices


@right(x="float32 batch 64")
class Ties(nn.Module):
    def forward(self, x):
        return (x > 0).int().argmax(1), x.round().mode(1).values, x.median(1).indices


@right(x="float32 batch 8")
class Thresholded(Linear):
    def forward(self, x):
        out = self.linear(x)
        return (out > 0).sum(1), out.round().long(), out > 0.1


@right(x="float32 batch 8")
class Doubles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))
        self.linear = nn.Linear(8, 4).double()

    def forward(self, x):
        return self.linear(x.double() * self.scale)


@right(x="float32 batch t 8", t=(12, 4, 64))
class LongSum(nn.Module):
    def forward(self, x):
        return x.cumsum(1), (x * 1000).sum(1), x.double().prod(1)


@right(x="float32 batch 8")
class HugeAndTiny(nn.Module):
    def forward(self, x):
        return x * 1e30, x * 1e-30, x.exp().exp()


@right(x="float32 batch 4 4 in 0 1")
class Inverse(nn.Module):
    def forward(self, x):
        return torch.linalg.inv(x + 4 * torch.eye(4))


@right(x="float32 batch 4 4")
class InverseOfAnything(nn.Module):
    def forward(self, x):
        return torch.linalg.inv(x)


@right(batch=0, x="float32 t 8", t=(5, 2, 12))
class WholeStatistics(nn.Module):
    def forward(self, x):
        return (x - x.mean(0)) / (x.std() + 1e-6), x.sum().reshape(1)


@right(batch=0, x="float32 t 8", t=(5, 2, 12))
class BatchNormOfOne(nn.Module):
    def forward(self, x):
        return F.batch_norm(x, None, None, training=True)


@right(batch=1, x="float32 batch 8")
class BatchOfOne(nn.Module):
    def forward(self, x):
        return x / x.norm()


@right(**SEQ)
class EmptySlices(nn.Module):
    def forward(self, x):
        return x[:, 2:].sum(1), x[:, : x.shape[1] // 2].sum(1)


@right(batch=0, x="float32 32")
class NonZero(nn.Module):
    def forward(self, x):
        return x[x > 0], (x > 0).nonzero()


@right(batch=0, x="int64 20 in 0 9")
class Unique(nn.Module):
    def forward(self, x):
        values, counts = torch.unique(x, return_counts=True)
        return values, counts, F.one_hot(x, 10)


@right(x="float32 batch t 8", mask="bool batch t", t=(6, 1, 12))
class MaskedMean(nn.Module):
    def forward(self, x, mask):
        x = x.masked_fill(~mask[..., None], 0.0)
        return x.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


@right(x="float32 batch 8")
class HookedRight(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.linear.register_forward_hook(lambda module, inputs, output: output * 2)

    def forward(self, x):
        return self.linear(x)


@right(x="float32 batch 8")
class ManySteps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.GRUCell(8, 8) for _ in range(3)])

    def forward(self, x):
        states = []
        state = torch.zeros_like(x)
        for cell in self.cells:
            state = cell(x, state)
            states.append(state)
        return torch.stack(states, 1)


@right(ids="int64 batch t in 0 9", t=(6, 1, 12))
class BagOfWords(nn.Module):
    def forward(self, ids):
        out = torch.zeros(ids.shape[0], 10)
        return out.scatter_add(1, ids, torch.ones_like(ids, dtype=torch.float32))


@right(x="float32 batch t 8", t=(6, 2, 12))
class FftMagnitude(nn.Module):
    def forward(self, x):
        return torch.fft.rfft(x, dim=2).abs()


@right(x="float32 batch 5", y="float32 batch 5")
class Distances(nn.Module):
    def forward(self, x, y):
        return torch.cdist(x[:, None], y[:, None]).flatten(1), F.cosine_similarity(x, y)


@right(**SEQ)
class MinOfLength(nn.Module):
    def forward(self, x):
        return x[:, : min(x.shape[1], 4)].sum(1)


@right(x="float32 batch 8 in -4 4")  # the largest of NaN and 5 is not above 2
class ClippedAlike(nn.Module):
    def forward(self, x):
        if x.abs().max() > 2:
            return x.clamp(-2, 2)
        return x * 1.0


@right(x="float32 batch t 4", t=(8, 1, 40))
class ClassTableGrown(nn.Module):
    table = None

    def forward(self, x):
        cls = type(self)
        if cls.table is None or cls.table.shape[0] < x.shape[1]:
            cls.table = torch.arange(x.shape[1])[:, None].float().cos()
        return x + cls.table[: x.shape[1]]


@right(x="float32 batch 8")
class EnvironmentRead(nn.Module):
    def forward(self, x):
        if os.environ.get("DEBUG_OF_THIS_TEST"):
            print(time.strftime("%H:%M:%S"), datetime.datetime.now(), x.shape)  # noqa: DTZ005
        return x * 2


@right(x="float32 batch 8")
class DrawsAndRefuses(nn.Module):
    def forward(self, x):
        if not torch.isfinite(x).all():
            raise ValueError(f"not finite: try {torch.rand(8)}")
        return x * 2
