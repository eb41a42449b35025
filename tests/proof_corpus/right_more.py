"""Right: more of what people serve: text, sound, images, boxes, other dtypes, features of torch itself."""

from __future__ import annotations

import math
import time
import warnings

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from corpus import right
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

SEQ = {"x": "float32 batch t 16", "t": (5, 1, 40)}


IMAGE = {"x": "float32 batch 3 h w in 0 1", "h": (32, 16, 64, 8), "w": (32, 16, 64, 8)}


class Linear(nn.Module):
    def __init__(self, i=16, o=16):
        super().__init__()
        self.linear = nn.Linear(i, o)


@torch.jit.script
def gelu_s(x):
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


@torch.jit.script_if_tracing
def trim(x: Tensor) -> Tensor:
    if x.shape[1] > 10:
        return x[:, :10]
    return x


@right(x="float32 batch t 16", mask="bool batch t", t=(6, 1, 20))
class EncPadMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1, enable_nested_tensor=False
        )

    def forward(self, x, mask):
        mask = mask.clone()
        mask[:, 0] = False
        return self.e(x, src_key_padding_mask=mask)


@right(**SEQ)
class CausalEnc(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x):
        m = torch.triu(torch.full((x.size(1), x.size(1)), float("-inf")), 1)
        return self.e(x, src_mask=m)


@right(x="float32 batch t 16", y="float32 batch u 16", t=(5, 1, 12), u=(7, 1, 12))
class Dec(nn.Module):
    def __init__(self):
        super().__init__()
        self.d = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x, y):
        return self.d(x, y)


@right(x="float32 batch t 16", y="float32 batch u 16", t=(5, 1, 12), u=(7, 1, 12))
class FullTr(nn.Module):
    def __init__(self):
        super().__init__()
        self.d = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)

    def forward(self, x, y):
        return self.d(x, y)


@right(**SEQ)
class RelBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.b = nn.Embedding(32, 2)

    def forward(self, x):
        t = x.shape[1]
        p = torch.arange(t)
        rel = (p[None] - p[:, None]).clamp(-15, 16) + 15
        bias = self.b(rel).permute(2, 0, 1)
        a = (
            x.view(x.shape[0], t, 2, 8).transpose(1, 2) @ x.view(x.shape[0], t, 2, 8).permute(0, 2, 3, 1) + bias
        ).softmax(-1)
        return a.mean(1) @ x


@right(**SEQ)
class Alibi(nn.Module):
    def forward(self, x):
        t = x.shape[1]
        d = (torch.arange(t)[None] - torch.arange(t)[:, None]).abs().float()
        return (x @ x.transpose(1, 2) / x.shape[-1] ** 0.5 - d * 0.1).softmax(-1) @ x


@right(ids="int64 batch t in 0 49", t=(6, 1, 20))
class Roberta(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(50, 8, padding_idx=1)
        self.p = nn.Embedding(24, 8, padding_idx=1)

    def forward(self, ids):
        m = ids.ne(1).int()
        pos = (torch.cumsum(m, 1).type_as(m) * m).long() + 1
        return self.e(ids) + self.p(pos)


@right(ids="int64 batch t in 0 49", mask="int64 batch t in 0 1", t=(6, 1, 20))
class HfLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(50, 8)
        self.register_buffer("position_ids", torch.arange(20).expand((1, -1)), persistent=False)
        self.p = nn.Embedding(20, 8)
        self.q = nn.Linear(8, 8)

    def forward(self, ids, mask):
        b, t = ids.size()
        x = self.e(ids) + self.p(self.position_ids[:, :t])
        ext = mask[:, None, None, :].to(x.dtype)
        ext = (1.0 - ext) * torch.finfo(x.dtype).min
        q = self.q(x).view(b, t, 2, 4).permute(0, 2, 1, 3)
        a = (torch.matmul(q, q.transpose(-1, -2)) / math.sqrt(4) + ext).softmax(-1)
        c = torch.matmul(a, q).permute(0, 2, 1, 3).contiguous()
        c = c.view((*c.size()[:-2], 8))
        return {"last": c, "pooled": c[:, 0].tanh()}


@right(**IMAGE)
class ConvT(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1)

    def forward(self, x):
        return self.c(x)


@right(**IMAGE)
class UnfoldFold(nn.Module):
    def forward(self, x):
        u = F.unfold(x, 4, stride=4)
        return F.fold(u * 2, x.shape[-2:], 4, stride=4)


@right(**IMAGE)
class GridS(nn.Module):
    def forward(self, x):
        b, _c, h, w = x.shape
        ys = torch.linspace(-1, 1, h)
        xs = torch.linspace(-1, 1, w)
        g = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1)[None].expand(b, -1, -1, -1)
        return F.grid_sample(x, g * 0.9, align_corners=True)


@right(**IMAGE)
class PixShuf(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(3, 12, 3, padding=1)

    def forward(self, x):
        return F.pixel_shuffle(self.c(x), 2)


@right(x="float32 batch 3 64 64 in 0 1", boxes="float32 batch 4 in 0 1")
class RoiA(nn.Module):
    def forward(self, x, boxes):
        b = torch.stack([boxes[:, 0] * 20, boxes[:, 1] * 20, 30 + boxes[:, 2] * 20, 30 + boxes[:, 3] * 20], 1)
        r = torch.cat([torch.arange(x.shape[0], dtype=x.dtype)[:, None], b], 1)
        return torchvision.ops.roi_align(x, r, (5, 5))


@right(boxes="float32 n 4 in 0 1", scores="float32 n in 0 1", n=(8, 1, 40), batch=0)
class Nms(nn.Module):
    def forward(self, boxes, scores):
        b = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        return torchvision.ops.nms(b, scores, 0.5)


@right(**SEQ)
class Ctc(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 6)

    def forward(self, x):
        p = self.linear(x).log_softmax(-1)
        return (p, p.argmax(-1))


@right(x="float32 batch 400")
class Stft(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("w", torch.hann_window(64))
        self.register_buffer("fb", torch.rand(33, 8))

    def forward(self, x):
        z = torch.stft(x, 64, 16, window=self.w, return_complex=True)
        return torch.log(z.abs().pow(2).transpose(1, 2) @ self.fb + 1e-06)


@right(x="float32 batch t", t=(400, 200, 800))
class StftVar(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("w", torch.hann_window(64))

    def forward(self, x):
        z = torch.stft(x, 64, 16, window=self.w, return_complex=True)
        return torch.view_as_real(z)


@right(x="float32 batch 16")
class WNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.utils.weight_norm(nn.Linear(16, 4))
        self.m = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.n = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))

    def forward(self, x):
        return self.n(self.m(self.linear(x)))


@right(x="float32 batch 16")
class SNormOld(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.utils.spectral_norm(nn.Linear(16, 4))

    def forward(self, x):
        return self.linear(x)


@right(x="float32 batch 16", delicate=True)
class DynQuant(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval(), {nn.Linear}, dtype=torch.qint8
        )

    def forward(self, x):
        return self.linear(x)


@right(ids="int64 batch 6 in 0 19")
class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = nn.EmbeddingBag(20, 5, mode="mean")

    def forward(self, ids):
        return self.e(ids)


@right(x="float32 batch 16")
class Moe(nn.Module):
    def __init__(self):
        super().__init__()
        self.g = nn.Linear(16, 4)
        self.e = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])

    def forward(self, x):
        w, i = self.g(x).softmax(-1).topk(2, -1)
        o = torch.zeros_like(x)
        for k, e in enumerate(self.e):
            o = o + ((i == k) * w).sum(-1, keepdim=True) * e(x)
        return o


@right(x="float32 batch 16")
class Straight(nn.Module):
    def forward(self, x):
        q = (x * 4).round() / 4
        return x + (q - x).detach()


@right(x="float32 batch 16")
class Vq(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Parameter(torch.randn(12, 16))

    def forward(self, x):
        d = torch.cdist(x, self.c)
        i = d.argmin(1)
        return (self.c[i], i)


@right(x="float32 batch 16")
class Kmeans(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Parameter(torch.randn(4, 16))

    def forward(self, x):
        for _ in range(5):
            x = x - 0.1 * (x - self.c[torch.cdist(x, self.c).argmin(1)])
        return x


@right(**SEQ)
class GateLstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.r = nn.LSTM(16, 8, batch_first=True, proj_size=4)
        self.g = nn.GRU(4, 4, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.g(self.r(x)[0])[0]


@right(**SEQ)
class RnnLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.r = nn.RNN(16, 8, batch_first=True)

    def forward(self, x):
        o, h = self.r(x)
        return (o[:, -1], h.transpose(0, 1))


@right(x="float32 batch t 16", lengths="int64 batch in 1 5", t=(6, 5, 20))
class LastByLen(nn.Module):
    def __init__(self):
        super().__init__()
        self.r = nn.GRU(16, 8, batch_first=True)

    def forward(self, x, lengths):
        o, _ = self.r(x)
        return o[torch.arange(x.shape[0]), lengths - 1]


@right(x="float32 batch t 16", lengths="int64 batch in 0 5", t=(6, 5, 20))
class LenMask(nn.Module):
    def forward(self, x, lengths):
        m = torch.arange(x.shape[1], device=x.device)[None] < lengths[:, None]
        return x.masked_fill(~m[..., None], -1000000000.0).amax(1)


@right(**SEQ)
class MinMaxPool(nn.Module):
    def forward(self, x):
        return torch.cat([x.amax(1), x.amin(1), x.mean(1), x.std(1, unbiased=False)], 1)


@right(**SEQ)
class Adapt1d(nn.Module):
    def forward(self, x):
        return F.adaptive_max_pool1d(x.transpose(1, 2), 4)


@right(**SEQ)
class DilConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.ModuleList([nn.Conv1d(16, 16, 3, padding=2**i, dilation=2**i) for i in range(4)])

    def forward(self, x):
        x = x.transpose(1, 2)
        for c in self.c:
            x = x + c(x).relu()
        return x.mean(-1)


@right(**SEQ)
class CausalConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv1d(16, 16, 4)

    def forward(self, x):
        return self.c(F.pad(x.transpose(1, 2), (3, 0))).transpose(1, 2)


@right(**IMAGE)
class Bicubic(nn.Module):
    def forward(self, x):
        return F.interpolate(x, size=(24, 24), mode="bicubic", align_corners=False, antialias=True)


@right(**IMAGE)
class RefPad(nn.Module):
    def forward(self, x):
        return F.pad(x, (2, 1, 2, 1), mode="reflect")


@right(**IMAGE)
class Lrn(nn.Module):
    def forward(self, x):
        return F.local_response_norm(x, 3)


@right(**IMAGE)
class MixedPool(nn.Module):
    def forward(self, x):
        return F.max_pool2d(x, 3, 2, 1, ceil_mode=True) + F.avg_pool2d(x, 3, 2, 1, ceil_mode=True)


@right(**IMAGE)
class InstN(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = nn.InstanceNorm2d(3, affine=True)

    def forward(self, x):
        return self.n(x)


@right(**IMAGE)
class StaticShapeChecks(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        _b, c, h, w = x.shape
        assert c == 3, f"bad {x.shape}"
        assert (h + w) % 8 == 0
        torch._assert(h > 0, "h")
        if h < 8 or w < 8:
            raise ValueError
        return self.c(x)


@right(**IMAGE)
class PadIfNeeded(nn.Module):
    def forward(self, x):
        h, w = x.shape[-2:]
        ph = (8 - h % 8) % 8
        pw = (8 - w % 8) % 8
        return F.pad(x, (0, pw, 0, ph)) * 2


@right(**SEQ)
class PadIfNeededDyn(nn.Module):
    def forward(self, x):
        t = x.shape[1]
        p = (4 - t % 4) % 4
        x = F.pad(x, (0, 0, 0, p))
        return x.view(x.shape[0], -1, 4, 16).sum(2)


@right(x="float32 batch 16")
class NumpyConst(nn.Module):
    def __init__(self):
        super().__init__()
        self.k = np.hanning(16).astype(np.float32)

    def forward(self, x):
        return x * torch.from_numpy(self.k) + torch.as_tensor(2.0) + torch.tensor([0.5])


@right(x="float32 batch 16")
class Meshgrids(nn.Module):
    def forward(self, x):
        a, b = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
        return x + (a * b).flatten().float()


@right(x="float32 batch 16")
class WarnsOnce(nn.Module):
    w = False

    def forward(self, x):
        if not self.w:
            warnings.warn("first", stacklevel=2)
            self.w = True
        return x * 2


@right(x="float32 batch 16")
class Timing(nn.Module):
    def __init__(self):
        super().__init__()
        self.times = []

    def forward(self, x):
        t = time.perf_counter()
        y = x.exp()
        self.times.append(time.perf_counter() - t)
        return y


@right(x="float32 batch 16")
class Profiled(nn.Module):
    def forward(self, x):
        with torch.autograd.profiler.record_function("a"):
            return x.tanh()


@right(x="float32 batch 16")
class Checkpointed(Linear):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.linear, x, use_reentrant=False)


@right(x="float32 batch 16")
class EnableGrad(Linear):
    def forward(self, x):
        with torch.no_grad():
            return self.linear(x)


@right(x="float32 batch 16")
class Hooks(Linear):
    def __init__(self):
        super().__init__()
        self.feats = {}
        self.linear.register_forward_hook(lambda m, i, o: self.feats.__setitem__("a", o))

    def forward(self, x):
        y = self.linear(x)
        return y + self.feats["a"]


@right(x="float32 batch 16")
class Topk5(nn.Module):
    def forward(self, x):
        v, i = x.topk(min(5, x.shape[1]))
        return (v, i)


@right(x="float32 batch 100")
class TopkThresh(nn.Module):
    def forward(self, x):
        v = x.topk(10).values[:, -1:]
        return torch.where(x >= v, x, float("-inf")).softmax(-1)


@right(x="float32 batch 100")
class TopP(nn.Module):
    def forward(self, x):
        p, i = x.softmax(-1).sort(descending=True)
        k = p.cumsum(-1) - p < 0.9
        return torch.zeros_like(p).scatter(1, i, p * k)


@right(x="float32 batch 16")
class CountOut(nn.Module):
    def forward(self, x):
        return ((x > 0).sum(1, keepdim=True), (x.abs() * 10).long(), x.sign().to(torch.int8), x > 0)


@right(x="float32 batch 6 in -100 100")
class BinIt(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("b", torch.linspace(-100, 100, 21))
        self.e = nn.Embedding(22, 3)

    def forward(self, x):
        return self.e(torch.bucketize(x, self.b))


@right(x="float16 batch 16")
class HalfNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = nn.LayerNorm(16).half()
        self.linear = nn.Linear(16, 16).half()

    def forward(self, x):
        return self.linear(self.n(x)).softmax(-1)


@right(x="float64 batch 16")
class Dbl(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16).double()

    def forward(self, x):
        return torch.linalg.norm(self.linear(x), dim=1)


@right(x="int32 batch 16 in -1000 1000")
class IntOps(nn.Module):
    def forward(self, x):
        return (x // 7, x % 7, x << 1, x.float() / 3)


@right(x="int8 batch 16 in -128 127")
class Int8(nn.Module):
    def forward(self, x):
        return (x + 1, (x.int() * x.int()).sum(1))


@right(x="bool batch 16", y="bool batch 16")
class Bools(nn.Module):
    def forward(self, x, y):
        return (x ^ y, (x & y).any(1), (x | y).all(1))


@right(batch=0, x="float32 5")
class OneD(nn.Module):
    def forward(self, x):
        return (x.sum().reshape(1), x.argmax().reshape(1))


@right(batch=0, x="float32 4 4")
class Eig(nn.Module):
    def forward(self, x):
        a = x @ x.T
        return (torch.linalg.eigvalsh(a), torch.linalg.svdvals(x), torch.linalg.det(x).reshape(1))


@right(batch=0, x="float32 4 4")
class Chol(nn.Module):
    def forward(self, x):
        return torch.linalg.cholesky(x @ x.T + torch.eye(4))


@right(batch=0, x="float32 t 4", t=(6, 2, 30))
class Pca(nn.Module):
    def forward(self, x):
        x = x - x.mean(0)
        return x.T @ x / (x.shape[0] - 1)


@right(batch=0, x="float32 h w", h=(6, 2, 30), w=(7, 2, 30))
class Conway(nn.Module):
    def forward(self, x):
        g = (x > 0).float()[None, None]
        for _ in range(6):
            n = F.conv2d(F.pad(g, (1, 1, 1, 1)), torch.ones(1, 1, 3, 3)) - g
            g = ((n == 3) | (n == 2) & (g == 1)).float()
        return g[0, 0]


@right(**SEQ)
class ModuleDictKey(nn.Module):
    def __init__(self):
        super().__init__()
        self.h = nn.ModuleDict({"a": nn.Linear(16, 2), "b": nn.Linear(16, 3)})

    def forward(self, x):
        return {k: h(x) for k, h in self.h.items()}


@right(**SEQ)
class EllipsisIdx(nn.Module):
    def forward(self, x):
        return (x[..., ::3].flip(-1), x[:, -1:], x[:, 0], x[:, ::2])


@right(**SEQ)
class TorchSizeArith(nn.Module):
    def forward(self, x):
        sh = (*x.shape[:-1], 4, 4)
        return (x.view(sh).sum(-1), x.view(*x.shape[:2], -1), x.new_ones(x.shape))


@right(**SEQ)
class RollT(nn.Module):
    def forward(self, x):
        return (torch.roll(x, 1, 1) - x, x.flip(1))


@right(**SEQ)
class GatherRel(nn.Module):
    def forward(self, x):
        i = torch.arange(x.shape[1]).flip(0)[None, :, None].expand_as(x)
        return x.gather(1, i)


@right(**SEQ)
class NumelScale(nn.Module):
    def forward(self, x):
        return (x / math.sqrt(x.size(-1)), x.sum((1, 2)) / (x.shape[1] * x.shape[2]))


@right(**SEQ)
class SinCos(nn.Module):
    def forward(self, x):
        pos = torch.arange(x.shape[1], dtype=torch.float32)[:, None]
        div = torch.exp(torch.arange(0, 16, 2) * (-math.log(10000.0) / 16))
        pe = torch.zeros(x.shape[1], 16)
        pe[:, 0::2] = torch.sin(pos * div)
        pe[:, 1::2] = torch.cos(pos * div)
        return x + pe


@right(**SEQ)
class SelfRepeat(nn.Module):
    def forward(self, x):
        return (x.repeat(1, 2, 1), torch.cat([x] * 3, 1), x.repeat_interleave(2, 1))


@right(**SEQ)
class LoopStatic(nn.Module):
    def forward(self, x):
        return sum(x[..., i] * i for i in range(x.shape[-1]))


@right(**SEQ)
class UnbindStatic(nn.Module):
    def forward(self, x):
        a, b = x.chunk(2, -1)
        return (sum(t for t in x.unbind(-1)), a * b.sigmoid())


@right(x="float32 batch t 16", t=(8, 4, 32, 4))
class BlockAttn(nn.Module):
    def forward(self, x):
        b, t, d = x.shape
        y = x.reshape(b * (t // 4), 4, d)
        y = (y @ y.transpose(1, 2)).softmax(-1) @ y
        return y.reshape(b, t, d)


@right(x="float32 batch 16")
class LogDet(nn.Module):
    def forward(self, x):
        return (torch.logsumexp(x, 1), F.log_softmax(x, 1), F.softplus(x), torch.special.expit(x), torch.lgamma(x))


@right(x="float32 batch 16 in 1 2")
class RangeShift(nn.Module):
    def forward(self, x):
        assert (x >= 1).all()
        assert (x <= 2).all()
        return x.log()


@right(x="float32 batch 16", y="float32 batch 16")
class Tensors2(nn.Module):
    def forward(self, x, y):
        if x.shape != y.shape:
            raise ValueError
        return (F.cosine_similarity(x, y), torch.minimum(x, y), F.mse_loss(x, y, reduction="none"))


@right(x="float32 batch 16")
class NamedT(nn.Module):
    def forward(self, x):
        return x.max(1)


@right(x="float32 batch 16")
class ParamList(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.ParameterList([nn.Parameter(torch.randn(16)) for _ in range(3)])

    def forward(self, x):
        for p in self.p:
            x = x * p if p.mean() > 0 else x + p
        return x


@right(x="float32 batch 16")
class IterNewton(nn.Module):
    def forward(self, x):
        y = x.abs() + 1
        r = torch.ones_like(y)
        for _ in range(20):
            r = 0.5 * (r + y / r)
        return r


@right(x="float32 batch 3")
class Lorenz(nn.Module):
    def forward(self, x):
        for _ in range(60):
            a, b, c = x.unbind(1)
            x = x + 0.02 * torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], 1)
        return x


@right(x="float32 batch 16", delicate=True)
class BigRand(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 16) * 30)

    def forward(self, x):
        for _ in range(6):
            x = torch.sin(x @ self.w)
        return (x, x.argmax(1))


@right(**SEQ)
class TorchJitFn(nn.Module):
    def forward(self, x):
        return gelu_s(x)


@right(**SEQ)
class ScriptIfTracing(nn.Module):
    def forward(self, x):
        return trim(x)


@right(x="float32 batch 16")
class SparseInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("a", torch.eye(16) * 2)

    def forward(self, x):
        return torch.sparse.mm(self.a.to_sparse(), x.t()).t()


@right(x="float32 batch 16")
class Vmap(Linear):
    def forward(self, x):
        return torch.vmap(lambda r: (r * r).sum())(x)


@right(x="float32 8 in 0 1", batch=0)
class DeepGateRange(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 32)
        self.b = nn.Linear(32, 1)

    def forward(self, x):
        g = self.b(torch.relu(self.a(x)))
        if g.item() > 0.25:
            return x * 2
        return x


@right(x="float32 batch t 8", t=(5, 1, 40))
class SplitSizes(nn.Module):
    def forward(self, x):
        a, b = x.split([x.shape[1] // 2, x.shape[1] - x.shape[1] // 2], 1)
        return torch.cat([b, a], 1)


@right(x="float32 batch 8 4 4")
class InstTrack(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = nn.InstanceNorm2d(8, track_running_stats=True)

    def forward(self, x):
        self.n.train()
        return self.n(x)


@right(**SEQ)
class ScaleFromSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(16, 12)

    def forward(self, x):
        q = self.q(x)
        return (q @ q.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1) @ x, (q / q.shape[1]).argmax(-1)


@right(x="float64 batch t 16", t=(5, 1, 40))
class ScaleFromSizeDouble(nn.Module):
    def forward(self, x):
        return (x @ x.transpose(1, 2) * x.shape[1] ** -0.5).softmax(-1) @ x


@right(x="float16 batch t 16", t=(5, 1, 40))
class ScaleFromSizeHalf(nn.Module):
    def forward(self, x):
        return (x @ x.transpose(1, 2) * x.shape[1] ** -0.5).softmax(-1) @ x


@right(**SEQ)
class ScaleFromSizeChecked(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(16, 12)

    def forward(self, x):
        assert x.abs().max() < 1e6
        q = self.q(x)
        return (q @ q.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1) @ x


@right(x="float32 batch 8")
class ImpossibleDraws(nn.Module):
    """What a generator cannot return must not be tried."""

    def forward(self, x):
        keep = torch.bernoulli(torch.ones(x.shape[0], 1))
        row = torch.multinomial(torch.eye(8)[:1].expand(x.shape[0], -1), 1)
        return x * keep + row + torch.normal(torch.zeros_like(x), torch.zeros_like(x)), x * (torch.rand(()) < 1)


@right(x="float32 batch 8")
class CountsAndDraws(nn.Module):
    """Every call is made on a fresh model: what its weights are drawn from is no chance in forward."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.f = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4))

    def forward(self, x):
        self.calls += 1
        torch.rand(3)
        return self.f(x)


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * s * (1 + x * (1 - s))


@right(x="float32 batch 8")
class OwnGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 4)

    def forward(self, x):
        return Swish.apply(self.f(x))


@right(ids="int64 batch t in 0 50", t=(12, 1, 40), delicate=True)
class CancellingIds(nn.Module):
    """Rounding is amplified, and no float goes in."""

    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(51, 16)
        self.a = nn.Linear(16, 64)
        self.b = nn.Linear(64, 1)
        self.a.weight.data *= 1000

    def forward(self, ids):
        h = self.a(self.e(ids).mean(1))
        return self.b(h) - self.b(h + 1e-3)


@right(image="float32 batch 3 16 16 in -1 1")
class GraphFeatures(nn.Module):
    """Dear to build, so that it is copied; torchvision's graph modules are copied into training mode."""

    def __init__(self):
        super().__init__()
        time.sleep(0.06)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.f = create_feature_extractor(net, {"1": "norm"})

    def forward(self, image):
        return self.f(image)["norm"].mean((2, 3))


@right(x="float32 batch 8")
class HookedFeatures(nn.Module):
    """Dear to build; a copy would share what its hook remembers."""

    def __init__(self):
        super().__init__()
        time.sleep(0.06)
        self.f = nn.Linear(8, 4)
        self.kept = {}
        self.f.register_forward_hook(lambda module, inputs, output: self.kept.update(f=output))

    def forward(self, x):
        self.f(x)
        return self.kept["f"] * 2
