"""Decides the values of a case's input tensors: which draws exist, and what each makes of a dtype and a range.

A draw is text, so that it can stand in a message and be drawn again: `normal`, `zeros`, `fill=0.5`, `zeros@mask` (the
input `mask` alone). Everything follows from the declaration, the sizes, the draw and the seed; nothing from the
device or from earlier draws. Values outside a declared range are never drawn: a model may do what it likes with them.

Source: docs/hazards.md, "What is run".
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritonbuild.errors import TraceError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tritonbuild.spec import Input, ModelVersion

PLAIN = "plain"
"""The draw without anything special: example values, uniform in the range, or normal(0, 1)."""

CORNERS = (
    "zeros",
    "large",
    "negated",
    "ones",
    "same-rows",
    "high",
    "low",
    "smooth",
    "abs",
    "prefix",
    "sorted",
    "tiny",
    "alternating",
    "same-inputs",
    "negative-abs",
    "one-hot",
    "last-row-large",
)
"""Draws of special values that are inside every declared range, the most telling first."""

UNBOUNDED = ("nan", "inf")
"""Draws for floating inputs that declare neither a range nor values."""


class Source:
    """The example data of one model version: its declared values, read once, and the bounds of every input."""

    def __init__(self, version: ModelVersion, root: Path) -> None:
        self.inputs = version.inputs
        self.values = {
            name: _read(version, name, declared, root) for name, declared in version.inputs.items() if declared.values
        }
        self.bounds = {name: self._bounds(name, declared) for name, declared in version.inputs.items()}

    def _bounds(self, name: str, declared: Input) -> tuple[float, float] | None:
        if declared.range:
            return declared.range
        if name in self.values:
            finite = self.values[name][torch.isfinite(self.values[name])]
            return (finite.min().item(), finite.max().item()) if len(finite) else (0, 0)
        return None if getattr(torch, declared.dtype).is_floating_point else (0, 1)

    def draw(self, sizes: Mapping[str, int], draw: str, seed: int, device: str) -> tuple[Tensor, ...]:
        """Return one tensor per input, in declared order, on the device.

        Args:
            sizes: Size of every axis, batch included.
            draw: `plain`, a name of `CORNERS` or `UNBOUNDED`, `fill=x`, `spike=x`, `scale=x`, `mix=x,y` or
                `descending`; with `@name`, for that input alone.
            seed: Equal seeds give equal tensors.
            device: A torch device.
        """
        draw, _, only = draw.partition("@")
        tensors = []
        for i, (name, declared) in enumerate(self.inputs.items()):
            shape = [sizes[size] if isinstance(size, str) else size for size in declared.shape]
            # A same seed for every input makes inputs of one shape equal: `torch.equal(x, y)` is then true.
            generator = torch.Generator().manual_seed(seed * 1009 + (0 if draw == "same-inputs" else i))
            plain = self._plain(name, declared, shape, generator)
            if draw != PLAIN and (not only or only == name):
                plain = _special(plain, draw, self.bounds[name], generator)
            tensors.append(plain.contiguous().to(device))
        return tuple(tensors)

    def _plain(self, name: str, declared: Input, shape: list[int], generator: torch.Generator) -> Tensor:
        dtype: torch.dtype = getattr(torch, declared.dtype)
        if name in self.values:
            return _fitted(self.values[name], shape, generator).to(dtype)
        bounds = self.bounds[name]
        if bounds is None:
            return torch.randn(shape, generator=generator, dtype=_wide(dtype)).to(dtype)
        low, high = bounds
        if dtype.is_floating_point:
            unit = torch.rand(shape, generator=generator, dtype=_wide(dtype))
            return _inside(low + unit * (high - low), bounds, dtype)
        # randint's upper end is exclusive; the very last int64 cannot be drawn here, `high` has it.
        return torch.randint(int(low), min(int(high) + 1, 2**63 - 1), shape, generator=generator, dtype=torch.int64).to(
            dtype
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _inside(values: Tensor, bounds: tuple[float, float] | None, dtype: torch.dtype) -> Tensor:
    # The ends are legal as the dtype rounds them: a client that sends 0.1 as float32 sends a little more than 0.1.
    return (values if bounds is None else values.clamp(*bounds)).to(dtype)


def _special(plain: Tensor, draw: str, bounds: tuple[float, float] | None, generator: torch.Generator) -> Tensor:
    name, _, argument = draw.partition("=")
    dtype = plain.dtype
    if name == "mix":
        return _mixed(plain, [float(number) for number in argument.split(",")], bounds, generator)
    if dtype == torch.bool:
        return _special(plain.to(torch.int64), draw, (0, 1), generator).to(torch.bool)
    if not dtype.is_floating_point:
        number = int(float(argument)) if argument and float(argument).is_integer() else None
        return _special_integers(plain, name, number, bounds or (0, 1), generator).to(dtype)
    values = plain.to(_wide(dtype))
    return _inside(_special_floats(values, name, float(argument or 0), bounds), bounds, dtype)


def _special_floats(x: Tensor, name: str, argument: float, bounds: tuple[float, float] | None) -> Tensor:
    low, high = bounds or (-3.0, 3.0)
    middle = (low + high) / 2
    rest = middle if bounds and not low <= 0 <= high else 0.0
    match name:
        case "zeros" | "ones" | "low" | "high" | "fill":
            to = {"zeros": 0.0, "ones": 1.0, "low": low, "high": high, "fill": argument}[name]
            return torch.full_like(x, to)
        case "negated":
            return low + high - x if bounds else -x
        case "abs":
            return x.abs()
        case "negative-abs":
            return -x.abs()
        case "large":
            return torch.where(x > middle, high, low).to(x.dtype) if bounds else x * 100
        case "tiny":
            return middle + (x - middle) * 1e-3 if bounds else x * 1e-3
        case "scale":
            return x * argument
        case "same-rows":
            return x[:1].expand_as(x) if x.dim() else x
        case "sorted":
            return x.sort(-1).values if x.dim() else x
        case "descending":
            return x.sort(-1, descending=True).values if x.dim() else x
        case "alternating":
            return torch.where(torch.arange(x.numel()).reshape(x.shape) % 2 == 0, high, low).to(x.dtype)
        case "prefix":
            return torch.where(_prefix(x), x, rest)
        case "smooth":
            return _smooth(x)
        case "one-hot" | "spike":
            out = torch.full_like(x, rest)
            if x.dim() and x.numel():
                out[..., 0] = 1.0 if name == "one-hot" else out[..., 0]
                out.view(-1)[0] = 1.0 if name == "one-hot" else argument
            return out
        case "last-row-large":
            out = x.clone()
            if x.dim() and x.shape[0]:
                out[-1] = high if bounds else x[-1] * 100
            return out
        case "nan" | "inf":
            out = x.clone()
            if bounds is None and x.numel():
                out.view(-1)[0] = math.nan if name == "nan" else math.inf
                out.view(-1)[-1] = math.nan if name == "nan" else -math.inf
            return out
    return x


def _special_integers(
    x: Tensor, name: str, argument: int | None, bounds: tuple[float, float], generator: torch.Generator
) -> Tensor:
    low, high = int(bounds[0]), int(bounds[1])
    clamped = {"zeros": 0, "ones": 1, "low": low, "high": high, "fill": argument}.get(name)
    if clamped is not None:
        return torch.full_like(x, min(max(clamped, low), high))
    ends = torch.tensor([low, high], dtype=x.dtype)
    match name:
        case "negated":
            return low + high - x
        case "large":
            return ends[torch.randint(0, 2, x.shape, generator=generator)]
        case "tiny":
            return torch.full_like(x, int(x.flatten()[0])) if x.numel() else x
        case "same-rows":
            return x[:1].expand_as(x) if x.dim() else x
        case "sorted":
            return x.sort(-1).values if x.dim() else x
        case "descending":
            return x.sort(-1, descending=True).values if x.dim() else x
        case "alternating":
            return ends[1 - torch.arange(x.numel()).reshape(x.shape) % 2]
        case "prefix":
            return torch.where(_prefix(x), x if high - low > 1 else high, low)
        case "smooth" if high - low > 15:
            return _smooth(x.to(torch.float64)).round().to(x.dtype)
        case "one-hot":
            out = torch.full_like(x, low)
            if x.dim() and x.numel():
                out[..., 0] = high
            return out
        case "last-row-large":
            out = x.clone()
            if x.dim() and x.shape[0]:
                out[-1] = high
            return out
        case "spike" if argument is not None and low <= argument <= high and x.numel():
            out = x.clone().contiguous()
            out.view(-1)[0] = argument
            return out
    return x


def _mixed(x: Tensor, numbers: list[float], bounds: tuple[float, float] | None, generator: torch.Generator) -> Tensor:
    """Return values three quarters of which are some numbers: a text that begins and ends with special tokens."""
    low, high = bounds or (-math.inf, math.inf)
    legal = [n for n in numbers if low <= n <= high and (x.dtype.is_floating_point or n.is_integer())]
    if not legal:
        return x
    which = torch.randint(0, 4 * len(legal), x.shape, generator=generator)
    table = torch.tensor(legal, dtype=torch.float64).to(x.dtype)
    return torch.where(which < 3 * len(legal), table[which % len(legal)], x)


def _smooth(x: Tensor) -> Tensor:
    """Return values that change slowly along the last two axes, as in images: noise has no neighbours alike."""
    if x.dim() < 2 or not x.numel():
        return x.sort().values
    for axis in {x.dim() - 1, max(x.dim() - 2, 1)}:
        size = x.shape[axis]
        at = torch.linspace(0, max(size // 8, 1), size, dtype=torch.float64).clamp(max=size - 1)
        left = at.floor().long()
        right = (left + 1).clamp(max=size - 1)
        part = (at - left).to(x.dtype).reshape(-1, *[1] * (x.dim() - 1 - axis))
        x = x.index_select(axis, left) * (1 - part) + x.index_select(axis, right) * part
    return x


def _prefix(x: Tensor) -> Tensor:
    """Return where a padded batch has data: row i keeps a first part of the last axis, each row another length."""
    if not x.dim():
        return torch.ones_like(x, dtype=torch.bool)
    length = x.shape[-1]
    if x.dim() == 1:
        return torch.arange(length) < max(1, length // 2)
    rows = torch.arange(x.shape[0]).reshape(-1, *[1] * (x.dim() - 1))
    kept = torch.clamp(length - 1 - rows * max(1, length // 4), min=1)
    return (torch.arange(length) < kept).expand_as(x)


def _fitted(values: Tensor, shape: list[int], generator: torch.Generator) -> Tensor:
    """Return the declared values cut and repeated to the shape, from random places, so that seeds differ."""
    while values.dim() < len(shape):
        values = values[None]
    for axis, size in enumerate(shape):
        have = values.shape[axis]
        start = int(torch.randint(0, have, (), generator=generator)) if axis == 0 or have > size else 0
        if have > size and axis:
            start = int(torch.randint(0, have - size + 1, (), generator=generator))
        index = (torch.arange(size) + start) % have
        values = values.index_select(axis, index)
    return values


def _read(version: ModelVersion, name: str, declared: Input, root: Path) -> Tensor:
    """Return the tensor in the file: its last axes are those of one item, an axis in front of them counts items."""
    where = f"trace {version.label}"
    path = root / str(declared.values)
    if not path.is_file():
        raise TraceError(where, f"input {name}: values {declared.values}: no such file")
    try:
        tensor = _tensor_of(path, name, declared)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise TraceError(
            where,
            f"input {name}: values {declared.values} cannot be read: {error}",
            f"expected a .npy file, a .safetensors file with a tensor {name!r} or only one, or an image",
        ) from None
    shape = declared.shape
    batched = bool(version.max_batch_size)
    item = shape[1:] if batched else shape
    fits = [
        tensor.dim() in {len(item), len(shape)}
        and all(isinstance(want, str) or want == have for want, have in zip(item[::-1], sizes[::-1], strict=False))
        for sizes in (tensor.shape, (*tensor.shape[1:], *tensor.shape[:1]))
    ]
    if path.suffix.lower() not in (".npy", ".safetensors") and not fits[0] and fits[1]:
        return tensor.movedim(0, -1).contiguous()  # a model whose images have their channels last
    if not fits[0] or not tensor.numel():
        raise TraceError(
            where,
            f"input {name}: values {declared.values} have shape {list(tensor.shape)}, "
            f"expected {[*shape]}" + (f" or {[*item]}" if batched else ""),
        )
    return tensor


def _tensor_of(path: Path, name: str, declared: Input) -> Tensor:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        import numpy

        return torch.from_numpy(numpy.ascontiguousarray(numpy.load(path, allow_pickle=False)))
    if suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(path)
        if name not in tensors and len(tensors) != 1:
            raise KeyError(f"tensors {sorted(tensors)}, none named {name!r}")
        found: Tensor = tensors.get(name, next(iter(tensors.values())))
        return found
    from torchvision.io import ImageReadMode, decode_image

    image: Tensor = decode_image(str(path), ImageReadMode.RGB)
    if not getattr(torch, declared.dtype).is_floating_point:
        return image
    low, high = declared.range or (0, 1)
    return image.to(torch.float32).div(255).mul(high - low).add(low)
