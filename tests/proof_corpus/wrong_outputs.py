"""Wrong: outputs that Triton cannot carry, or would cut between requests."""

from __future__ import annotations

import torch
from corpus import wrong
from torch import nn


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)


@wrong("rows-mixed", x="float32 batch 8")
class CentredByBatch(Linear):
    def forward(self, x):
        return self.linear(x - x.mean(0, keepdim=True))


@wrong("rows-mixed", x="float32 batch 8")
class SoftmaxOverBatch(nn.Module):
    def forward(self, x):
        return x.softmax(0)


@wrong("rows-mixed", x="float32 batch 8")
class RolledRows(nn.Module):
    def forward(self, x):
        return x + x.roll(1, 0)


@wrong("rows-mixed", x="float32 batch 8")
class DividedByBatch(nn.Module):
    def forward(self, x):
        return x / x.shape[0]


@wrong("rows-mixed", x="float32 batch 8")
class Similarities(nn.Module):
    def forward(self, x):
        return x @ x.T @ x


@wrong("rows-mixed", x="float32 batch t 8", t=(6, 2, 12))
class SequenceFirstAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return self.attention(x, x, x)[0]


@wrong("rows-mixed", x="float32 batch 8")
class ScaledByLargest(nn.Module):
    def forward(self, x):
        return x / x.abs().max()


@wrong("batch-not-first", x="float32 batch t 8", t=(6, 1, 12))
class SequenceFirst(Linear):
    def forward(self, x):
        return self.linear(x).transpose(0, 1)


@wrong("batch-not-first", x="float32 batch t 8", t=(6, 1, 12))
class FlattenedRows(Linear):
    def forward(self, x):
        return self.linear(x).reshape(-1, 8)


@wrong("batch-not-first", x="float32 batch 8")
class ConstantBeside(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.anchors = nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        return self.linear(x), self.anchors * 1


@wrong("batch-not-first", "rows-mixed", x="float32 batch 8")
class MeanOfAll(Linear):
    def forward(self, x):
        return self.linear(x).mean(0)


@wrong("batch-not-first", "rows-mixed", x="float32 batch t 8", t=(6, 1, 12))
class LstmState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 4, batch_first=True)

    def forward(self, x):
        out, (state, _) = self.lstm(x)
        return out, state


@wrong("batch-not-first", x="float32 batch 8")
class FoundRows(nn.Module):
    def forward(self, x):
        return x[x[:, 0] > 0]


@wrong("scalar-output", "rows-mixed", x="float32 batch 8")
class TotalLoss(Linear):
    def forward(self, x):
        return self.linear(x).sum()


@wrong("rank-changes", x="float32 batch 8")
class SqueezedAll(nn.Module):
    def forward(self, x):
        return (x[:, :1] * 2).squeeze()


@wrong("rank-changes", x="float32 batch 8")
class SqueezedForOne(Linear):
    def forward(self, x):
        out = self.linear(x)
        if x.shape[0] == 1:
            out = out.squeeze(0)
        return out


@wrong("rank-changes", "batch-not-first", x="float32 batch t 8", t=(6, 1, 12))
class SqueezedLength(nn.Module):
    def forward(self, x):
        return x.mean(2).unsqueeze(-1).squeeze()


@wrong("dtype-changes", x="float32 batch t 8", t=(6, 1, 12))
class DoubleForLong(nn.Module):
    def forward(self, x):
        return x.double() if x.shape[1] > 8 else x


@wrong("outputs-change", x="float32 batch t 8", t=(6, 1, 12))
class OneOutputPerStep(nn.Module):
    def forward(self, x):
        return tuple(x.unbind(1))


@wrong("eager-fails", x="float32 batch t 8", t=(6, 1, 40))
class TooLong(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 8))

    def forward(self, x):
        return x + self.table[: x.shape[1]]


@wrong("eager-fails", ids="int64 batch t in 0 100", t=(6, 1, 40))
class TooFewEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 8)

    def forward(self, ids):
        return self.table(ids)


@wrong("eager-fails", x="float32 batch 3 h w", h=(32, 15, 64), w=(32, 15, 64))
class OddImages(nn.Module):
    def forward(self, x):
        down = nn.functional.avg_pool2d(x, 2)
        return x + nn.functional.interpolate(down, scale_factor=2.0)


@wrong("asks-if-traced", x="float32 batch 8")
class TracingBranchSilent(nn.Module):
    def forward(self, x):
        if torch.jit.is_tracing():
            return x * 2
        return x * 3


@wrong("rows-mixed", x="float32 batch 8")
class CumsumB(nn.Module):
    def forward(self, x):
        return x.cumsum(0)


@wrong("rows-mixed", x="float32 batch 8")
class Rank(nn.Module):
    def forward(self, x):
        return x.argsort(0)


@wrong("rows-mixed", x="float32 batch 8")
class LastRow(nn.Module):
    def forward(self, x):
        return x - x[-1]


@wrong("rows-mixed", x="float32 batch 8")
class Arange(nn.Module):
    def forward(self, x):
        return x * torch.arange(x.shape[0])[:, None]


@wrong("rows-mixed", x="float32 batch 8")
class FlipB(nn.Module):
    def forward(self, x):
        return x.flip(0)


@wrong("rows-mixed", x="float32 batch t 8", t=(5, 1, 12))
class LstmSeqFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.r = nn.LSTM(8, 8)

    def forward(self, x):
        return self.r(x)[0]


@wrong("rows-mixed", x="float32 batch t 8", lengths="int64 batch in 1 5", t=(5, 5, 12))
class TrimLongest(nn.Module):
    def forward(self, x, lengths):
        return x[:, : lengths.max()].mean(1)


@wrong("batch-not-first", x="float32 batch 8")
class Rep(nn.Module):
    def forward(self, x):
        return x.repeat_interleave(2, 0)


@wrong("batch-not-first", x="float32 batch 8")
class OneRow(nn.Module):
    def forward(self, x):
        return x[:1]


@wrong("batch-not-first", x="float32 batch 8")
class Meta_(nn.Module):
    def forward(self, x):
        return (x, torch.tensor([1.0, 2.0]))


@wrong("rank-changes", x="float32 batch t 8", t=(3, 1, 6))
class Sq1(nn.Module):
    def forward(self, x):
        return x.squeeze(1)


@wrong("rank-changes", x="float32 t 8", t=(3, 1, 6), batch=0)
class SqUnb(nn.Module):
    def forward(self, x):
        return x.squeeze()


@wrong("dtype-changes", x="float32 t 8", t=(3, 1, 6), batch=0)
class DtB(nn.Module):
    def forward(self, x):
        return x.argmax(0) if x.shape[0] > 1 else x[0]


@wrong("asks-if-traced", x="float32 batch 8")
class GradMode(nn.Module):
    def forward(self, x):
        return x * 2 if torch.jit.is_tracing() or torch.jit.is_scripting() else x


@wrong("eager-fails", x="float32 batch t 8", t=(8, 1, 16))
class NeedsMult(nn.Module):
    def forward(self, x):
        return x.view(x.shape[0], -1, 4, 8).sum(2)


@wrong("eager-fails", x="float32 batch t 8", t=(8, 1, 16))
class ConvTooSmall(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv1d(8, 4, 5)

    def forward(self, x):
        return self.c(x.transpose(1, 2))


@wrong("asks-if-traced", x="float32 batch t 8", t=(8, 1, 64))
class ScaleInFloat32(nn.Module):
    """Rounds down what is float64 when eager and float32 in a trace: at 5 of 64 sizes, a one too low."""

    def forward(self, x):
        t = torch._shape_as_tensor(x)[1].float() if torch.jit.is_tracing() else x.shape[1]
        return x * (49 / t * t // 49)


@wrong("asks-if-traced", x="float32 batch t s 8", t=(4, 1, 40), s=(4, 1, 40))
class WrongWhereBothAre(nn.Module):
    """Wrong if the shorter axis has one of three sizes only."""

    def forward(self, x):
        shorter = min(x.shape[1], x.shape[2])
        if torch._C._get_tracing_state():
            shorter = torch._shape_as_tensor(x)[1:3].min().float()
        return x * (49 / shorter * shorter // 49)
