"""Wrong: a number or a tensor of the example is a constant in the trace."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from corpus import wrong
from torch import nn

SEQ = {"x": "float32 batch t 8", "t": (5, 1, 40)}
IMAGE = {"x": "float32 batch 3 h w in 0 1", "h": (32, 16, 64, 4), "w": (32, 16, 64, 4)}


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)


@wrong("frozen-batch", x="float32 batch 8")
class IntBatchInView(Linear):
    def forward(self, x):
        return self.linear(x).view(int(x.shape[0]), -1)


@wrong("frozen-batch", x="float32 batch 8")
class LenInView(nn.Module):
    def forward(self, x):
        return x.view(len(x), 2, 4).sum(1)


@wrong("frozen-batch", x="float32 batch 8")
class ExpandFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 8))

    def forward(self, x):
        return torch.cat([x, self.token.expand(int(x.size(0)), 8)], 1)


@wrong("frozen-batch", x="float32 batch 8")
class RepeatFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 8))

    def forward(self, x):
        b = len(x)
        return x * self.token.repeat(b, 1)


@wrong("frozen-batch", x="float32 batch t 8", t=(5, 1, 20))
class GruFrozenState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 16, batch_first=True)

    def forward(self, x):
        state = torch.zeros(1, int(x.shape[0]), 16)
        return self.gru(x, state)[0]


@wrong("frozen-batch", x="float32 batch t 8", t=(5, 1, 20))
class LstmFrozenState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, batch_first=True)

    def forward(self, x):
        state = torch.zeros(1, len(x), 16)
        return self.lstm(x, (state, state))[0]


@wrong("frozen-batch", x="float32 batch 8")
class ArangeBatch(nn.Module):
    def forward(self, x):
        rows = torch.arange(int(x.shape[0]))
        return x[rows, x.argmax(1)].reshape(-1, 1)


@wrong("frozen-batch", x="float32 batch 8")
class ListOfShape(nn.Module):
    def forward(self, x):
        shape = [int(size) for size in x.shape]
        return torch.zeros(shape) + x.mean(1, keepdim=True)


@wrong("frozen-size", "frozen-batch", **SEQ)
class NumpyShape(nn.Module):
    def forward(self, x):
        return x.reshape(int(np.prod([int(n) for n in x.shape[:2]])), 8).reshape(x.shape[0], -1, 8) * 2


@wrong("frozen-batch", "frozen-size", x="float32 batch 8")
class BytesSilent(nn.Module):
    def forward(self, x):
        return x * x.nbytes


@wrong("frozen-size", x="float32 batch t 8", t=(5, 1, 40))
class StrideSilent(nn.Module):
    def forward(self, x):
        return torch.as_strided(x, (x.shape[0], 8), (x.stride(0), 1))


@wrong("frozen-tensor", "frozen-size", **SEQ)
class NumpyMask(Linear):
    def forward(self, x):
        mask = torch.from_numpy(np.tril(np.ones((x.shape[1], x.shape[1]), dtype=np.float32)))
        return mask @ self.linear(x)


@wrong("loop-over-length", "frozen-size", "frozen-tensor", **SEQ)
class ListMask(nn.Module):
    def forward(self, x):
        n = int(x.shape[1])
        weights = torch.tensor([1.0 / (i + 1) for i in range(n)])
        return x * weights[:, None]


@wrong("frozen-size", **SEQ)
class PositionsByInt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 8)

    def forward(self, x):
        return x + self.table(torch.arange(int(x.shape[1])))


@wrong("frozen-size", **SEQ)
class PositionSliceByInt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, 8))

    def forward(self, x):
        return x + self.table[: int(x.shape[1])]


@wrong("frozen-size", "branch-on-shape", **SEQ)
class TopkFromLength(nn.Module):
    def forward(self, x):
        return x.topk(max(1, int(x.shape[1] * 0.5)), dim=1).values


@wrong("frozen-size", **IMAGE)
class InterpolateToInts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)

    def forward(self, x):
        size = (int(x.shape[2]), int(x.shape[3]))
        return F.interpolate(self.conv(x), size=size, mode="bilinear", align_corners=False)


@wrong("frozen-size", **IMAGE)
class PoolToInts(nn.Module):
    def forward(self, x):
        return F.adaptive_avg_pool2d(x, (int(x.shape[2]) // 4, int(x.shape[3]) // 4))


@wrong("frozen-size", **IMAGE)
class KernelFromSize(nn.Module):
    def forward(self, x):
        return F.avg_pool2d(x, (int(x.shape[2]), int(x.shape[3]))).flatten(1)


@wrong("frozen-size", **SEQ)
class MeanByPythonLength(nn.Module):
    def forward(self, x):
        return x.sum(1) / float(x.shape[1])


@wrong("frozen-size", **SEQ)
class FormattedSize(nn.Module):
    def forward(self, x):
        return x * int(f"{x.shape[1]}")


@wrong("frozen-value", batch=0, x="float32 8")
class ItemScale(nn.Module):
    def forward(self, x):
        return x / x.abs().max().item()


@wrong("frozen-value", batch=0, x="float32 8")
class TolistWeights(nn.Module):
    def forward(self, x):
        first, second, *_ = x.tolist()
        return x * first + second


@wrong("frozen-value", "frozen-tensor", batch=0, x="float32 8")
class NumpyRoundTrip(nn.Module):
    def forward(self, x):
        return torch.from_numpy(np.tanh(x.numpy())) + 1


@wrong("frozen-value", "frozen-tensor", batch=0, x="float32 8")
class TensorOfItem(nn.Module):
    def forward(self, x):
        return x - torch.tensor(float(x.mean()))


@wrong("frozen-value", "frozen-tensor", batch=0, x="float32 8")
class DlpackSilent(nn.Module):
    def forward(self, x):
        return x * float(np.from_dlpack(x).sum())


@wrong("frozen-value", batch=0, lengths="int64 4 in 1 9", x="float32 4 9")
class LengthsToList(nn.Module):
    def forward(self, lengths, x):
        keep = torch.zeros_like(x)
        for i, n in enumerate(lengths.tolist()):
            keep[i, :n] = 1
        return x * keep


@wrong("frozen-value", batch=0, lengths="int64 4 in 1 9", x="float32 4 9")
class MaxLengthMask(nn.Module):
    def forward(self, lengths, x):
        width = int(lengths.max())
        mask = torch.arange(width)[None] < lengths[:, None]
        return x[:, :width] * mask


@wrong("frozen-value", batch=0, x="float32 8")
class ThresholdByNumpy(nn.Module):
    def forward(self, x):
        return (x > float(np.median(x.numpy()))).float()


@wrong("frozen-value", "branch-on-values", batch=0, x="float32 16")
class CountAsK(nn.Module):
    def forward(self, x):
        k = int((x > 0).sum()) + 1
        return x.topk(min(k, 16)).values.sum().reshape(1)


_MASKS: dict[str, torch.Tensor] = {}


@functools.lru_cache(maxsize=8)
def _weights(size: int) -> torch.Tensor:
    return torch.linspace(0, 1, size)


@wrong("frozen-tensor", "frozen-size", **SEQ)
class LruCachedBySize(nn.Module):
    def forward(self, x):
        return x * _weights(int(x.shape[1]))[:, None]


@wrong("frozen-size", "frozen-tensor", "state", **SEQ)
class CacheByInt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[int, torch.Tensor] = {}

    def forward(self, x):
        n = int(x.shape[1])
        if n not in self.cache:
            self.cache[n] = torch.tril(torch.ones(n, n))
        return self.cache[n] @ x


@wrong("frozen-size", "frozen-batch", **SEQ)
class FlattenByNumel(nn.Module):
    def forward(self, x):
        return x.reshape(int(x.numel()) // 8, 8).relu().reshape(x.shape)


@wrong("frozen-size", **SEQ)
class WindowFromLength(nn.Module):
    def forward(self, x):
        half = int(x.shape[1] / 2 + 0.5)
        return F.pad(x[:, half:], (0, 0, half, 0))


@wrong("frozen-size", **SEQ)
class RotaryTableByInt(nn.Module):
    def forward(self, x):
        steps = torch.arange(0, float(x.shape[1]))
        angle = torch.outer(steps, torch.tensor([1.0, 0.1, 0.01, 0.001]))
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.cat([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1)


@wrong("frozen-tensor", "frozen-size", **SEQ)
class OnesNumpy(nn.Module):
    def forward(self, x):
        return x * torch.as_tensor(np.linspace(0, 1, x.shape[1], dtype=np.float32))[:, None]


@wrong("frozen-tensor", "frozen-size", **SEQ)
class BiasSlicePy(nn.Module):
    def __init__(self):
        super().__init__()
        self.b = [float(i) for i in range(40)]

    def forward(self, x):
        return x + torch.tensor(self.b[: x.shape[1]])[:, None]


@wrong("frozen-size", x="float32 batch t 8", t=(6, 2, 40, 2))
class ChunkTwo(nn.Module):
    def forward(self, x):
        h = x.shape[1] // 2
        a, b = torch.split(x, int(h), 1)
        return a * b


@wrong("frozen-tensor", "frozen-size", **SEQ)
class MaskCache(nn.Module):
    _c: dict[int, torch.Tensor] = {}  # noqa: RUF012

    def forward(self, x):
        k = int(x.shape[1])
        if k not in self._c:
            self._c[k] = torch.triu(torch.full((k, k), -1000000000.0), 1)
        return (x @ x.transpose(1, 2) + self._c[k]).softmax(-1) @ x


@wrong("frozen-batch", x="float32 batch 8")
class BufHidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.GRUCell(8, 8)
        self.register_buffer("h", torch.zeros(8, 8))

    def forward(self, x):
        return self.c(x, self.h[: len(x)])


@wrong("frozen-batch", x="float32 batch 8")
class EyeBatch(nn.Module):
    def forward(self, x):
        return torch.eye(int(x.shape[0])) @ x


@wrong("frozen-batch", x="float32 batch 4 8")
class Bmm(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 3))

    def forward(self, x):
        return torch.bmm(
            x, self.w.unsqueeze(0).repeat(x.size()[0].__int__() if hasattr(x.size()[0], "__int__") else x.size(0), 1, 1)
        )


@wrong("frozen-batch", x="float32 batch 4 8")
class TupleShape(nn.Module):
    def forward(self, x):
        shp = tuple(map(int, x.shape))
        return x.flatten().reshape(shp[0], -1)


@wrong("frozen-batch", x="float32 batch 8")
class ZerosOut(nn.Module):
    def forward(self, x):
        o = torch.zeros(x.detach().numpy().shape[0], 16)
        o[:, :8] = x
        return o


@wrong("frozen-value", x="float32 8", batch=0)
class PercentileNp(nn.Module):
    def forward(self, x):
        return x - torch.tensor(np.percentile(x.cpu().numpy(), 75))


@wrong("frozen-value", x="float32 8", batch=0)
class FmtItem(nn.Module):
    def forward(self, x):
        return x * float(f"{x.sum():.2f}")


@wrong("frozen-value", x="float32 8", batch=0)
class ScalarTensorIn(nn.Module):
    def forward(self, x):
        return torch.full((8,), x[0].item()) + x


@wrong("frozen-value", "frozen-tensor", x="float32 8", batch=0)
class TensorCopy(nn.Module):
    def forward(self, x):
        return torch.tensor(x.tolist()) * 2


@wrong("frozen-value", "frozen-tensor", x="float32 8", batch=0)
class AsTensorNp(nn.Module):
    def forward(self, x):
        return torch.as_tensor(np.sort(x.numpy()))


@wrong("frozen-value", "frozen-tensor", x="float32 8", batch=0)
class DataPtr(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.numpy().copy()) + x
