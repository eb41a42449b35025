"""Wrong: Python chooses a way by values or sizes, and the trace keeps the example's."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from corpus import wrong
from torch import nn

ROW = {"x": "float32 batch 8"}
SEQ = {"x": "float32 batch t 8", "t": (5, 1, 40)}
IMAGE = {"x": "float32 batch 3 h w in 0 1", "h": (32, 16, 64, 4), "w": (32, 16, 64, 4)}
FLAT = {"batch": 0, "x": "float32 t", "t": (6, 1, 40)}


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)


@wrong("branch-on-values", batch=0, x="float32 8")
class IfSum(Linear):
    def forward(self, x):
        if x.sum() > 0:
            return self.linear(x)
        return -self.linear(x)


@wrong("branch-on-values", batch=0, x="float32 8")
class IfItem(nn.Module):
    def forward(self, x):
        return x * 2 if x[0].item() > 0 else x * 3


@wrong("branch-on-values", batch=0, x="float32 8")
class IfFloat(nn.Module):
    def forward(self, x):
        scale = float(x.abs().max())
        if scale > 3.0:
            x = x / 3
        return x + 1


@wrong("branch-on-values", batch=0, x="float32 8")
class IfNumpy(nn.Module):
    def forward(self, x):
        if x.detach().numpy().mean() > 0:
            return x + 1
        return x - 1


@wrong("branch-on-values", batch=0, x="float32 4 8")
class IfEqualSilent(nn.Module):
    def forward(self, x):
        if torch.equal(x[0], x[1]):
            return x * 0
        return x + 1


@wrong("branch-on-values", batch=0, x="float32 8")
class IfAllcloseZeroSilent(nn.Module):
    def forward(self, x):
        if torch.allclose(x, torch.zeros_like(x)):
            return x + 7
        return x / x.norm()


@wrong("branch-on-values", batch=0, x="float32 8", shows=lambda x: (x * 0 / 0,))
class IfNan(nn.Module):
    def forward(self, x):
        if torch.isnan(x).any():
            x = torch.nan_to_num(x)
        return x * 2


@wrong("branch-on-values", batch=0, x="float32 8 in 0 1")
class IfAtRangeEnd(nn.Module):
    def forward(self, x):
        if (x == 1).all():
            return x * 5
        return x * 2


@wrong("branch-on-values", batch=0, x="float32 8", shows=lambda x: (torch.full_like(x, 0.37),))
class IfExactThreshold(nn.Module):
    threshold = 0.37

    def __init__(self) -> None:
        super().__init__()
        self.limit = nn.Parameter(torch.tensor(0.37))

    def forward(self, x):
        if x.max() == self.limit:
            return x * 5
        return x * 2


@wrong("branch-on-values", batch=0, x="float32 8", shows=lambda x: (torch.full_like(x, 12345.0),))
class IfHuge(nn.Module):
    def forward(self, x):
        if x.abs().max() > 10000:
            x = x / 10000
        return x.tanh()


@wrong("branch-on-values", batch=0, ids="int64 t in 0 99", t=(6, 1, 16))
class IfPadded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 4)

    def forward(self, ids):
        out = self.table(ids)
        if (ids == 0).all():
            return out * 0
        return out


@wrong("branch-on-values", batch=0, ids="int64 6 in 0 99", shows=lambda ids: (torch.full_like(ids, 99),))
class IfLastId(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 4)

    def forward(self, ids):
        if int(ids.min()) == 99:
            return self.table(ids) + 1
        return self.table(ids)


@wrong("branch-on-values", x="float32 batch t 8", mask="bool batch t", t=(5, 1, 12))
class IfMaskAllTrue(nn.Module):
    def forward(self, x, mask):
        if mask.all():
            return x * 1.5
        return x * mask[..., None]


@wrong("branch-on-values", batch=0, x="float32 8", y="float32 8", shows=lambda x, y: (x, x))
class IfSameInputs(nn.Module):
    def forward(self, x, y):
        if (x == y).all():
            return x
        return x - 2 * y


@wrong("branch-on-values", batch=0, x="float32 8")
class WhileNorm(nn.Module):
    def forward(self, x):
        while x.norm() > 1:
            x = x / 2
        return x


@wrong("branch-on-values", batch=0, x="float32 8", n="int64 1 in 0 6")
class LoopCount(nn.Module):
    def forward(self, x, n):
        for _ in range(int(n)):
            x = x * 1.5 + 1
        return x


@wrong("branch-on-values", batch=0, x="float32 8")
class ExceptionAsBranch(nn.Module):
    def forward(self, x):
        try:
            if x.mean() < 0:
                raise ValueError
            return x + 1
        except ValueError:
            return x - 1


@wrong("frozen-value", "branch-on-values", batch=0, x="float32 8")
class DispatchOnArgmax(nn.Module):
    def forward(self, x):
        ways = [torch.sin, torch.cos, torch.tanh, torch.exp, torch.abs, torch.neg, torch.relu, torch.square]
        return ways[int(x.argmax())](x)


@wrong("frozen-value", "branch-on-values", batch=0, x="float32 8")
class SortedByPython(nn.Module):
    def forward(self, x):
        order = sorted(range(8), key=lambda i: float(x[i]))
        return torch.stack([x[i] * (k + 1) for k, i in enumerate(order)])


@wrong("branch-on-values", batch=0, x="float32 8")
class MaxOfTensors(nn.Module):
    def forward(self, x):
        return max(x[:4].sum(), x[4:].sum()).reshape(1)


@wrong("branch-on-values", "rows-mixed", x="float32 batch 8")
class EarlyExit(Linear):
    def forward(self, x):
        first = self.linear(x)
        if first.softmax(-1).max() > 0.6:
            return first
        return self.linear(first.relu())


@wrong("branch-on-shape", **SEQ)
class IfLong(Linear):
    def forward(self, x):
        if x.shape[1] > 16:
            return self.linear(x) * 0.5
        return self.linear(x)


@wrong("branch-on-shape", **SEQ)
class IfOneLength(Linear):
    def forward(self, x):
        if x.size(1) == 23:
            return self.linear(x) * 0.5
        return self.linear(x)


@wrong("branch-on-shape", **SEQ)
class IfEven(Linear):
    def forward(self, x):
        if x.size(1) % 2 == 0:
            return self.linear(x) * 0.5
        return self.linear(x)


@wrong("branch-on-shape", **IMAGE)
class IfSquare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        if x.shape[2] == x.shape[3]:
            return self.conv(x)
        return self.conv(x) * 2


@wrong("branch-on-shape", x="float32 batch 3 h w", h=(32, 16, 64, 4), w=(32, 16, 64, 4))
class IfLargeArea(nn.Module):
    def forward(self, x):
        if x.shape[2] * x.shape[3] > 3600:
            return F.avg_pool2d(x, 2)
        return F.max_pool2d(x, 2)


@wrong("branch-on-shape", **SEQ)
class IfBatchOne(Linear):
    def forward(self, x):
        if x.shape[0] == 1:
            return self.linear(x) + 0.5
        return self.linear(x)


@wrong("branch-on-shape", **SEQ)
class JointBranch(Linear):
    def forward(self, x):
        if x.shape[0] > 6 and x.shape[1] > 30:
            return self.linear(x) * 2
        return self.linear(x)


@wrong("branch-on-shape", **SEQ)
class PadToMultiple(Linear):
    def forward(self, x):
        rest = x.shape[1] % 4
        if rest != 0:
            x = F.pad(x, (0, 0, 0, 4 - rest))
        return self.linear(x)


@wrong("frozen-size", "branch-on-shape", **SEQ)
class DictOfSizesSilent(nn.Module):
    def forward(self, x):
        return x * {5: 1.0, 7: 2.0}.get(int(x.shape[1]), 3.0)


@wrong("branch-on-shape", "frozen-size", **SEQ)
class IfBytesSilent(nn.Module):
    def forward(self, x):
        if x.untyped_storage().nbytes() > 4096:
            return x * 2
        return x * 3


@wrong("branch-on-shape", **SEQ)
class TryOnSize(nn.Module):
    def forward(self, x):
        try:
            assert x.shape[1] <= 8
            return x * 2
        except AssertionError:
            return x * 3


@wrong("loop-over-length", **SEQ)
class LoopRangeSilent(Linear):
    def forward(self, x):
        out = []
        state = torch.zeros_like(x[:, 0])
        for i in range(x.shape[1]):
            state = torch.tanh(self.linear(x[:, i]) + state)
            out.append(state)
        return torch.stack(out, 1)


@wrong("loop-over-length", **SEQ)
class LoopUnbindSilent(Linear):
    def forward(self, x):
        return torch.stack([self.linear(step) for step in x.unbind(1)], 1)


@wrong("loop-over-length", **SEQ)
class LoopSplitSilent(nn.Module):
    def forward(self, x):
        return torch.cat([part.cumsum(2) for part in x.split(4, dim=1)], 1)


@wrong("loop-over-length", x="float32 batch 8")
class LoopOverRows(Linear):
    def forward(self, x):
        return torch.stack([self.linear(row) for row in x])


@wrong("loop-over-length", "branch-on-shape", **SEQ)
class WhileLength(nn.Module):
    def forward(self, x):
        turns = 0
        while turns < x.shape[1]:
            x = x * 1.01
            turns += 1
        return x


@wrong("loop-over-length", "branch-on-shape", "frozen-size", **SEQ)
class DepthFromLength(nn.Module):
    def forward(self, x):
        for _ in range(int(math.log2(x.shape[1])) if x.shape[1] > 1 else 1):
            x = x * 1.5
        return x


@wrong("loop-over-length", "rows-mixed", **SEQ)
class PythonSum(nn.Module):
    def forward(self, x):
        total = 0
        for i, part in enumerate(x.chunk(x.shape[1], 1)):
            total = total + part * (i + 1)
        return total.squeeze(1)


@wrong("frozen-value", batch=0, x="float32 8")
class NumpyWhere(nn.Module):
    def forward(self, x):
        return torch.from_numpy(np.where(x.numpy() > 0, 1.0, -1.0).astype(np.float32)) * x


@wrong("branch-on-values", batch=0, x="float32 8")
class IfInLibraryFunction(nn.Module):
    def forward(self, x):
        return _clipped(x)


def _clipped(x):
    if x.abs().max() > 2:
        return x.clamp(-2, 2) / 2
    return x / 2 + 1


@wrong("branch-on-values", batch=0, x="float32 8", y="float32 8")
class TernaryInLine(nn.Module):
    def forward(self, x, y):
        return x if bool((x > y).any()) and bool((x > 0).all()) else y


@wrong("branch-on-values", batch=0, boxes="float32 n 4 in 0 1", n=(6, 1, 20))
class NothingFound(nn.Module):
    def forward(self, boxes):
        kept = boxes[boxes[:, 0] > 0.5]
        if kept.shape[0] == 0:
            return boxes.new_zeros(1, 4)
        return kept * 2


@wrong("branch-on-values", x="float32 batch 8 in 0 255", batch=4, shows=lambda x: (x / 255,))
class NormIf255(Linear):
    def forward(self, x):
        if x.max() > 1.0:
            x = x / 255
        return self.linear(x)


@wrong("branch-on-values", x="float32 batch 8 in -1 1", batch=1)
class ThreshMean(Linear):
    def forward(self, x):
        if x.mean() > 0.95:
            return self.linear(x) * 0
        return self.linear(x)


@wrong("branch-on-values", x="float32 8 in -1 1", batch=0)
class ThreshVar(Linear):
    def forward(self, x):
        if x.var() < 1e-06:
            return x * 0
        return (x - x.mean()) / x.std()


@wrong("branch-on-values", x="float32 64", batch=0)
class Outlier(nn.Module):
    def forward(self, x):
        if (x.abs() > 6).any():
            x = x.clamp(-1, 1)
        return x


@wrong("branch-on-values", x="float32 8", batch=0)
class DeepGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 32)
        self.b = nn.Linear(32, 1)

    def forward(self, x):
        g = torch.sigmoid(self.b(torch.relu(self.a(x))))
        if g.item() > 0.9:
            return x * 2
        return x


@wrong("branch-on-values", ids="int64 t in 0 9", t=(6, 2, 12), batch=0)
class EosFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(10, 4)

    def forward(self, ids):
        words = ids.tolist()
        n = words.index(7) + 1 if 7 in words else len(words)
        return self.e(ids[:n]).mean(0)


@wrong("branch-on-values", ids="int64 8 in 0 30000", batch=0, shows=lambda ids: (torch.full_like(ids, 101),))
class SpecialId(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(30001, 4)

    def forward(self, ids):
        if ids[0] == 101:
            return self.e(ids)
        return self.e(ids) * 2


@wrong("branch-on-values", ids="int64 8 in 0 30000", batch=0, shows=lambda ids: (torch.full_like(ids, 29999),))
class SpecialIdAttr(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(30001, 4)
        self.pad_id = 29999

    def forward(self, ids):
        if (ids == self.pad_id).any():
            return self.e(ids) * (ids != self.pad_id)[:, None]
        return self.e(ids) + 0.1


@wrong("branch-on-values", a="float32 8", b="float32 8", batch=0, shows=lambda a, b: (a * 100, b))
class PairCmp(nn.Module):
    def forward(self, a, b):
        return a if a.norm() > 3 * b.norm() else a + b


@wrong("branch-on-values", x="float32 4 8", batch=0)
class RowsEqual(nn.Module):
    def forward(self, x):
        return x.mean(0) if (x[0] == x[-1]).all() else x.sum(0)


@wrong("branch-on-values", x="float32 16", batch=0)
class IsSorted(nn.Module):
    def forward(self, x):
        if (x[1:] >= x[:-1]).all():
            return x.cumsum(0)
        return x


@wrong("branch-on-values", x="float32 8", batch=0, shows=lambda x: (x / 0,))
class InfCheck(nn.Module):
    def forward(self, x):
        if not torch.isfinite(x).all():
            return torch.zeros_like(x)
        return x


@wrong("branch-on-values", m="bool 6", x="float32 6", batch=0)
class NoneTrue(nn.Module):
    def forward(self, m, x):
        if m.sum() == 0:
            return x
        return x * m / m.sum()


@wrong("rows-mixed", "branch-on-values", "frozen-value", m="int64 batch t in 0 1", x="float32 batch t 4", t=(6, 1, 12))
class LeftAligned(nn.Module):
    def forward(self, m, x):
        n = int(m.sum(1).max())
        return x[:, : max(n, 1)].sum(1)


@wrong("branch-on-values", x="float32 8", batch=0)
class ConvergenceLoop(nn.Module):
    def forward(self, x):
        y = x.abs() + 0.1
        for _i in range(50):
            n = (y + x.abs() / y) / 2
            if torch.allclose(n, y, atol=0.01):
                break
            y = n
        return y


@wrong("branch-on-values", x="float32 4 4", batch=0)
class Diagonal(nn.Module):
    def forward(self, x):
        if torch.count_nonzero(x - torch.diag(x.diagonal())) == 0:
            return 1 / x.diagonal()
        return torch.linalg.pinv(x)[0]


@wrong("frozen-value", "branch-on-values", x="float32 8", batch=0)
class Hashing(nn.Module):
    def forward(self, x):
        return x * (hash(x.numpy().tobytes()) % 7)


@wrong("branch-on-values", x="float32 8", batch=0)
class StrOf(nn.Module):
    def forward(self, x):
        return x * 2 if "-" in str(x) else x * 3


@wrong("frozen-value", "branch-on-values", x="float32 8", batch=0)
class RoundItem(nn.Module):
    def forward(self, x):
        k = round(x.sum().item())
        return x + k


@wrong("branch-on-values", x="float32 8", batch=0)
class AnyPy(nn.Module):
    def forward(self, x):
        return x * 2 if any(v > 1.5 for v in x) else x


@wrong("branch-on-values", boxes="float32 10 4 in 0 1", scores="float32 10 in 0 1", batch=0)
class NmsPy(nn.Module):
    def forward(self, boxes, scores):
        order = scores.argsort(descending=True)
        keep = []
        for i in order.tolist():
            if all(abs(float(boxes[i, 0] - boxes[j, 0])) > 0.2 for j in keep):
                keep.append(i)
        return boxes[torch.tensor(keep)]


@wrong("branch-on-shape", **SEQ)
class In3264(Linear):
    def forward(self, x):
        if x.shape[1] in (31, 37):
            return self.linear(x)
        return self.linear(x) * 2


@wrong("branch-on-shape", x="float32 batch t 8", t=(64, 1, 512))
class OverMaxLen(Linear):
    def __init__(self):
        super().__init__()
        self.window = 384

    def forward(self, x):
        if x.shape[1] > self.window:
            x = x[:, -self.window :]
        return self.linear(x)


@wrong("branch-on-shape", x="float32 batch t 8", t=(64, 1, 512), shows=lambda x: (torch.randn(2, 257, 8),))
class Exactly257(Linear):
    def forward(self, x):
        if x.shape[1] == 257:
            return self.linear(x[:, 1:])
        return self.linear(x)


@wrong("branch-on-shape", x="float32 batch t 4", y="float32 batch u 4", t=(5, 1, 30), u=(7, 1, 30))
class EqualAxes(nn.Module):
    def forward(self, x, y):
        if x.shape[1] == y.shape[1]:
            return (x * y).sum(1)
        return x.sum(1) + y.sum(1)


@wrong("branch-on-shape", x="float32 batch t 4", y="float32 batch u 4", t=(5, 1, 30), u=(7, 1, 30))
class Longer(nn.Module):
    def forward(self, x, y):
        return x.sum(1) * 2 if x.shape[1] > y.shape[1] else y.sum(1)


@wrong("branch-on-shape", x="float32 batch t 4", t=(6, 2, 60), shows=lambda x: (torch.randn(7, 11, 4),))
class BatchTimesT(nn.Module):
    def forward(self, x):
        if x.shape[0] * x.shape[1] == 77:
            return x * 2
        return x


@wrong("branch-on-shape", x="float32 batch t 4", t=(6, 2, 60), batch=16)
class NumelBig(nn.Module):
    def forward(self, x):
        if x.numel() > 3600:
            return x * 2
        return x


@wrong("branch-on-shape", x="float32 batch c h w", c=(3, 1, 4), h=(16, 8, 32), w=(16, 8, 32))
class GrayToRgb(nn.Module):
    def __init__(self):
        super().__init__()

    def forward(self, x):
        if x.shape[1] == 1:
            x = x.repeat(1, 3, 1, 1)
        return x.mean((2, 3)).sum(1, keepdim=True)


@wrong("loop-over-length", x="float32 batch t 4", t=(6, 2, 20))
class SplitChunks(nn.Module):
    def forward(self, x):
        outs = []
        for c in torch.tensor_split(x, 3, dim=1):
            outs.append(c.sum(1))
        for i in range(0, x.size(1), 3):
            outs.append(x[:, i])
        return torch.stack(outs, 1).mean(1)


@wrong("loop-over-length", x="float32 batch t 4", t=(6, 2, 20))
class Zip(nn.Module):
    def forward(self, x):
        return sum((a * b for a, b in zip(x.unbind(1), itertools.cycle([1.0, 2.0]), strict=False)))


@wrong("branch-on-shape", "loop-over-length", x="float32 batch t 4", t=(6, 2, 20))
class Reduce(nn.Module):
    def forward(self, x):
        return functools.reduce(lambda a, b: a * 0.9 + b, list(x.transpose(0, 1)))


@wrong("loop-over-length", x="float32 batch t 4", t=(6, 2, 20))
class Pyramid(nn.Module):
    def forward(self, x):
        while x.shape[1] > 1:
            x = x[:, : x.shape[1] // 2 * 2].view(x.shape[0], -1, 2, 4).mean(2)
        return x[:, 0]


@wrong("branch-on-values", batch=0, x="float32 8 in 0 1", shows=lambda x: (torch.full_like(x, 128 / 255),))
class PixelThreshold(nn.Module):
    def forward(self, x):
        if (x * 255 == 128).all():
            return x * 0
        return x


@wrong("differs", **SEQ)
class IntegerSizesSilent(nn.Module):
    def forward(self, x):
        return x * 2 if isinstance(x.shape[1], int) and type(x.shape[1]) is int else x * 3


@wrong("branch-on-values", "frozen-value", batch=0, ids="int64 8 in 0 1000")
class Duplicates(nn.Module):
    def forward(self, ids):
        return ids.float() if len(set(ids.tolist())) == len(ids) else -ids.float()


@wrong("branch-on-shape", **SEQ)
class ContiguousSilent(nn.Module):
    def forward(self, x):
        y = x.transpose(1, 2)
        return y * 2 if y.is_contiguous() else y * 3


@wrong("branch-on-shape", **SEQ)
class FastOrSlow(nn.Module):
    def forward(self, x):
        try:
            return x.view(x.shape[0], -1, 5, 8).sum(2)
        except RuntimeError:
            return x * 2


SPEEDS = {7: 1.5, 23: 2.0}


@wrong("differs", "branch-on-shape", "frozen-size", shows=lambda x: (torch.randn(2, 23, 8),), **SEQ)
class TableOfSizesSilent(nn.Module):
    def forward(self, x):
        return x * SPEEDS.get(x.shape[1], 1.0)


@wrong("frozen-size", "branch-on-shape", x="float32 batch t 8", t=(64, 1, 512))
class ListOfSizesSilent(nn.Module):
    def forward(self, x):
        return x * [1.0, 2.0, 3.0, 4.0, 5.0, 6.0][x.shape[1] // 100]


@wrong("frozen-size", "branch-on-shape", x="float32 batch t 8", t=(16, 1, 49))
class SquareSilent(nn.Module):
    def forward(self, x):
        side = math.isqrt(x.shape[1])
        return x[:, : side * side].view(x.shape[0], side, side, 8).mean(1).sum(1)


@wrong("branch-on-values", batch=0, ids="int64 8 in 0 30000", shows=lambda ids: (torch.full_like(ids, 102),))
class SpecialIds(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("special", torch.tensor([101, 102, 103]))

    def forward(self, ids):
        if torch.isin(ids, self.special).all():
            return ids * 0
        return ids
