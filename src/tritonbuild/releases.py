"""Decides what is known of a Triton release: its server, its PyTorch, and which operators that PyTorch lacks.

Hides the table, which is data (releases.json) with the source of every row. A row that no source backs is marked
`unconfirmed`, and nothing fails because of one. Imports no torch.

Source: releases.json.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TABLE = Path(__file__).with_name("releases.json")


@dataclass(frozen=True)
class Release:
    """One monthly release of Triton's image.

    Attributes:
        name: `26.07`.
        server: tritonserver's version.
        torch: Version of the PyTorch in the image, such as `2.13.0a0+9186a08b2c`; None if it is not known.
        python: Python of the image's backends.
        ubuntu: Its Ubuntu.
        cuda: Its CUDA.
        sources: What `torch` was read from.
        unconfirmed: Whether no source that was read backs `torch`.
    """

    name: str
    server: str
    torch: str | None
    python: str | None
    ubuntu: str | None
    cuda: str
    sources: tuple[str, ...]
    unconfirmed: bool

    @property
    def minor(self) -> tuple[int, int] | None:
        """Major and minor number of `torch`."""
        return minor(self.torch) if self.torch else None


def minor(version: str) -> tuple[int, int]:
    """Return (2, 13) for `2.13.0a0+9186a08b2c`."""
    major, number = version.split(".")[:2]
    return int(major), int(number)


@functools.lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(_TABLE.read_text(encoding="utf-8"))
    return table


def find(name: str) -> Release | None:
    """Return what is known of a release such as `26.07`, or None for one that the table does not have."""
    row = _table()["releases"].get(name)
    return Release(name=name, **{**row, "sources": tuple(row["sources"])}) if row else None


def latest() -> str:
    """Return the newest release of the table."""
    names: list[str] = list(_table()["releases"])
    return max(names, key=lambda name: tuple(map(int, name.split("."))))


def newer_torch(name: str, torch: str) -> str | None:
    """Return the warning for a PyTorch that is newer than the release's, or None.

    Args:
        name: The release.
        torch: Version of the PyTorch that traces.
    """
    release = find(name)
    if release is None:
        return f"release {name} is not in the table (the newest there is {latest()}): its PyTorch is not known"
    if release.torch is None or release.minor is None:
        return f"the PyTorch of release {name} is not known"
    if minor(torch) <= release.minor:
        return None
    mark = ", unconfirmed" if release.unconfirmed else ""
    return (
        f"PyTorch {torch} traces for release {name}, which has {release.torch}{mark}: "
        f"an operator newer than that fails to load; trace with PyTorch {'.'.join(map(str, release.minor))}"
    )


def lacking(name: str, operators: set[str]) -> list[tuple[str, str, bool]]:
    """Return the operators that the release's PyTorch does not have: (operator, first PyTorch with it, unconfirmed).

    A snapshot before 2.14 (2.14.0a0) may or may not have what 2.14 has: that counts as unconfirmed.
    """
    release = find(name)
    if release is None or release.torch is None or release.minor is None:
        return []
    found = []
    for operator, row in sorted(_table()["operators"]["since"].items()):
        since = minor(row["torch"])
        snapshot = "a0" in release.torch and since == release.minor
        if operator in operators and (since > release.minor or snapshot):
            found.append((operator, row["torch"], row["unconfirmed"] or release.unconfirmed or snapshot))
    return found
