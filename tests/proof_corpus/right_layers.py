"""Right: the layers that people serve, at every declared size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from corpus import right
from torch import nn

SEQ = {"x": "float32 batch t 16", "t": (5, 1, 40)}
IMAGE = {"x": "float32 batch 3 h w in 0 1", "h": (32, 16, 64), "w": (32, 16, 64)}


@right(x="float32 batch 8")
class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 3))


@right(**IMAGE)
class ConvNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.GroupNorm(2, 8),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
            nn.Linear(72, 5),
        )


@right(**SEQ)
class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 4, d // 4).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(d // 4)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, d))


@right(**SEQ)
class CausalAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 16)

    def forward(self, x):
        t = x.size(1)
        mask = torch.ones(t, t, device=x.device).triu(1).bool()
        scores = (self.q(x) @ x.transpose(1, 2)) * (x.size(-1) ** -0.5)
        return scores.masked_fill(mask, float("-inf")).softmax(-1) @ x


@right(**SEQ)
class Sdpa(nn.Module):
    def forward(self, x):
        q = x.unsqueeze(1)
        return F.scaled_dot_product_attention(q, q, q, is_causal=False).squeeze(1)


@right(**SEQ)
class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@right(**SEQ)
class EncoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)

    def forward(self, x):
        return self.layer(x)


@right(**SEQ)
class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True), 2, enable_nested_tensor=False
        )

    def forward(self, x):
        return self.encoder(x).mean(1)


@right(ids="int64 batch t in 0 99", mask="int64 batch t in 0 1", t=(6, 1, 24))
class TextEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(100, 16)
        self.places = nn.Embedding(24, 16)
        self.norm = nn.LayerNorm(16)
        self.q = nn.Linear(16, 16)

    def forward(self, ids, mask):
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.words(ids) + self.places(places))
        bias = (1.0 - mask[:, None, :].float()) * torch.finfo(torch.float32).min
        x = (self.q(x) @ x.transpose(1, 2) + bias).softmax(-1) @ x
        kept = mask[..., None].float()
        return (x * kept).sum(1) / kept.sum(1).clamp(min=1e-9)


@right(**SEQ)
class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 12, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.lstm(x)[0]


@right(**SEQ)
class LstmDynamicState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 12, batch_first=True)

    def forward(self, x):
        state = torch.zeros(1, x.shape[0], 12)
        return self.lstm(x, (state, state))[0][:, -1]


@right(**SEQ)
class GruLearnedState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(16, 12, batch_first=True)
        self.start = nn.Parameter(torch.randn(1, 1, 12))

    def forward(self, x):
        return self.gru(x, self.start.expand(-1, x.shape[0], -1).contiguous())[0]


@right(**SEQ)
class PositionSlice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(40, 16))

    def forward(self, x):
        return x + self.table[: x.shape[1]]


@right(**SEQ)
class ClassToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 16))

    def forward(self, x):
        return torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)


@right(**SEQ)
class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inverse", 1.0 / 100 ** (torch.arange(0, 8).float() / 8))

    def forward(self, x):
        angle = torch.outer(torch.arange(x.shape[1]).to(self.inverse), self.inverse)
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.cat([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1)


@right(**IMAGE)
class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x):
        deep = self.down(x).relu()
        back = F.interpolate(deep, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.up(back) + x


@right(**IMAGE)
class Upsampled(nn.Module):
    def forward(self, x):
        return F.interpolate(x, scale_factor=2, mode="nearest")


@right(**IMAGE)
class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())

    def forward(self, x):
        x = self.conv(x)
        return x * self.gate(x)


@right(x="float32 batch 3 32 32 in 0 1")
class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 8, 8)

    def forward(self, x):
        return self.conv(x).flatten(2).transpose(1, 2).contiguous()


@right(x="float32 batch h w 8", h=(16, 8, 32, 4), w=(16, 8, 32, 4))
class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 16)

    def forward(self, x):
        b, h, w, c = x.shape
        x = x.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        x = self.mix(x.transpose(1, 2)).transpose(1, 2)
        return x.view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)


@right(**SEQ)
class EinsumBilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 16, 16))

    def forward(self, x):
        return torch.einsum("bti,hij,bsj->bhts", x, self.weight, x)


@right(x="float16 batch 16")
class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 32)
        self.half()

    def forward(self, x):
        return self.linear(x).relu()


@right(x="float32 batch 16")
class BfloatInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 32).bfloat16()

    def forward(self, x):
        return self.linear(x.bfloat16()).float()


@right(x="float32 batch 16")
class AutocastInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 32)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.linear(x).float()


@right(x="float32 batch 16")
class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(40)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


@right(x="float32 batch t 4", t=(64, 16, 300))
class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 5, padding=2)

    def forward(self, x):
        return F.max_pool1d(self.conv(x.transpose(1, 2)), 3, stride=2).amax(2)


@right(x="uint8 batch 8 8 3 in 0 255")
class ImageBytes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]))

    def forward(self, x):
        x = x.float() / 255 - self.mean
        return self.conv(x.permute(0, 3, 1, 2)).mean((2, 3)).softmax(1)


class _Pooled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x.mean(0)
        return x.amax(0)


@right(batch=0, x="float32 t 8", t=(5, 1, 20))
class ScriptedPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.pool = torch.jit.script(_Pooled())

    def forward(self, x):
        return self.pool(self.linear(x))


@torch.jit.script
def _halves(x: torch.Tensor) -> torch.Tensor:
    if x.shape[1] % 2 == 0:
        return x[:, ::2]
    return x


@right(**SEQ)
class ScriptedFunction(nn.Module):
    def forward(self, x):
        return _halves(x) * 2
