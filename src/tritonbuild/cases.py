"""Decides which cases a model version is proved on, and which of them are kept for the smoke test.

A case is one set of concrete inputs: sizes of the axes, a draw of values, a seed. The same declaration gives the
same cases on every machine. The plan goes from telling to thorough: the example, the batch, both ends of every axis,
joint sizes, special values; what a proof adds to it (every size, sizes and values that the model's code names) follows
in `more_sizes` and `more_values`.

Source: DESIGN's measurement of which cases show which hazards; docs/hazards.md, "What is run".
"""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tritonbuild import compare
from tritonbuild.draws import CORNERS, PLAIN, UNBOUNDED

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from tritonbuild.reference import Reference
    from tritonbuild.spec import Axis, ModelVersion

KEPT_BYTES = 64 * 2**20
"""The kept cases of one model version fill at most this; the first is always kept."""

JOINT_DRAWS = 4
"""Random sizes of all axes at once, in the plan."""

_MIXED = 4
_MIXES = 16
"""Numbers of the model's code that are mixed with one another, and how often: the places of both are chance."""


@dataclass(frozen=True)
class Case:
    """One set of inputs, as text: sizes of the axes in declared order, the draw, the seed."""

    axes: tuple[tuple[str, int], ...]
    draw: str
    seed: int

    @property
    def sizes(self) -> dict[str, int]:
        """Axis -> size."""
        return dict(self.axes)

    def __str__(self) -> str:
        """Return `batch=3 height=12 draw=plain seed=5`."""
        return " ".join([*(f"{axis}={size}" for axis, size in self.axes), f"draw={self.draw}", f"seed={self.seed}"])


def case(sizes: Mapping[str, int], draw: str = PLAIN, seed: int = 0) -> Case:
    """Return the case of these sizes."""
    return Case(tuple(sizes.items()), draw, seed)


def example_sizes(version: ModelVersion) -> dict[str, int]:
    """Return the sizes that the model is traced with."""
    return {name: axis.example for name, axis in version.all_axes.items()}


def legal(axis: Axis, size: int) -> bool:
    """Return whether the axis may have this size."""
    return axis.min <= size <= axis.max and size % axis.multiple_of == 0


def all_sizes(axis: Axis) -> range:
    """Return every size that the axis may have, ascending."""
    step = axis.multiple_of
    return range(-(-axis.min // step) * step, axis.max + 1, step)


def telling_sizes(name: str, axis: Axis) -> list[int]:
    """Return sizes at which a model that is frozen to the example shows it: both ends, neighbours, an odd one."""
    sizes = all_sizes(axis)
    low, high = sizes[0], sizes[-1]
    wanted = [low, high]
    if name == "batch":
        wanted += [3, 5, axis.example + 1]
    odd = (size for size in sizes[len(sizes) // 3 :] if size // axis.multiple_of % 2 and size != axis.example)
    wanted += [next(odd, high), axis.example + axis.multiple_of, axis.example - axis.multiple_of]
    wanted += [sizes[1] if len(sizes) > 1 else low]
    return [size for size in dict.fromkeys(wanted) if legal(axis, size) and size != axis.example]


def essential_sizes(version: ModelVersion) -> set[tuple[tuple[str, int], ...]]:
    """Return the sizes that no proof goes without, as in `Case.axes`.

    The example, both ends of every axis, an odd batch, and all axes at their lowest and at their highest.
    """
    axes, example = version.all_axes, example_sizes(version)
    ends = {name: (all_sizes(axis)[0], all_sizes(axis)[-1]) for name, axis in axes.items()}
    found = [example, *({**example, name: end} for name in axes for end in ends[name])]
    found += [{name: end[i] for name, end in ends.items()} for i in (0, 1)]
    if "batch" in axes and legal(axes["batch"], 3):
        found.append({**example, "batch": 3})
    return {tuple(sizes.items()) for sizes in found}


def plan(version: ModelVersion) -> list[Case]:
    """Return the cases that every proof runs, the most telling first; the example is the first.

    The first `version.trace.cases` of them are the ones to keep. Sizes and values alternate, so that a cut anywhere
    leaves some of both.
    """
    example = example_sizes(version)
    sizes = _planned_sizes(version)
    smallest = {name: all_sizes(axis)[0] for name, axis in version.all_axes.items()}
    one = {**example, "batch": 1} if "batch" in example else example
    # Values matter to Python code in the same way at every size: small sizes keep them cheap.
    at = [example, one, smallest] if smallest not in (example, one) else [example, one]
    draws: list[tuple[dict[str, int], str, int]] = [(one, PLAIN, 2), (example, PLAIN, 1)]
    draws += [(at[i % len(at)], draw, 3 + i) for i, draw in enumerate(CORNERS)]
    valued = iter([case(*drawn) for drawn in draws])
    sized = iter([case(found, PLAIN, 100 + i) for i, found in enumerate(sizes)])
    ordered = [case(example)]
    while True:  # two of sizes, one of values
        block = [*itertools.islice(sized, 2), *itertools.islice(valued, 1)]
        if not block:
            return list(dict.fromkeys(ordered))
        ordered += block


def _planned_sizes(version: ModelVersion) -> list[dict[str, int]]:
    axes = version.all_axes
    example = example_sizes(version)
    ends = {name: (all_sizes(axis)[0], all_sizes(axis)[-1]) for name, axis in axes.items()}
    telling = {name: telling_sizes(name, axis) for name, axis in axes.items()}
    found: list[dict[str, int]] = []
    depth = max((len(sizes) for sizes in telling.values()), default=0)
    singles = [{**example, name: telling[name][i]} for i in range(depth) for name in axes if i < len(telling[name])]
    found += singles[: 3 * len(axes)]
    if len(axes) > 1:
        found += [{name: end[0] for name, end in ends.items()}, {name: end[1] for name, end in ends.items()}]
        found += [{**{name: end[0] for name, end in ends.items()}, name: ends[name][1]} for name in axes]
        found += list(itertools.islice(joint_sizes(version, seed=0), JOINT_DRAWS))
        found += [{**{name: end[1] for name, end in ends.items()}, name: ends[name][0]} for name in axes]
    found += singles[3 * len(axes) :]
    seen = {tuple(example.items())}
    fresh = []
    for sizes in found:
        key = tuple({name: sizes[name] for name in axes}.items())
        if key not in seen:
            seen.add(key)
            fresh.append(dict(key))
    return fresh


def joint_sizes(version: ModelVersion, seed: int) -> Iterator[dict[str, int]]:
    """Yield sizes of all axes at once: equal ones, ascending and descending ones, then random ones, without end."""
    axes = version.all_axes
    choices = {name: all_sizes(axis) for name, axis in axes.items()}
    rng = random.Random(seed)  # noqa: S311 (nothing secret)
    names = [name for name in axes if name != "batch"]
    example = example_sizes(version)
    if len(names) > 1:
        shared = [size for size in choices[names[0]][:4096] if all(size in choices[name] for name in names)]
        for size in dict.fromkeys((*shared[:1], *shared[len(shared) // 2 :][:1])):
            yield {**example, **dict.fromkeys(names, size)}
    while choices:
        yield {name: rng.choice(sizes) for name, sizes in choices.items()}


def value_sizes(version: ModelVersion) -> list[dict[str, int]]:
    """Return sizes at which to try values, each once: one row, the example, all axes at their lowest and highest."""
    example = example_sizes(version)
    ends = [{name: all_sizes(axis)[end] for name, axis in version.all_axes.items()} for end in (0, -1)]
    found: list[dict[str, int]] = []
    for sizes in ({**example, "batch": 1} if "batch" in example else example, example, *ends):
        found += [] if sizes in found else [sizes]
    return found


def more_sizes(version: ModelVersion, numbers: Collection[int]) -> Iterator[Case]:
    """Yield further cases of sizes: around numbers in the model's code, then every size of every axis, joint sizes.

    Args:
        version: The declaration.
        numbers: Whole numbers that the model's code compares with or holds.
    """
    axes = version.all_axes
    example = example_sizes(version)
    if not axes:
        return
    small = {name: all_sizes(axis)[0] for name, axis in axes.items()}
    near = [number + step for number in sorted(set(numbers)) if number > 0 for step in (0, 1, -1)]
    for number, (name, axis) in itertools.product(near, axes.items()):
        if legal(axis, number):
            yield case({**example, name: number}, PLAIN, 200)
    for number, (one, two) in itertools.product(near[::3], itertools.combinations(axes, 2)):
        products = [(a, number // a) for a in all_sizes(axes[one])[:4096] if number % a == 0]
        pair = next(((a, b) for a, b in products if legal(axes[two], b)), None)
        if pair:
            yield case({**example, one: pair[0], two: pair[1]}, PLAIN, 201)
    # Batch 1 and the smallest of the others: the cheapest way to see every size.
    rest = {**example, "batch": 1} if "batch" in axes else example
    rng = random.Random(1)  # noqa: S311
    rows = {name: rng.sample(all_sizes(axis), min(len(all_sizes(axis)), 4096)) for name, axis in axes.items()}
    joint = joint_sizes(version, seed=1)
    pairs = (
        {**small, one: a, two: b}
        for one, two in itertools.combinations(axes, 2)
        for a, b in itertools.product(telling_sizes(one, axes[one]), telling_sizes(two, axes[two]))
    )
    for turn in range(max(len(sizes) for sizes in rows.values())):
        for name, sizes in rows.items():
            if turn < len(sizes):
                yield case({**rest, name: sizes[turn]}, PLAIN, 300 + turn)
        if len(axes) > 1:
            for found in (*itertools.islice(joint, 1), *itertools.islice(pairs, 1)):
                yield case({name: found[name] for name in axes}, PLAIN, 300 + turn)


def more_draws(version: ModelVersion) -> Iterator[Case]:
    """Yield plain values at random sizes, without end."""
    joint = joint_sizes(version, seed=2) if version.all_axes else itertools.repeat({})
    for seed, sizes in zip(itertools.count(700), joint, strict=False):
        yield case({name: sizes[name] for name in version.all_axes}, PLAIN, seed)


def more_values(
    numbers: Collection[float],
    bounded: Mapping[str, tuple[float, float] | None],
    places: Sequence[Mapping[str, int]],
) -> Iterator[Case]:
    """Yield further cases of values: around numbers in the model's code, many scales, more seeds, one input at a time.

    Args:
        numbers: Numbers that the model's code compares with or holds.
        bounded: The bounds of every input, None for a float without any.
        places: Sizes at which to try them.
    """
    scales = [10.0**power for power in (1, 3, -1, 4, 2, -2, 6)] if None in bounded.values() else []
    draws = [f"scale={sign}{scale:g}" for scale in scales for sign in ("", "-")]
    if len(bounded) > 1:
        draws += [f"{draw}@{name}" for draw in ("zeros", "negated", "high", "low", "large") for name in bounded]
    ordered = sorted(set(numbers), key=lambda number: (abs(number) in (0, 1, 2), abs(number)))[:40]
    ratios = [a / b for a, b in itertools.permutations(ordered[:8], 2) if b]
    for number in ordered:
        draws += [f"fill={number!r}", f"spike={number!r}"]
    for number in ordered:
        draws += [f"fill={number * factor!r}" for factor in (1.01, 0.99, -1.0)] + [f"spike={number * 1.01!r}"]
    draws += [f"fill={ratio!r}" for ratio in dict.fromkeys(ratios)]
    draws += ["descending", *(f"mix={number!r}" for number in ordered[:_MIXED])]
    pairs = [",".join(map(repr, pair)) for pair in itertools.combinations(ordered[:_MIXED], 2)]
    draws += [f"mix={pair}" for pair in pairs] * _MIXES
    unbounded = [name for name, bounds in bounded.items() if bounds is None]
    draws += list(UNBOUNDED) if unbounded else []
    draws += [f"{draw}@{name}" for draw in UNBOUNDED for name in unbounded] if len(bounded) > 1 else []
    seeds = itertools.count(400)
    for i, draw in enumerate(draws):
        yield case(places[i % len(places)], draw, next(seeds))
    for sizes, draw in itertools.product(places, CORNERS):
        yield case(sizes, draw, next(seeds))
    for i in range(200):
        yield case(places[i % len(places)], PLAIN, next(seeds))


def save(reference: Reference, path: Path) -> int:
    """Write the cases that the smoke test replays to a safetensors file; return how many.

    The first is always kept, the others as long as all fit into `KEPT_BYTES`.

    Source: tensors are named `<i>/input/<name>` and `<i>/output/<name>`; the cases themselves, their tolerance and what
        may be compared are in the file's metadata (docs/pipeline.md, "Results").
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    kept: list[dict[str, object]] = []
    largest = dict.fromkeys(reference.output_names, 0.0)
    names = list(reference.version.inputs)
    size = 0
    for found in reference.cases[: reference.version.trace.cases]:
        outputs = reference.outputs(found)
        if outputs is None or len(outputs) != len(reference.output_names):
            continue
        named = {f"{len(kept)}/input/{name}": x for name, x in zip(names, reference.inputs(found), strict=True)}
        named |= {f"{len(kept)}/output/{name}": x for name, x in zip(reference.output_names, outputs, strict=True)}
        more = sum(tensor.nbytes for tensor in named.values())
        if kept and size + more > KEPT_BYTES:
            continue
        size += more
        # safetensors refuses tensors that share memory, and tensors with gaps.
        tensors |= {name: tensor.detach().cpu().clone().contiguous() for name, tensor in named.items()}
        kept.append({"case": str(found), "sizes": found.sizes})
        for name, output in zip(reference.output_names, outputs, strict=True):
            largest[name] = max(largest[name], compare.largest(output))
    tf32 = reference.device.startswith("cuda")
    tolerance = {name: compare.served(reference.tolerance, largest[name], tf32=tf32) for name in largest}
    found_in_eager = {hazard.hazard for hazard in reference.hazards_of_eager}
    chance = {"nondeterministic", "training-mode", "state"} & found_in_eager
    metadata = {
        "cases": json.dumps(kept),
        "tolerance": json.dumps(tolerance),
        "compare": "shapes" if chance else "values",
        "rows": "mixed" if "rows-mixed" in found_in_eager else "apart",
        "sensitive": json.dumps(sorted(reference.sensitive)),
    }
    path.write_bytes(_in_order(save(tensors, metadata)))
    return len(kept)


def _in_order(content: bytes) -> bytes:
    """Return a safetensors file with its header's keys sorted: safetensors writes metadata in another order each time.

    Equal cases must be equal bytes, or a proof that is made again would serve the model again.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]
