"""Small models with a known truth: each is declared with its inputs, and wrong ones with the hazard to be named.

A declaration is short text: `x="float32 batch 8"`, `ids="int64 batch t in 0 99"`; axes are `t=(example, min, max)` or
`t=(example, min, max, multiple_of)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tritonbuild.spec import Axis, Input, ModelVersion, Trace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from truth import Run

    Shown = Callable[..., Sequence[Tensor]]

MODELS: list[Model] = []


@dataclass
class Model:
    """One model of the corpus.

    Attributes:
        make: The module's class.
        hazards: What a trace of it suffers from: the proof must name one of these; empty for none.
        version: Its declaration.
        shows: What makes from the example's inputs those that show the hazard, where random draws hardly find them.
        by: What shows it otherwise, with a `truth.Run`.
        delicate: Whether rounding decides its values, so that a row alone is another row.
    """

    make: type[nn.Module]
    hazards: tuple[str, ...]
    version: ModelVersion
    shows: Shown | None = None
    by: Callable[[Run], bool] | None = None
    delicate: bool = False

    @property
    def name(self) -> str:
        return self.version.model


def wrong(
    *hazards: str,
    batch: int = 8,
    shows: Shown | None = None,
    by: Callable[[Run], bool] | None = None,
    method: str = "trace",
    **inputs: Any,
) -> Any:
    """Declare a model whose trace, or script, is wrong, with the hazards of which the proof must name one."""
    return _declare(hazards, batch, inputs, method, shows=shows, by=by)


def right(batch: int = 8, *, delicate: bool = False, **inputs: Any) -> Any:
    """Declare a model whose trace is right."""
    return _declare((), batch, inputs, "trace", delicate=delicate)


def _declare(hazards: tuple[str, ...], batch: int, inputs: dict[str, Any], method: str, **more: Any) -> Any:
    axes = {key: value for key, value in inputs.items() if isinstance(value, tuple)}
    texts = {key: value for key, value in inputs.items() if isinstance(value, str)}

    def wrap(make: type[nn.Module]) -> type[nn.Module]:
        MODELS.append(Model(make, hazards, declared(make, texts, axes, batch, method), **more))
        return make

    return wrap


def declared(
    make: type[nn.Module], inputs: dict[str, str], axes: dict[str, Any], batch: int, method: str = "trace"
) -> ModelVersion:
    """Return the declaration that the short texts stand for."""
    return ModelVersion.model_construct(
        model=make.__name__,
        version=1,
        entry_point=f"{make.__module__}:{make.__name__}",
        kwargs={},
        seed=0,
        weights=None,
        device="cpu",
        triton="26.08",
        max_batch_size=batch,
        axes={
            key: Axis(example=size[0], min=size[1], max=size[2], multiple_of=size[3] if len(size) > 3 else 1)
            for key, size in axes.items()
        },
        inputs={key: _input(text) for key, text in inputs.items()},
        outputs=(),
        trace=Trace(method=method),
    )


def _input(text: str) -> Input:
    shape, _, bounds = text.partition(" in ")
    dtype, *sizes = shape.split()
    limits = tuple(float(end) if dtype.startswith("float") else int(end) for end in bounds.split())
    return Input(
        dtype=dtype,
        shape=tuple(int(size) if size.isdigit() else size for size in sizes),
        range=limits or None,
    )
