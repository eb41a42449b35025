"""Wrong: more ways in which people meet the same hazards."""

from __future__ import annotations

import bisect
import datetime
import decimal
import io
import itertools
import math
import operator
import random
import statistics

import numpy as np
import torch
import torch.nn.functional as F
from corpus import wrong
from torch import nn

SEQ = {"x": "float32 batch t 8", "t": (5, 1, 40)}


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)


@wrong("branch-on-values", x="float32 8", batch=0, shows=lambda x: (torch.full_like(x, 6.0),))
class And2(nn.Module):
    def forward(self, x):
        if x.max() > 5 and x.min() >= 0:
            return x * 0
        return x


@wrong("branch-on-values", x="float32 8 in -1 1", batch=0, shows=lambda x: (torch.full_like(x, 0.71),))
class NarrowBand(nn.Module):
    def forward(self, x):
        m = x.mean().item()
        if 0.7 < m < 0.72:
            return x * 0
        return x


@wrong("branch-on-values", x="float32 2 2", batch=0, shows=lambda x: (torch.ones_like(x),))
class Singular(nn.Module):
    def forward(self, x):
        if torch.det(x).abs() < 1e-06:
            return x * 0
        return torch.linalg.inv(x)


@wrong("branch-on-values", a="float32 4", b="float32 4", batch=0, shows=lambda a, b: (a, a))
class Parallel(nn.Module):
    def forward(self, a, b):
        if F.cosine_similarity(a, b, dim=0) > 0.999:
            return a
        return a - b


@wrong("branch-on-values", x="float32 16", batch=0)
class PeakIdx(nn.Module):
    def forward(self, x):
        i = int(x.argmax())
        return x.roll(-i) if i > 12 else x


@wrong(
    "branch-on-values",
    ids="int64 t in 0 9",
    t=(6, 2, 12),
    batch=0,
    shows=lambda ids: (torch.tensor([0, 0, 0, 0, 9, 9]),),
)
class CountZeros(nn.Module):
    def forward(self, ids):
        n = int((ids == 0).sum())
        return ids.float() * (2 if n >= 4 else 1)


@wrong("branch-on-values", ids="int64 8 in 0 99", batch=0)
class AllUnique(nn.Module):
    def forward(self, ids):
        if ids.unique().numel() < ids.numel():
            return ids * 2
        return ids


@wrong("branch-on-values", ids="int64 8 in 0 99999", batch=0, shows=lambda ids: (torch.full_like(ids, 5),))
class AnyDup(nn.Module):
    def forward(self, ids):
        return ids * 2 if len(torch.unique(ids)) != 8 else ids


@wrong("frozen-value", "branch-on-values", x="float32 8", batch=0)
class MedianPy(nn.Module):
    def forward(self, x):
        return x - statistics.median(x.tolist())


@wrong("frozen-value", "branch-on-values", x="float32 8", batch=0)
class BisectPy(nn.Module):
    def forward(self, x):
        k = bisect.bisect([-1.0, 0.0, 1.0], float(x[0]))
        return x * (k + 1)


@wrong("frozen-value", "branch-on-values", x="float32 8", batch=0)
class Decimals(nn.Module):
    def forward(self, x):
        return x * float(decimal.Decimal(float(x.sum())).quantize(decimal.Decimal("0.1")))


@wrong("branch-on-values", x="float32 8", batch=0)
class MatchStmt(nn.Module):
    def forward(self, x):
        match int(x.sum().sign()):
            case 1:
                return x
            case -1:
                return -x
            case _:
                return x * 0


@wrong("frozen-value", "branch-on-values", x="float32 8", batch=0)
class Walrus(nn.Module):
    def forward(self, x):
        return x / n if (n := x.norm().item()) > 1 else x


@wrong("branch-on-values", x="float32 8", batch=0)
class ListComp(nn.Module):
    def forward(self, x):
        return torch.stack([v for v in x if v > -10][:8] + [x[0]] * 0) if True else x


@wrong("branch-on-values", x="float32 8", batch=0)
class FilterPos(nn.Module):
    def forward(self, x):
        p = [v for v in x if v > 0]
        return torch.stack(p).sum().reshape(1) if p else x.sum().reshape(1) * 0


@wrong("branch-on-values", x="float32 8 in 0 1", batch=0, shows=lambda x: (x * 0,))
class RangeEndLow(nn.Module):
    def forward(self, x):
        return x * 0 + 9 if (x == 0).any() else x


@wrong("branch-on-values", x="float32 8 in 0 1", batch=0, shows=lambda x: (torch.cat([torch.ones(1), torch.zeros(7)]),))
class OneElemHigh(nn.Module):
    def forward(self, x):
        return x * 0 + 9 if (x >= 1).sum() == 1 else x


@wrong("branch-on-values", x="float32 8 in 0 1", m="float32 8 in 0 1", batch=0, shows=lambda x, m: (x * 0, m))
class TwoCond(nn.Module):
    def forward(self, x, m):
        return x * 0 if x.sum() == 0 and m.sum() > 0 else x + m


@wrong("branch-on-values", x="int64 4 in 0 100", y="int64 4 in 0 100", batch=0, shows=lambda x, y: (x, x))
class IntEq(nn.Module):
    def forward(self, x, y):
        return x if torch.equal(x, y) else x + y


@wrong("branch-on-values", x="int64 4 in -5 5", batch=0)
class IntNeg(nn.Module):
    def forward(self, x):
        return x if (x < 0).all() else x.abs() * 2


@wrong("branch-on-values", flag="bool 1", x="float32 8", batch=0)
class Flag(nn.Module):
    def forward(self, flag, x):
        return x if flag else -x


@wrong("frozen-value", "branch-on-values", mode="int64 1 in 0 3", x="float32 8", batch=0)
class Mode(nn.Module):
    def forward(self, mode, x):
        return [x, x.sin(), x.exp(), x.tanh()][mode.item()]


@wrong("branch-on-values", t="float32 1 in 0 1", x="float32 8", batch=0)
class TimeStep(nn.Module):
    def forward(self, t, x):
        return x * (1 - t) if t < 0.5 else x * t * t


@wrong("branch-on-shape", **SEQ)
class Prime(nn.Module):
    def forward(self, x):
        t = int(x.shape[1])
        return x * 2 if t > 1 and all(t % d for d in range(2, t)) else x


@wrong("branch-on-shape", x="float32 batch t 8", t=(64, 1, 1024), shows=lambda x: (torch.randn(1, 777, 8),))
class Rare777(nn.Module):
    def forward(self, x):
        return x * 2 if x.shape[1] == 777 else x


@wrong("branch-on-shape", x="float32 batch t 8", t=(64, 1, 1024), shows=lambda x: (torch.randn(2, 780, 8),))
class RareAttr(nn.Module):
    def __init__(self):
        super().__init__()
        self.cfg = {"limit": 777}

    def forward(self, x):
        return x * 2 if x.shape[1] > self.cfg["limit"] and x.shape[1] < 800 else x


@wrong("branch-on-shape", x="float32 batch t 8", t=(64, 1, 1024))
class DerivedLimit(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(300, 8))

    def forward(self, x):
        t = x.shape[1]
        return x + self.w[:t] if t <= 300 else x


@wrong("branch-on-shape", x="float32 batch 3 h w", h=(64, 32, 256, 32), w=(64, 32, 256, 32))
class Portrait(nn.Module):
    def forward(self, x):
        if x.shape[2] > 2 * x.shape[3]:
            x = x.transpose(2, 3)
        return x.mean((2, 3)) * torch.tensor([1.0, 2.0, 3.0]) if x.shape[2] > x.shape[3] else x.amax((2, 3))


@wrong("branch-on-shape", x="float32 batch 3 h w", h=(64, 32, 256, 32), w=(64, 32, 256, 32))
class Stride(nn.Module):
    def forward(self, x):
        r = max(x.shape[2], x.shape[3]) // 64
        return F.avg_pool2d(x, r).mean((2, 3)) if r > 1 else x.amax((2, 3))


@wrong("branch-on-shape", x="float32 batch t 8", t=(5, 1, 40), batch=32)
class BigBatch(Linear):
    def forward(self, x):
        if x.shape[0] > 16:
            return torch.cat([self.linear(c) for c in x.split(16)]) * 1.0 + 0.01
        return self.linear(x)


@wrong("loop-over-length", x="float32 batch t 8", t=(5, 1, 40))
class MapF(nn.Module):
    def forward(self, x):
        return torch.stack(list(map(torch.sin, x.unbind(1))), 1)


@wrong("branch-on-shape", "loop-over-length", x="float32 batch t 8", t=(5, 1, 40))
class Accum(nn.Module):
    def forward(self, x):
        return torch.stack(list(itertools.accumulate(x.unbind(1), operator.add)), 1)


@wrong("loop-over-length", x="float32 batch t 8", t=(6, 2, 40, 2))
class PairsStep(nn.Module):
    def forward(self, x):
        c = x.chunk(x.size(1) // 2, dim=1)
        return torch.cat([a.flip(1) for a in c], 1)


@wrong("loop-over-length", x="float32 batch t 8", t=(5, 1, 40))
class Beam(nn.Module):
    def forward(self, x):
        h = x[:, 0]
        for i in range(1, x.size(1)):
            h = torch.where(x[:, i] > h, x[:, i], h * 0.9)
        return h


@wrong("branch-on-shape", "loop-over-length", x="float32 batch t 8", t=(5, 1, 40))
class Recursion(nn.Module):
    def forward(self, x):
        if x.shape[1] == 1:
            return x[:, 0]
        h = x.shape[1] // 2
        return self.forward(x[:, :h]) - self.forward(x[:, h:])


@wrong("frozen-tensor", "frozen-size", **SEQ)
class LinNp(nn.Module):
    def forward(self, x):
        return x * torch.tensor(np.linspace(0, 1, x.size(1)), dtype=x.dtype)[None, :, None]


@wrong("frozen-size", **SEQ)
class NewOnes(nn.Module):
    def forward(self, x):
        b, t, _ = map(int, x.shape)
        return torch.cat([x, x.new_ones(b, t, 1)], -1)


@wrong("frozen-size", **SEQ)
class SizeStr(nn.Module):
    def forward(self, x):
        return x.reshape(*[int(c) for c in str(tuple(int(i) for i in x.shape)).strip("()").split(",")])


@wrong("loop-over-length", "frozen-size", **SEQ)
class SumPy(nn.Module):
    def forward(self, x):
        return x * sum(1 for _ in range(x.shape[1]))


@wrong("frozen-tensor", "frozen-size", **SEQ)
class TriuIdx(nn.Module):
    def forward(self, x):
        i, j = np.triu_indices(x.shape[1])
        return (x[:, i] * x[:, j]).sum(1)


@wrong("frozen-tensor", "frozen-size", **SEQ)
class TorchTensorShape(nn.Module):
    def forward(self, x):
        return x / torch.tensor(list(map(float, x.shape)))[1]


@wrong("frozen-size", **SEQ)
class FftN(nn.Module):
    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x, dim=1), n=int(x.shape[1]), dim=1) * 2


@wrong("frozen-size", **SEQ)
class PadTo(nn.Module):
    def forward(self, x):
        return F.pad(x, (0, 0, 0, 40 - int(x.shape[1])))


@wrong("frozen-size", x="float32 batch t 8", t=(8, 4, 32))
class NegSlice(nn.Module):
    def forward(self, x):
        k = len(x[0]) - 3
        return x[:, k:]


@wrong("frozen-batch", x="float32 batch 8")
class OneHotB(nn.Module):
    def forward(self, x):
        return F.one_hot(torch.arange(len(x)), len(x)).float() @ x


@wrong("loop-over-length", "frozen-batch", x="float32 batch 8")
class StackRows(nn.Module):
    def forward(self, x):
        return torch.stack([x[i] * 2 for i in range(len(x))])


@wrong("frozen-batch", x="float32 batch 8")
class NumpyOut(nn.Module):
    def forward(self, x):
        return x + torch.zeros(tuple(np.asarray(x.shape)))


@wrong("frozen-batch", x="float32 batch t 8", t=(5, 1, 12))
class H0Buf(nn.Module):
    def __init__(self):
        super().__init__()
        self.r = nn.GRU(8, 4, batch_first=True)

    def init(self, b):
        return torch.zeros(1, b, 4)

    def forward(self, x):
        return self.r(x, self.init(int(x.size(0))))[0]


@wrong("differs", "frozen-value", x="float32 8", batch=0)
class NpView(nn.Module):
    def forward(self, x):
        a = x.clone()
        n = a.numpy()
        n *= 2
        return a


@wrong("differs", "frozen-value", x="float32 8", batch=0)
class Pickled(nn.Module):
    def forward(self, x):
        b = io.BytesIO()
        torch.save(x, b)
        b.seek(0)
        return torch.load(b) * 2


@wrong("frozen-value", x="float32 8", batch=0)
class ToListComp(nn.Module):
    def forward(self, x):
        return torch.tensor([math.tanh(v) for v in x.tolist()])


@wrong("differs", "frozen-value", x="float32 8", batch=0)
class DataAttr(nn.Module):
    def forward(self, x):
        y = torch.zeros(8)
        y.data.copy_(torch.from_numpy(x.numpy()))
        return y + x


@wrong("frozen-value", x="float32 8", batch=0)
class FullItem(nn.Module):
    def forward(self, x):
        return x.new_full((8,), x.max().item())


@wrong("frozen-value", x="float32 8", batch=0)
class AddcmulItem(nn.Module):
    def forward(self, x):
        return torch.add(x, x, alpha=x.mean().item())


@wrong("frozen-value", x="float32 8", batch=0)
class ClampItem(nn.Module):
    def forward(self, x):
        return x.clamp(max=x.median().item())


@wrong("state", x="float32 batch 8")
class ClosureCount(nn.Module):
    def __init__(self):
        super().__init__()
        n = [0]

        def f(x):
            n[0] += 1
            return x * n[0]

        self.f = f

    def forward(self, x):
        return self.f(x)


class Holder:
    total = 0


@wrong("state", x="float32 batch 8")
class ClassAttr(nn.Module):
    def forward(self, x):
        Holder.total += 1
        return x + Holder.total


@wrong("state", x="float32 batch 8")
class HookCount(Linear):
    def __init__(self):
        super().__init__()
        self.n = 0

        def h(m, i, o):
            self.n += 1
            return o * self.n

        self.linear.register_forward_hook(h)

    def forward(self, x):
        return self.linear(x)


@wrong("state", x="float32 batch 8")
class Swap(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)

    def forward(self, x):
        self.a, self.b = (self.b, self.a)
        return self.a(x)


@wrong("state", x="float32 batch 8")
class BestSoFar(nn.Module):
    best = -1000000000.0

    def forward(self, x):
        self.best = max(self.best, float(x.max()))
        return x - self.best


@wrong("state", x="float32 batch 8")
class Memo(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = {}

    def forward(self, x):
        k = tuple(x.shape)
        if k not in self.c:
            self.c[k] = x.mean(1, keepdim=True)
        return x - self.c[k]


@wrong("state", x="float32 batch 8")
class AfterTen(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("n", torch.zeros(1, dtype=torch.long))

    def forward(self, x):
        self.n += 1
        return torch.where(self.n > 10, x * 0, x)


@wrong("nondeterministic", x="float32 batch 8", by=lambda run: run.differs_among_seeds(20))
class SetOrder(nn.Module):
    def forward(self, x):
        return x * random.sample([1, 2, 3], 1)[0]


@wrong("nondeterministic", x="float32 batch 8")
class Dt(nn.Module):
    def forward(self, x):
        return x + datetime.datetime.now(datetime.timezone.utc).microsecond


@wrong("nondeterministic", x="float32 batch 8")
class RandInit(nn.Module):
    def forward(self, x):
        return nn.Linear(8, 4)(x)


@wrong("nondeterministic", x="float32 batch 8", by=lambda run: run.differs_among_seeds(500))
class MaskDrop(nn.Module):
    def forward(self, x):
        return x * (torch.rand_like(x) > 0.001)


@wrong("nondeterministic", x="float32 batch 8")
class EmptyLike(nn.Module):
    def forward(self, x):
        y = torch.empty_like(x)
        y[:, :7] = x[:, :7]
        return y


@wrong(
    "nondeterministic",
    x="float32 batch 8",
    by=lambda run: run.differs_when(torch.Tensor, "new_empty", lambda x, *shape: x.new_full(shape, float("nan"))),
)
class NewEmpty(nn.Module):
    def forward(self, x):
        return torch.cat([x, x.new_empty(x.shape[0], 1) * 0.0], 1)


@wrong("training-mode", x="float32 batch 3 8 8")
class SubTrain(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.n.train()(x)


@wrong("training-mode", x="float32 batch 3 8 8")
class DropPath(nn.Module):
    def forward(self, x):
        return F.dropout2d(x, 0.1, True)


@wrong("training-mode", x="float32 batch t 8", t=(5, 1, 12))
class LstmDrop(nn.Module):
    def __init__(self):
        super().__init__()
        self.r = nn.LSTM(8, 8, 2, batch_first=True, dropout=0.5)

    def forward(self, x):
        self.r.train()
        return self.r(x)[0]


@wrong("training-mode", x="float32 batch t 8", t=(5, 1, 12))
class SdpaDrop(nn.Module):
    def forward(self, x):
        q = x.unsqueeze(1)
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.2)[:, 0]


@wrong("input-mutation", x="float32 batch 8")
class SortOut(nn.Module):
    def forward(self, x):
        x.copy_(x.sort(1).values)
        return x


@wrong("input-mutation", x="float32 batch 8")
class Detached(nn.Module):
    def forward(self, x):
        y = x.detach()
        y[:, 0] = 1
        return x * 2


@wrong("input-mutation", x="float32 batch 8")
class DataMut(nn.Module):
    def forward(self, x):
        x.data.mul_(2)
        return x + 1


@wrong("input-mutation", x="float32 batch 8")
class Resize(nn.Module):
    def forward(self, x):
        x.unsqueeze_(1)
        return x * 2


@wrong("input-mutation", x="float32 batch 8")
class NormIP(nn.Module):
    def forward(self, x):
        return F.normalize(x, out=x)


@wrong("rows-mixed", x="float32 batch 8")
class ContrastMean(nn.Module):
    def forward(self, x):
        return x - 0.1 * x.mean(0)


@wrong("rows-mixed", x="float32 batch 8")
class BatchStd(nn.Module):
    def forward(self, x):
        return torch.cat([x, x.std(0, unbiased=False).mean().expand(x.shape[0], 1)], 1)


@wrong("rows-mixed", x="float32 batch t 8", t=(4, 4, 4))
class PermuteWrong(nn.Module):
    def forward(self, x):
        return x.transpose(0, 1).reshape(x.shape)


@wrong("rows-mixed", x="float32 batch 8")
class SortB(nn.Module):
    def forward(self, x):
        return x.sort(0).values


@wrong("rows-mixed", x="float32 batch 8")
class ShiftB(nn.Module):
    def forward(self, x):
        return torch.cat([x[:1], x[:-1]])


@wrong("rows-mixed", x="float32 batch 3 8 8")
class GroupB(nn.Module):
    def forward(self, x):
        return F.group_norm(x.transpose(0, 1).reshape(1, -1, 8, 8), 1).reshape(3, -1, 8, 8).transpose(0, 1)


@wrong("rows-mixed", ids="int64 batch t in 0 9", t=(5, 1, 12))
class TrimPad(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(10, 4)

    def forward(self, ids):
        n = (ids != 0).sum(1).max().clamp(min=1)
        return self.e(ids[:, :n]).mean(1)


@wrong("batch-not-first", x="float32 batch 8")
class Flat1(nn.Module):
    def forward(self, x):
        return x.flatten()


@wrong("batch-not-first", x="float32 batch 8")
class TopBatch(nn.Module):
    def forward(self, x):
        return x.topk(1, dim=0).values


@wrong("batch-not-first", x="float32 batch 3 h w", h=(8, 4, 16), w=(8, 4, 16))
class PatchesAsRows(nn.Module):
    def forward(self, x):
        return x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 4, 4)


@wrong("batch-not-first", x="float32 batch 8")
class Chunked(nn.Module):
    def forward(self, x):
        return torch.cat([x, x])


@wrong("scalar-output", x="float32 batch 8")
class MaxAll(nn.Module):
    def forward(self, x):
        return (x, x.max())


@wrong("rank-changes", x="float32 batch t 8", t=(5, 1, 9))
class CondFlat(nn.Module):
    def forward(self, x):
        return x if x.shape[1] > 1 else x.flatten(1)


@wrong("outputs-change", x="float32 batch t 8", t=(5, 1, 9))
class Opt(nn.Module):
    def forward(self, x):
        return (x, x.mean(1)) if x.shape[1] > 1 else (x,)


@wrong("eager-fails", x="float32 batch t 8", t=(5, 1, 9))
class LastTwo(nn.Module):
    def forward(self, x):
        return x[:, -2]


@wrong("eager-fails", x="float32 batch t 8", t=(5, 1, 9), batch=8)
class MaxBatch4(nn.Module):
    def forward(self, x):
        assert x.shape[0] <= 4
        return x * 2


@wrong("eager-fails", x="float32 batch 3 h w", h=(32, 1, 64), w=(32, 1, 64))
class TinyConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.c(x).mean((2, 3))


@wrong("frozen-tensor", x="float32 batch 8")
class CloneDetach(nn.Module):
    def forward(self, x):
        return (x.detach().clone().requires_grad_(False) * 2, x.data + 1)
