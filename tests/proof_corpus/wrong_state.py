"""Wrong: chance, training mode, memory of earlier calls, changed inputs."""

from __future__ import annotations

import collections
import itertools
import os
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from corpus import wrong
from torch import nn


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)


@wrong("training-mode", x="float32 batch 8")
class DropoutAlways(Linear):
    def forward(self, x):
        return F.dropout(self.linear(x), 0.3, training=True)


@wrong("training-mode", "nondeterministic", x="float32 batch 8")
class DropoutModuleTrained(Linear):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        self.drop.train()
        return self.drop(self.linear(x))


@wrong("training-mode", x="float32 batch 8 6 6")
class BatchNormTrained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        self.norm.train()
        return self.norm(x)


@wrong("training-mode", "rows-mixed", x="float32 batch 8 6 6")
class BatchNormFunctional(nn.Module):
    def forward(self, x):
        return F.batch_norm(x, None, None, training=True)


@wrong("nondeterministic", x="float32 batch 8")
class Noise(Linear):
    def forward(self, x):
        return self.linear(x) + 0.1 * torch.randn_like(x)


@wrong("nondeterministic", batch=0, x="float32 8")
class Sampled(nn.Module):
    def forward(self, x):
        return torch.multinomial(x.softmax(0), 3)


@wrong("nondeterministic", x="float32 batch 8")
class SeededInside(Linear):
    def forward(self, x):
        torch.manual_seed(7)
        return self.linear(x) + torch.randn(8)


@wrong("nondeterministic", x="float32 batch 8")
class PythonRandom(nn.Module):
    def forward(self, x):
        return x * random.random()


@wrong("nondeterministic", x="float32 batch 8")
class NumpyRandom(nn.Module):
    def forward(self, x):
        return x + torch.from_numpy(np.random.rand(8).astype(np.float32))


@wrong(
    "nondeterministic", x="float32 batch 8", by=lambda run: run.differs_when(torch, "rand", lambda *_: torch.zeros(()))
)
class RarelyRandom(nn.Module):
    def forward(self, x):
        if torch.rand(()).item() < 1e-4:
            return x * 0
        return x


@wrong("nondeterministic", "state", x="float32 batch 8")
class OwnGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x):
        return x + torch.rand(8, generator=self.generator)


@wrong("nondeterministic", x="float32 batch 8")
class Permuted(nn.Module):
    def forward(self, x):
        return x[:, torch.randperm(8)]


@wrong(
    "nondeterministic",
    x="float32 batch 8",
    by=lambda run: (
        run.differs_when(time, "time", lambda: time.monotonic() + 3600 * 7)
        or run.differs_when(time, "time", lambda: time.monotonic() + 3600 * 8)
    ),
)
class HourOfDay(nn.Module):
    def forward(self, x):
        return x * 2 if int(time.time()) // 3600 % 2 else x * 3


@wrong("nondeterministic", x="float32 batch 8")
class Unfilled(nn.Module):
    def forward(self, x):
        out = torch.empty(x.shape[0], 9)
        out[:, :8] = x
        return out


@wrong("nondeterministic", batch=0, x="float32 8")
class Gumbel(nn.Module):
    def forward(self, x):
        return F.gumbel_softmax(x, hard=True)


@wrong("state", x="float32 batch 8")
class Counter(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.calls


@wrong("state", x="float32 batch 8", by=lambda run: run.differs_after(1001))
class LateCounter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * 2 if self.calls > 1000 else x


@wrong("state", x="float32 batch 8")
class BufferSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x):
        self.seen += 1
        return x + self.seen


@wrong("state", x="float32 batch 8")
class MovingMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return x - self.mean


@wrong("state", x="float32 batch 8")
class FirstCallScale(nn.Module):
    scale = None

    def forward(self, x):
        if self.scale is None:
            self.scale = x.abs().max()
        return x / self.scale


@wrong("state", x="float32 batch t 8", t=(5, 1, 20))
class FirstCallMask(nn.Module):
    mask = None

    def forward(self, x):
        if self.mask is None:
            self.mask = torch.tril(torch.ones(x.shape[1], x.shape[1]))
        return self.mask @ x


@wrong("state", x="float32 batch 8")
class CarriedState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, 8)
        self.state = None

    def forward(self, x):
        state = self.state if self.state is not None and len(self.state) == len(x) else torch.zeros(x.shape[0], 8)
        self.state = self.cell(x, state)
        return self.state


_SEEN: list[int] = []


@wrong("state", x="float32 batch 8")
class GlobalList(nn.Module):
    def forward(self, x):
        _SEEN.append(1)
        return x * len(_SEEN)


@wrong("state", x="float32 batch 8")
class DefaultArgument(nn.Module):
    def forward(self, x, seen=[]):  # noqa: B006
        seen.append(0)
        return x * len(seen)


@wrong("input-mutation", x="float32 batch 8")
class AddInPlace(Linear):
    def forward(self, x):
        x += 1
        return self.linear(x)


@wrong("input-mutation", x="float32 batch 8")
class ReluInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(x)


@wrong("input-mutation", x="float32 batch 8", mask="bool batch 8")
class MaskedFill(nn.Module):
    def forward(self, x, mask):
        x[mask] = 0
        return x.cumsum(1)


@wrong("input-mutation", batch=0, x="float32 8")
class NumpyWrites(nn.Module):
    def forward(self, x):
        y = x * 2
        x.numpy()[0] = 5
        return y


@wrong("state", x="float32 batch 8")
class EmaAttr(nn.Module):
    m = 0.0

    def forward(self, x):
        self.m = 0.9 * self.m + 0.1 * float(x.mean())
        return x - self.m


@wrong("state", x="float32 batch 8")
class PrevInput(nn.Module):
    prev = None

    def forward(self, x):
        y = x if self.prev is None or self.prev.shape != x.shape else x - self.prev
        self.prev = x.detach().clone()
        return y


@wrong("state", x="float32 batch 8")
class Alternates(nn.Module):
    k = 0

    def forward(self, x):
        self.k ^= 1
        return x if self.k else -x


@wrong("state", x="float32 batch 8")
class WarmupSteps(Linear):
    def __init__(self):
        super().__init__()
        self.register_buffer("step", torch.tensor(0))

    def forward(self, x):
        self.step += 1
        return self.linear(x) * min(1.0, self.step.item() / 100)


@wrong("state", x="float32 batch 8")
class ParamDecay(Linear):
    def forward(self, x):
        with torch.no_grad():
            self.linear.weight.mul_(0.99)
        return self.linear(x)


@wrong("state", x="float32 batch 8")
class ListState(nn.Module):
    def __init__(self):
        super().__init__()
        self.h = collections.deque(maxlen=3)

    def forward(self, x):
        self.h.append(float(x.sum()))
        return x + sum(self.h)


class Obj:
    def __init__(self):
        self.v = 0


@wrong("state", x="float32 batch 8")
class ObjState(nn.Module):
    def __init__(self):
        super().__init__()
        self.o = Obj()

    def forward(self, x):
        self.o.v += 1
        return x + self.o.v


CNT = itertools.count()


@wrong("nondeterministic", "state", x="float32 batch 8")
class IterCount(nn.Module):
    def forward(self, x):
        return x + next(CNT)


@wrong("state", x="float32 batch 8")
class LateEvery(nn.Module):
    n = 0

    def forward(self, x):
        self.n += 1
        return x * (2 if self.n % 5 == 0 else 1)


@wrong("nondeterministic", x="float32 batch 8", by=lambda run: run.differs_among_seeds(300))
class Bern(nn.Module):
    def forward(self, x):
        return x * torch.bernoulli(torch.full_like(x, 0.999))


@wrong("training-mode", "nondeterministic", x="float32 batch 8")
class RRelu(nn.Module):
    def forward(self, x):
        return F.rrelu(x, training=True)


@wrong("training-mode", x="float32 batch 8", by=lambda run: run.differs_among_seeds(5000))
class RareDrop(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.0001, training=True)


@wrong("nondeterministic", x="float32 batch 8", by=lambda run: run.differs_among_seeds(20))
class PyChoice(nn.Module):
    def forward(self, x):
        return random.choice([x, x * 2])


@wrong("nondeterministic", x="float32 batch 8")
class NpGen(nn.Module):
    def __init__(self):
        super().__init__()
        self.g = np.random.default_rng(0)

    def forward(self, x):
        return x + float(self.g.random())


@wrong("nondeterministic", x="float32 batch 8")
class FreshGen(nn.Module):
    def forward(self, x):
        return x + float(np.random.default_rng().random())


@wrong("nondeterministic", x="float32 batch 8")
class Urandom(nn.Module):
    def forward(self, x):
        return x + os.urandom(1)[0]


@wrong("nondeterministic", x="float32 batch 8")
class GenFixed(nn.Module):
    def forward(self, x):
        g = torch.Generator().manual_seed(5)
        return x + torch.rand(8, generator=g)


@wrong("nondeterministic", x="float32 batch 8")
class ForkRng(nn.Module):
    def forward(self, x):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            n = torch.randn(8)
        return x + n


@wrong("training-mode", x="float32 batch 8")
class TrainSelf(nn.Module):
    def __init__(self):
        super().__init__()
        self.b = nn.BatchNorm1d(8)
        self.d = nn.Dropout()

    def forward(self, x):
        self.train()
        return self.d(self.b(x))


@wrong("input-mutation", x="float32 batch 8")
class Setitem(nn.Module):
    def forward(self, x):
        x[:, 0] = 0
        return x * 2


@wrong("input-mutation", x="float32 batch 8")
class OutArg(nn.Module):
    def forward(self, x):
        return torch.exp(x, out=x)


@wrong("input-mutation", x="float32 batch 8")
class ViewMut(nn.Module):
    def forward(self, x):
        v = x.view(-1)
        v.mul_(2)
        return x


@wrong("input-mutation", x="float32 batch 8")
class RareMut(nn.Module):
    def forward(self, x):
        return x.clamp_(-50, 50)


@wrong("nondeterministic", x="float32 batch 8", by=lambda run: run.differs_among_seeds(5000))
class RarelyChosen(nn.Module):
    def forward(self, x):
        return x * float(np.random.choice([1.0, 2.0], p=[0.999, 0.001]))


@wrong("nondeterministic", x="float32 batch 8", by=lambda run: run.differs_among_seeds(5000))
class RarelyUniform(nn.Module):
    def forward(self, x):
        return x * (2 if random.uniform(0, 10) < 0.01 else 1)


def _overwritten(run):
    """Return whether other values in the memory of the first inputs get another answer than elsewhere."""
    module, (x,) = run.build(), run.inputs
    module(x)
    x.mul_(2)
    return not torch.equal(module(x)[0], run.build()(x)[0])


@wrong("state", x="float32 batch 8", by=_overwritten)
class AnswersByAddress(nn.Module):
    def __init__(self):
        super().__init__()
        self.answers = {}

    def forward(self, x):
        key = (x.data_ptr(), x.shape)
        if key not in self.answers:
            self.answers[key] = x.softmax(1)
        return self.answers[key] * 1


@wrong("state", x="float32 batch 8 in 0 1", by=lambda run: run.differs_after(120))
class ScaledByItsHistory(nn.Module):
    def __init__(self):
        super().__init__()
        self.scores = collections.deque(maxlen=200)

    def forward(self, x):
        self.scores.append(float(x.sum()))
        if len(self.scores) > 100:
            x = x / (1 + sum(self.scores))
        return x


@wrong("state", x="float32 batch 8", by=lambda run: run.differs_after(65))
class EverySoOften(nn.Module):
    def __init__(self):
        super().__init__()
        self.turns = iter(range(10**9))

    def forward(self, x):
        return x + (next(self.turns) % 64 == 63)
