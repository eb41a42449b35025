"""Values of cases: inside the declared range, the same every time, and of every kind that they are named after."""

from __future__ import annotations

import json
import math
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tritonbuild import draws
from tritonbuild.draws import CORNERS, PLAIN, UNBOUNDED, Source
from tritonbuild.errors import TraceError
from tritonbuild.spec import Input, ModelVersion, Trace

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path()


def version(batch: int = 8, **inputs: Input) -> ModelVersion:
    return ModelVersion.model_construct(
        model="m",
        version=1,
        entry_point="m:M",
        kwargs={},
        seed=0,
        weights=None,
        device="cpu",
        triton="26.08",
        max_batch_size=batch,
        axes={},
        inputs=inputs,
        outputs=(),
        trace=Trace(),
    )


def drawn(draw: str, seed: int = 0, sizes: dict[str, int] | None = None, **inputs: Input) -> tuple[Tensor, ...]:
    return Source(version(**inputs), ROOT).draw(sizes or {"batch": 4}, draw, seed, "cpu")


FLOAT = Input(dtype="float32", shape=("batch", 6))
PIXELS = Input(dtype="float32", shape=("batch", 6), range=(-1.0, 2.5))
IDS = Input(dtype="int64", shape=("batch", 6), range=(3, 90))
MASK = Input(dtype="bool", shape=("batch", 6))

ARGUED = ("fill=0.5", "fill=7", "spike=40", "scale=1000", "scale=-1e+06", "mix=7", "mix=0.5,3", "descending")
ALL_DRAWS = (PLAIN, *CORNERS, *UNBOUNDED, *ARGUED)


@pytest.mark.parametrize("draw", ALL_DRAWS)
@settings(max_examples=25, deadline=None, database=None)
@given(
    dtype=st.sampled_from(["float16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64"]),
    ends=st.tuples(st.integers(0, 100), st.integers(0, 100)),
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    batch=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_no_draw_leaves_the_declared_range(
    draw: str, dtype: str, ends: tuple[int, int], shape: list[int], batch: int, seed: int
) -> None:
    declared = Input(dtype=dtype, shape=("batch", *shape), range=(min(ends), max(ends)))
    (x,) = drawn(draw, seed, {"batch": batch}, x=declared)
    assert x.dtype == getattr(torch, dtype)
    assert list(x.shape) == [batch, *shape]
    assert x.is_contiguous()
    assert x.double().min() >= min(ends)
    assert x.double().max() <= max(ends)


@pytest.mark.parametrize("draw", ALL_DRAWS)
def test_a_draw_is_the_same_every_time_and_no_global_generator_moves(draw: str) -> None:
    before = torch.get_rng_state()
    first = drawn(draw, 5, x=FLOAT, ids=IDS, mask=MASK)
    second = drawn(draw, 5, x=FLOAT, ids=IDS, mask=MASK)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_another_seed_is_another_draw() -> None:
    for declared in (FLOAT, PIXELS, IDS, MASK):
        assert not torch.equal(drawn(PLAIN, 1, x=declared)[0], drawn(PLAIN, 2, x=declared)[0])


def test_a_mix_holds_its_numbers_where_they_are_legal() -> None:
    (ids,) = drawn("mix=7,11,0.5,1000000", 3, {"batch": 400}, ids=IDS)
    counts = {number: int((ids == number).sum()) / ids.numel() for number in (7, 11)}
    assert counts == {7: pytest.approx(3 / 8, abs=0.05), 11: pytest.approx(3 / 8, abs=0.05)}
    assert len(ids.unique()) > 9  # the rest is plain


def test_inputs_of_one_shape_differ_unless_that_is_the_draw() -> None:
    x, y = drawn(PLAIN, x=FLOAT, y=FLOAT)
    assert not torch.equal(x, y)
    x, y = drawn("same-inputs", x=FLOAT, y=FLOAT)
    assert torch.equal(x, y)


def test_both_ends_of_every_range_are_drawn() -> None:
    for declared in (PIXELS, IDS):
        assert declared.range
        low, high = declared.range
        assert drawn("low", x=declared)[0].unique().tolist() == [low]
        assert drawn("high", x=declared)[0].unique().tolist() == [high]
        assert drawn("alternating", x=declared)[0].flatten()[:4].tolist() == [high, low, high, low]
    everything = Input(dtype="int64", shape=("batch",), range=(-(2**63), 2**63 - 1))
    assert drawn("low", x=everything)[0].unique().tolist() == [-(2**63)]
    assert drawn("high", x=everything)[0].unique().tolist() == [2**63 - 1]
    assert drawn(PLAIN, x=everything)[0].unique().numel() == 4


def test_patterns_of_a_mask() -> None:
    assert drawn("zeros", mask=MASK)[0].any().item() is False
    assert drawn("ones", mask=MASK)[0].all().item() is True
    assert drawn("alternating", mask=MASK)[0][0].tolist() == [True, False] * 3
    assert drawn("prefix", mask=MASK)[0].int().sum(1).tolist() == [5, 4, 3, 2]
    assert drawn("same-rows", mask=MASK)[0].unique(dim=0).shape[0] == 1


def test_special_values_of_a_float_without_a_range() -> None:
    plain = drawn(PLAIN, 3, x=FLOAT)[0]
    assert torch.equal(drawn("negated", 3, x=FLOAT)[0], -plain)
    assert torch.equal(drawn("large", 3, x=FLOAT)[0], plain * 100)
    assert torch.equal(drawn("scale=-1000", 3, x=FLOAT)[0], plain * -1000)
    assert drawn("abs", 3, x=FLOAT)[0].min() >= 0
    assert drawn("negative-abs", 3, x=FLOAT)[0].max() <= 0
    assert drawn("spike=40", 3, x=FLOAT)[0].flatten().tolist() == [40] + [0] * 23
    nan = drawn("nan", 3, x=FLOAT)[0]
    assert nan.isnan().sum() == 2
    inf = drawn("inf", 3, x=FLOAT)[0]
    assert (inf.flatten()[0].item(), inf.flatten()[-1].item()) == (math.inf, -math.inf)
    smooth = drawn("smooth", 3, {"batch": 2}, x=Input(dtype="float32", shape=("batch", 32, 32)))[0]
    assert smooth.diff(dim=1).abs().mean() < 0.5 * smooth.std()


def test_an_input_alone_can_be_special() -> None:
    plain = drawn(PLAIN, 4, x=FLOAT, ids=IDS)
    x, ids = drawn("low@ids", 4, x=FLOAT, ids=IDS)
    assert torch.equal(x, plain[0])
    assert ids.unique().tolist() == [3]


# ----------------------------------------------------------------------------------------------- declared example data


def png(rows: list[list[tuple[int, int, int]]]) -> bytes:
    """Return an image file, made by hand."""
    raw = b"".join(b"\0" + bytes(value for pixel in row for value in pixel) for row in rows)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def test_values_from_numpy_are_drawn_from_and_bound_the_special_draws(tmp_path: Path) -> None:
    data = np.arange(50, dtype=np.float32).reshape(10, 5) / 10
    np.save(tmp_path / "x.npy", data)
    declared = version(x=Input(dtype="float32", shape=("batch", 5), values="x.npy"))
    source = Source(declared, tmp_path)
    (x,) = source.draw({"batch": 3}, PLAIN, 0, "cpu")
    rows = {tuple(row) for row in data.tolist()}
    assert {tuple(row) for row in x.tolist()} <= rows
    assert source.draw({"batch": 3}, "high", 0, "cpu")[0].unique().tolist() == pytest.approx([4.9])
    assert not torch.equal(source.draw({"batch": 3}, PLAIN, 1, "cpu")[0], x)
    assert source.draw({"batch": 30}, PLAIN, 0, "cpu")[0].shape == (30, 5)


def test_values_from_safetensors_by_the_name_of_the_input(tmp_path: Path) -> None:
    save_file({"other": torch.zeros(5), "ids": torch.tensor([7, 8, 9, 7, 8])}, tmp_path / "d.safetensors")
    declared = version(ids=Input(dtype="int64", shape=("batch", 5), values="d.safetensors"))
    (ids,) = Source(declared, tmp_path).draw({"batch": 2}, PLAIN, 0, "cpu")
    assert ids.tolist() == [[7, 8, 9, 7, 8]] * 2


def test_an_image_fills_the_range_and_is_cut_to_the_size(tmp_path: Path) -> None:
    (tmp_path / "i.png").write_bytes(png([[(0, 255, 51), (255, 0, 51)], [(0, 255, 51), (255, 0, 51)]]))
    shape: tuple[Any, ...] = ("batch", 3, "h", "w")
    declared = version(
        a=Input(dtype="float32", shape=shape, range=(-1, 1), values="i.png"),
        b=Input(dtype="uint8", shape=shape, values="i.png"),
    )
    a, b = Source(declared, tmp_path).draw({"batch": 1, "h": 2, "w": 4}, PLAIN, 0, "cpu")
    assert b[0, :, 0].tolist() == [[0, 255, 0, 255], [255, 0, 255, 0], [51, 51, 51, 51]]
    assert torch.allclose(a, b.float() / 255 * 2 - 1)


def test_an_image_is_read_with_its_channels_last_where_they_are_declared_last(tmp_path: Path) -> None:
    (tmp_path / "i.png").write_bytes(png([[(0, 255, 51), (255, 0, 51)], [(0, 255, 51), (255, 0, 51)]]))
    declared = version(b=Input(dtype="uint8", shape=("batch", "h", 2, 3), values="i.png"))
    (b,) = Source(declared, tmp_path).draw({"batch": 1, "h": 1}, PLAIN, 0, "cpu")
    assert b[0].tolist() == [[[0, 255, 51], [255, 0, 51]]]


@pytest.mark.parametrize(
    ("write", "what"),
    [
        (None, "input x: values x.npy: no such file"),
        (lambda path: path.write_bytes(b"junk"), "input x: values x.npy cannot be read: "),
        (
            lambda path: np.save(path, np.zeros((2, 4))),
            "input x: values x.npy have shape [2, 4], expected ['batch', 5] or [5]",
        ),
    ],
)
def test_values_that_cannot_be_used(write: Any, what: str, tmp_path: Path) -> None:
    if write:
        write(tmp_path / "x.npy")
    with pytest.raises(TraceError) as refused:
        Source(version(x=Input(dtype="float32", shape=("batch", 5), values="x.npy")), tmp_path)
    assert str(refused.value).startswith(f"trace m/1: {what}")


def test_every_corner_is_a_draw_of_its_own() -> None:
    assert len(set(CORNERS)) == len(CORNERS)
    wide = Input(dtype="float32", shape=("batch", 32, 32))
    texts = {json.dumps(drawn(draw, 1, {"batch": 3}, x=wide, y=wide)[0].tolist()) for draw in CORNERS}
    # For one dtype without a range, `same-inputs` changes the other input.
    assert len(texts) >= len(CORNERS) - 1
    assert draws.PLAIN not in CORNERS
