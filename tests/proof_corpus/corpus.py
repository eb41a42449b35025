"""Small models with a known truth: each is declared with its inputs, and wrong ones with the hazard to be named.

A declaration is short text: `x="float32 batch 8"`, `ids="int64 batch t in 0 99"`; axes are `t=(example, min, max)`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tritonbuild.spec import Axis, Input, ModelVersion, Trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

MODELS: list[Model] = []


@dataclass
class Model:
    """One model of the corpus.

    Attributes:
        make: The module's class.
        hazard: What a trace of it suffers from; "" for none.
        version: Its declaration.
        witness: Sizes and a function of the inputs that random draws would hardly find, but that show the hazard.
        alone: Whether it may take the process with it and needs one of its own.
    """

    make: Callable[[], nn.Module]
    hazard: str
    version: ModelVersion
    witness: Any = None
    also: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.version.model


def declared(
    name: str, inputs: dict[str, str], axes: dict[str, Any], batch: int, trace: dict[str, Any]
) -> ModelVersion:
    """Return the declaration that the short texts stand for."""
    found = {}
    for key, text in inputs.items():
        shape, _, bounds = text.partition(" in ")
        dtype, *sizes = shape.split()
        limits = tuple(float(n) if "." in n else int(n) for n in bounds.split()) or None
        found[key] = Input(
            dtype=dtype, shape=tuple(int(size) if size.isdigit() else size for size in sizes), range=limits
        )
    return ModelVersion.model_construct(
        model=name,
        version=1,
        entry_point=f"corpus:{name}",
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
        inputs=found,
        outputs=(),
        trace=Trace(**trace),
    )


def wrong(hazard: str, *also: str, batch: int = 8, witness: Any = None, **inputs: Any) -> Any:
    """Declare a model whose trace is wrong, with the hazard that the proof must name; `also` are as right."""
    return _declare(hazard, also, batch, witness, inputs)


def right(batch: int = 8, **inputs: Any) -> Any:
    """Declare a model whose trace is right."""
    return _declare("", (), batch, None, inputs)


def _declare(hazard: str, also: tuple[str, ...], batch: int, witness: Any, inputs: dict[str, Any]) -> Any:
    axes = {key: value for key, value in inputs.items() if isinstance(value, tuple)}
    trace = inputs.pop("trace", {})
    texts = {key: value for key, value in inputs.items() if isinstance(value, str)} or {"x": "float32 batch 8"}

    def wrap(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        version = declared(make.__name__, texts, axes, batch, trace)
        MODELS.append(Model(make, hazard, version, witness, also))
        return make

    return wrap
