"""Wrong: what copies of a module share, the environment, the calendar."""

from __future__ import annotations

import datetime
import functools
import os
import sys
import time
from typing import ClassVar

import torch
from corpus import wrong
from torch import nn

HERE = sys.modules[__name__]


@wrong("state", x="float32 batch t 4", t=(8, 1, 40), by=lambda run: run.differs_when(ClassFirst, "length", 3))
class ClassFirst(nn.Module):
    length = None

    def forward(self, x):
        cls = type(self)
        if cls.length is None:
            cls.length = int(x.shape[1])
        return x.sum(1) / cls.length


@wrong("state", x="float32 batch t 4", t=(8, 1, 40), by=lambda run: run.differs_when(HERE, "_FIRST", [3]))
class GlobalFirst(nn.Module):
    def forward(self, x):
        if not _FIRST:
            _FIRST.append(int(x.shape[1]))
        return x.sum(1) / _FIRST[0]


_FIRST: list[int] = []


@wrong("state", x="float32 batch t 4", t=(8, 1, 40), by=lambda run: run.differs_when(PerDevice, "tables", {}))
class PerDevice(nn.Module):
    tables: ClassVar[dict[str, torch.Tensor]] = {}

    def forward(self, x):
        key = str(x.dtype)
        if key not in self.tables:
            self.tables[key] = x[0].abs().sum()
        return x / self.tables[key]


@wrong("state", x="float32 batch t 4", t=(8, 1, 40), by=lambda run: run.differs_when(HERE, "_table", _other))
class CachedByTheWrongKey(nn.Module):
    def forward(self, x):
        table = _table(x.dtype)
        if "w" not in table:
            table["w"] = int(x.shape[1])
        return x.sum(1) / table["w"]


def _other(dtype: torch.dtype) -> dict[str, int]:
    return {"w": 3}


@functools.lru_cache(None)
def _table(dtype: torch.dtype) -> dict[str, int]:
    return {}


@wrong("state", x="float32 batch 8", by=lambda run: run.differs_when(HERE, "_CALLS", 4000))
class GlobalCounter(nn.Module):
    def forward(self, x):
        global _CALLS
        _CALLS += 1
        return x + (1 if _CALLS > 3000 else 0)


_CALLS = 0


@wrong("nondeterministic", x="float32 batch 8", by=lambda run: run.differs_when(os.environ, "get", lambda *_: "3"))
class EnvironmentScale(nn.Module):
    def forward(self, x):
        return x * float(os.environ.get("SCALE_OF_THIS_TEST", "1"))


@wrong("nondeterministic", x="float32 batch 8", by=lambda run: run.differs_when(os, "getenv", lambda _: "sum"))
class EnvironmentBranch(nn.Module):
    def forward(self, x):
        return x.sum(1) if os.getenv("POOL_OF_THIS_TEST") == "sum" else x.mean(1)


def _noon(seconds: float | None = None) -> time.struct_time:
    return time.struct_time((2026, 1, 1, (time.gmtime().tm_hour + 12) % 24, 0, 0, 3, 1, 0))


@wrong("nondeterministic", x="float32 batch 8", by=lambda run: run.differs_when(time, "localtime", _noon))
class LocalHour(nn.Module):
    def forward(self, x):
        return x * 2 if time.localtime().tm_hour < 12 else x


class _Tomorrow(datetime.date):
    @classmethod
    def today(cls) -> datetime.date:
        return datetime.date.fromtimestamp(time.time() + 86400)  # noqa: DTZ012


@wrong("nondeterministic", x="float32 batch 8", by=lambda run: run.differs_when(datetime, "date", _Tomorrow))
class DayOfWeek(nn.Module):
    def forward(self, x):
        return x * datetime.date.today().isoweekday()  # noqa: DTZ011


@wrong(
    "state",
    x="float32 batch 3 h w",
    h=(8, 6, 20),
    w=(8, 6, 20),
    by=lambda run: run.differs_after_other([[torch.zeros(1, 3, 6, 8)], [torch.zeros(1, 3, 8, 6)]]),
)
class CellsKnownByTheirNumber(nn.Module):
    cells = None

    def forward(self, x):
        h, w = x.shape[2:]
        if self.cells is None or self.cells.shape[0] != h * w:
            y, x_ = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            self.cells = torch.stack([y, x_], -1).view(-1, 2).float()
        return x.flatten(2).transpose(1, 2) @ torch.ones(3, 2) + self.cells


def _at(hour):
    return lambda *_: time.struct_time((2026, 1, 1, hour, 0, 0, 3, 1, 0))


@wrong(
    "nondeterministic",
    x="float32 batch 8",
    by=lambda run: any(run.differs_when(time, "localtime", _at(hour)) for hour in (2, 12)),
)
class AtNight(nn.Module):
    def forward(self, x):
        return x * (0.5 if time.localtime().tm_hour == 2 else 1.0)
