"""Right: checks, caches, chance and delicate numbers that a careless judge would accuse."""

from __future__ import annotations

import collections
import functools
import random

import numpy as np
import torch
import torch.nn.functional as F
from corpus import right
from torch import nn

SEQ = {"x": "float32 batch t 8", "t": (5, 1, 40)}


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)


@right(x="float32 batch t 8", t=(5, 1, 40))
class WarnLen(nn.Module):
    def forward(self, x):
        assert len(x) > 0
        assert len(x.shape) == 3
        return x * 2


@right(x="float32 batch 8")
class BoolParam(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(8))
        self.register_buffer("on", torch.tensor(True))

    def forward(self, x):
        if bool(self.on) and self.w.abs().sum() > 0:
            return x * self.w
        return x


@right(x="float32 batch 8")
class ItemParam(nn.Module):
    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.tensor(2.5))

    def forward(self, x):
        return x / self.t.item()


@right(x="float32 batch 8 in 0 1")
class FloatCheck(nn.Module):
    def forward(self, x):
        lo, hi = x.aminmax()
        if lo < 0 or hi > 1:
            raise ValueError("range")
        return x.sqrt()


@right(x="float32 batch 8 in 0 255")
class Scale255(nn.Module):
    def forward(self, x):
        if x.max() > 255:
            x = x * 255 / x.max()
        return x / 255


@right(ids="int64 batch t in 1 99", t=(5, 1, 12))
class NoPad(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(100, 4)

    def forward(self, ids):
        if (ids == 0).any():
            return self.e(ids) * (ids != 0)[..., None]
        return self.e(ids)


@right(x="float32 batch t 8", t=(8, 8, 64, 8))
class MultOk(nn.Module):
    def forward(self, x):
        if x.shape[1] % 8:
            x = F.pad(x, (0, 0, 0, 8 - x.shape[1] % 8))
        return x.view(x.shape[0], -1, 8, 8).sum(2)


@right(x="float32 batch t 8", t=(8, 2, 64))
class MinTwo(nn.Module):
    def forward(self, x):
        if x.shape[1] < 2:
            return x
        return x[:, 1:] - x[:, :-1]


@right(x="float32 batch t 8", t=(8, 2, 64))
class BigEnough(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.randn(128, 8))

    def forward(self, x):
        if x.shape[1] > self.p.shape[0]:
            raise ValueError
        return x + self.p[: x.shape[1]]


@right(x="float32 batch 8")
class AllcloseLog(nn.Module):
    def forward(self, x):
        y = x * 2
        if not torch.allclose(y, x + x):
            raise RuntimeError
        return y


@right(x="float32 batch 8")
class PrintsStats(nn.Module):
    def forward(self, x):
        msg = f"{x.mean():.2f} {x.shape} {len(x)}"
        self.__dict__["last"] = msg
        return x.exp()


@right(x="float32 batch 8")
class Histogram(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def forward(self, x):
        self.seen[x.shape[0].__class__.__name__] += 1
        return x.cos()


@right(x="float32 batch 8")
class EmaUnused(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("ema", torch.zeros(8))

    def forward(self, x):
        self.ema.mul_(0.9).add_(x.mean(0) * 0.1)
        return x * 2


@right(x="float32 batch 8")
class LruByAttr(nn.Module):
    def __init__(self):
        super().__init__()
        self.k = 8

    @functools.cached_property
    def table(self):
        return torch.arange(self.k).float()

    def forward(self, x):
        return x + self.table


@functools.lru_cache(None)
def _tab(k):
    return torch.arange(k).float()


@right(x="float32 batch 8")
class LruConst(nn.Module):
    def forward(self, x):
        return x + _tab(8)


@right(x="float32 batch t 8", t=(5, 1, 40))
class SizeCacheDyn(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = None

    def forward(self, x):
        t = x.shape[1]
        if self.c is None or self.c.shape[0] != t:
            self.c = torch.arange(t).float()
        return x + self.c[:, None]


@right(x="float32 batch 8")
class RandUnused(nn.Module):
    def forward(self, x):
        _ = torch.rand(3)
        random.random()
        np.random.rand()
        return x * 2


@right(x="float32 batch 8")
class RandCancel(nn.Module):
    def forward(self, x):
        p = torch.randperm(8)
        return x[:, p][:, p.argsort()]


@right(x="float32 batch 8")
class DropEval(nn.Module):
    def __init__(self):
        super().__init__()
        self.d = nn.Dropout(0.5)
        self.b = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.b(self.d(x)) + F.dropout(x, 0.3, self.training)


@right(x="float32 batch 8")
class TrainEvalToggle(nn.Module):
    def __init__(self):
        super().__init__()
        self.b = nn.BatchNorm1d(8)

    def forward(self, x):
        self.b.eval()
        return self.b(x)


@right(x="float32 batch 8")
class ReluIPInner(Linear):
    def forward(self, x):
        return F.relu(self.linear(x), inplace=True).add_(1)


@right(x="float32 batch 8")
class ViewThenNew(nn.Module):
    def forward(self, x):
        y = x.view(-1, 2, 4) + 0
        y[:, 0] = 0
        return y.flatten(1)


@right(x="float32 batch 8")
class IndexPutOwn(nn.Module):
    def forward(self, x):
        o = torch.zeros_like(x)
        o[x > 0] = 1
        o.masked_fill_(x < -1, -1)
        return o


@right(x="float32 batch t 8", t=(5, 1, 12))
class Cummax(nn.Module):
    def forward(self, x):
        v, i = x.cummax(1)
        return (v, i)


@right(x="float32 batch 8")
class GumbelFixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("g", torch.rand(8))

    def forward(self, x):
        return (x - torch.log(-torch.log(self.g))).softmax(-1)


@right(x="float32 batch 8")
class FixedGenerator(nn.Module):
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.w = nn.Parameter(torch.randn(8, 8, generator=g))

    def forward(self, x):
        return x @ self.w


@right(x="float32 batch t 8", mask="bool batch t", t=(5, 1, 12))
class AttnMasked(nn.Module):
    def forward(self, x, mask):
        a = x @ x.transpose(1, 2)
        a = a.masked_fill(mask[:, None], -10000.0).softmax(-1)
        return a @ x


@right(x="float32 batch t 8", mask="bool batch t", t=(5, 1, 12))
class AttnNaNRows(nn.Module):
    def forward(self, x, mask):
        a = (x @ x.transpose(1, 2)).masked_fill(mask[:, None], float("-inf")).softmax(-1)
        return a @ x


@right(x="float32 batch t 8", mask="bool batch t", t=(5, 1, 12))
class MhaMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.m = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x, mask):
        mask = mask.clone()
        mask[:, 0] = False
        return self.m(x, x, x, key_padding_mask=mask, need_weights=True)


@right(x="float32 batch t 8", t=(5, 1, 12))
class SdpaCausal(nn.Module):
    def forward(self, x):
        q = x.unsqueeze(1)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)[:, 0]


@right(x="float32 batch t 8", t=(5, 1, 12))
class EncNested(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    def forward(self, x):
        return self.e(x)


@right(x="float32 batch 3 h w in 0 1", h=(32, 16, 64, 8), w=(32, 16, 64, 8))
class FpnLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, 2, 1)
        self.b = nn.Conv2d(8, 8, 3, 2, 1)

    def forward(self, x):
        a = self.a(x)
        b = self.b(a.relu())
        return {"p2": a + F.interpolate(b, size=a.shape[-2:], mode="nearest"), "p3": b}


@right(x="float32 batch 3 h w in 0 1", h=(32, 16, 64, 8), w=(32, 16, 64, 8))
class AspPool(nn.Module):
    def forward(self, x):
        g = F.adaptive_avg_pool2d(x, 1)
        return F.interpolate(g, size=x.shape[2:], mode="bilinear", align_corners=False) + x


@right(x="float32 batch 3 h w in 0 1", h=(32, 16, 64, 8), w=(32, 16, 64, 8))
class Coord(nn.Module):
    def forward(self, x):
        b, _, h, w = x.shape
        ys = torch.arange(h, dtype=x.dtype) / (h - 1)
        xs = torch.arange(w, dtype=x.dtype) / (w - 1)
        return torch.cat([x, ys.view(1, 1, h, 1).expand(b, 1, h, w), xs.view(1, 1, 1, w).expand(b, 1, h, w)], 1)


@right(x="float32 batch 3 h w in 0 1", h=(32, 16, 64, 8), w=(32, 16, 64, 8))
class SpatialSoft(nn.Module):
    def forward(self, x):
        b, c, h, w = x.shape
        p = x.flatten(2).softmax(-1).view(b, c, h, w)
        return torch.stack(
            [(p.sum(2) * torch.linspace(-1, 1, w)).sum(-1), (p.sum(3) * torch.linspace(-1, 1, h)).sum(-1)], -1
        )


@right(x="float32 batch 3 h w in 0 1", h=(32, 16, 64, 8), w=(32, 16, 64, 8))
class PosInterp(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.randn(1, 3, 7, 7))

    def forward(self, x):
        return x + F.interpolate(self.p, size=x.shape[-2:], mode="bicubic", align_corners=False)


@right(x="float32 batch t 8", t=(5, 1, 12))
class WeightTied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).relu())


@right(x="float32 batch 8")
class Deq(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8) * 0.05)

    def forward(self, x):
        z = torch.zeros_like(x)
        for _ in range(50):
            z = torch.tanh(z @ self.w + x)
        return z


@right(x="float32 batch 8")
class ExpScale(nn.Module):
    def forward(self, x):
        return (torch.logsumexp(x * 1000, 1), (x * 1000).softmax(1), F.log_softmax(x * 10000.0, 1))


@right(x="float32 batch 8")
class Cancel(nn.Module):
    def forward(self, x):
        return (x + 1000000.0 - 1000000.0, (x * 10000.0).sin())


@right(x="float32 batch 1000")
class BigSum(nn.Module):
    def forward(self, x):
        return (x.sum(1), (x * x).sum(1).sqrt(), x.mean(1).reciprocal())


@right(x="float32 batch 32")
class Quant(nn.Module):
    def forward(self, x):
        return (
            torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127),
            (x / 0.1).round().clamp(-128, 127).to(torch.int8),
        )


@right(x="int64 batch 8 in -1000000 1000000")
class HashInts(nn.Module):
    def forward(self, x):
        return (x * 2654435761 % 1024, x.bitwise_and(255), x // 3, torch.div(x, 7, rounding_mode="floor"))


@right(x="uint8 batch 8 in 0 255")
class Bytes(nn.Module):
    def forward(self, x):
        return (x + 200, x.bitwise_not(), x.float().mul(2).clamp(0, 255).byte())


@right(x="float32 batch 8")
class Cplx(nn.Module):
    def forward(self, x):
        z = torch.complex(x, x.flip(1))
        return ((z * z.conj()).real, torch.view_as_real(torch.fft.fft(z)))


@right(x="float32 batch 8")
class KwDefaults(Linear):
    def forward(self, x, scale=2.0, flag=True):
        return self.linear(x) * scale if flag else x


@right(x="float32 batch 8")
class PropertyUse(Linear):
    @property
    def device(self):
        return next(self.parameters()).device

    def forward(self, x):
        return self.linear(x.to(self.device, next(self.parameters()).dtype))


@right(x="float32 batch 8")
class ToCpu(nn.Module):
    def forward(self, x):
        return x.cpu().to("cpu") * torch.ones(8, device=torch.device("cpu"))


@right(x="float32 batch 8")
class SeqIndex(nn.Module):
    def __init__(self):
        super().__init__()
        self.s = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        for i, m in enumerate(self.s):
            x = m(x)
            if i == 1 and x.dim() != 2:
                break
        return x


@right(batch=0, x="float32 t 8", t=(5, 1, 30))
class UnbMean(nn.Module):
    def forward(self, x):
        return (x.mean(0), x.std(0, unbiased=False), x - x.mean())


@right(batch=0, x="float32 t", t=(5, 2, 30))
class Pairwise(nn.Module):
    def forward(self, x):
        return ((x[:, None] - x[None]).abs().triu(1).sum().reshape(1), torch.cdist(x[:, None], x[:, None]))


@right(batch=0, x="float32 n 3", y="float32 m 3", n=(6, 1, 20), m=(4, 1, 20))
class ICP(nn.Module):
    def forward(self, x, y):
        d = torch.cdist(x, y)
        return (d.argmin(1), d.min(1).values)


@right(batch=0, b="float32 n 4 in 0 1", n=(6, 1, 20))
class IoU(nn.Module):
    def forward(self, b):
        b = torch.cat([b[:, :2], b[:, :2] + b[:, 2:] + 0.1], 1)
        a = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
        lt = torch.maximum(b[:, None, :2], b[None, :, :2])
        rb = torch.minimum(b[:, None, 2:], b[None, :, 2:])
        i = (rb - lt).clamp(min=0).prod(-1)
        return i / (a[:, None] + a[None] - i)


@right(x="float32 batch t 8", t=(8, 1, 64))
class AsksAndIsRight(nn.Module):
    """Does something else when traced, which is the same."""

    def forward(self, x):
        if torch.jit.is_tracing():
            return x * torch._shape_as_tensor(x)[1]
        return x * x.shape[1]


@right(x="float32 batch t 8", t=(8, 1, 64))
class AsksForItsLog(nn.Module):
    """Asks as torchvision does in most places."""

    def forward(self, x):
        if not torch.jit.is_scripting() and not torch.jit.is_tracing():
            torch._C._log_api_usage_once("forward")
        if not torch.jit.is_tracing() and x.shape[1] > 64:
            raise ValueError(f"{x.shape[1]} is too long")
        return x * x.shape[1]
