"""Decides whether outputs can be served at all: one rank and dtype each, batch in front, rows that do not mix.

Triton's batcher puts the rows of several requests into one batch and cuts every output along axis 0 by the number of
rows of each. An output that has something else there is cut all the same, without a word; a model that mixes rows
answers one client with the data of another.

Source: the PyTorch backend's handling of outputs, measured on it; DESIGN section 6.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tritonbuild import cases, compare, hazards
from tritonbuild.calls import Watch
from tritonbuild.draws import PLAIN

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import TypeGuard

    from tritonbuild.calls import Answer
    from tritonbuild.cases import Case
    from tritonbuild.hazards import Hazard
    from tritonbuild.reference import Reference

_CHAOS = 16.0
"""Rounding explains an error of this many times what changing the inputs in their last bits does, on average."""

_ROUNDING = 0.01
"""Largest error, relative to the largest value, that rounding explains where the same kernels run."""

_NEIGHBOURS = ("zeros", "high", "low", "large", "ones", "prefix")
"""Draws of values that another row of the batch may have."""

_NUMBERS = 8
_LARGEST = 1e30
"""How many numbers of the model's code another row may hold, and below what."""

_FURTHER_S = 0.1
_DECIDES_S = 1.0
_LEAST = 12
"""Seconds for rows beside rare others: in general, and where values leave torch for Python; tried anyhow."""


def structure(
    reference: Reference, answers: Sequence[tuple[Case, tuple[Tensor, ...]]], names: Sequence[str]
) -> Iterator[Hazard]:
    """Yield what keeps Triton from carrying the outputs: their number, ranks, dtypes, and axis 0."""
    first, expected = answers[0]
    for case, outputs in answers[1:]:
        if len(outputs) != len(expected):
            yield hazards.found(
                "outputs-change",
                f"{len(outputs)} outputs, {len(expected)} for case {first}",
                case=str(case),
            )
            return
    wrong: set[str] = set()
    for i, name in enumerate(names):
        for case, outputs in answers:
            output = outputs[i]
            if output.dim() != expected[i].dim():
                wrong.add(name)
                yield hazards.found(
                    "rank-changes",
                    f"output {name} has shape {list(output.shape)}, {list(expected[i].shape)} for case {first}",
                    case=str(case),
                )
                break
        for case, outputs in answers:
            if outputs[i].dtype != expected[i].dtype:
                yield hazards.found(
                    "dtype-changes",
                    f"output {name} is {outputs[i].dtype}, {expected[i].dtype} for case {first}",
                    case=str(case),
                )
                break
    if not reference.version.max_batch_size:
        scalars = [name for name, output in zip(names, expected, strict=True) if not output.dim()]
        for name in scalars:
            yield hazards.found("scalar-output", f"output {name} has no axis", case=str(first))
        return
    for i, name in enumerate(names):
        if name in wrong:
            continue
        for case, outputs in answers:
            batch = case.sizes["batch"]
            if not outputs[i].dim():
                yield hazards.found("scalar-output", f"output {name} has no axis", case=str(case))
                break
            if outputs[i].shape[0] != batch:
                yield hazards.found(
                    "batch-not-first",
                    f"output {name} has shape {list(outputs[i].shape)}, expected axis 0 to be the batch, {batch}",
                    case=str(case),
                )
                break


def rows(reference: Reference, names: Sequence[str]) -> Iterator[Hazard]:
    """Yield an output whose row depends on the rest of its batch, or on the size of the batch.

    A row is compared with itself beside other rows (the same kernels run, so that nothing but mixing explains a
    difference) and with itself alone (other kernels run: rounding is told from mixing by how far the row moves when
    its inputs move in their last bits).
    """
    axis = reference.version.all_axes["batch"]
    example = cases.example_sizes(reference.version)
    wanted = (min(3, axis.max),) if reference.dear else (2, 3, axis.max)
    batches = [size for size in dict.fromkeys(wanted) if size in cases.all_sizes(axis) and size > 1]
    answered = {case.axes: case for case in reversed(reference.planned) if case.draw == PLAIN}
    for turn, batch in enumerate(batches):
        sizes = {**example, "batch": batch}
        if turn == 2 and not reference.cheap(sizes):
            continue
        case = answered.get(tuple(sizes.items()), cases.case(sizes, PLAIN, 500 + turn))
        inputs = reference.inputs(case)
        whole = reference.answer(case)
        if not isinstance(whole, tuple):
            continue
        others = reference.inputs(cases.case(case.sizes, PLAIN, 600 + turn))
        for row in sorted({0, batch - 1} | (set() if reference.dear else {batch // 2})):
            beside = [_with_row(other, tensor, row) for other, tensor in zip(others, inputs, strict=True)]
            ways = [("beside other rows", beside, row)]
            if row in (0, batch - 1):  # what only a row in the middle shows is not the size of the batch
                ways.append(("alone", [tensor[row : row + 1].contiguous() for tensor in inputs], 0))
            for text, given, at in ways:
                found = reference.attempt(reference.usable(), given)
                if not isinstance(found, tuple):
                    continue
                hazard = _compared(reference, names, case, row, text, (whole, found, at))
                if hazard:
                    yield hazard
                    return


def further(reference: Reference, names: Sequence[str], searched: Sequence[Case]) -> Iterator[Hazard]:
    """Yield an output whose row depends on rare values of the others, or on rare sizes of the batch.

    Args:
        reference: Eager.
        names: Of the outputs.
        searched: Cases at which values leave torch for Python, if any do: such a value may be one of the whole batch.
    """
    example = cases.example_sizes(reference.version)
    batches = [size for size in cases.all_sizes(reference.version.all_axes["batch"])[:64] if size > 1]
    affordable = [size for size in batches if reference.cheap({**example, "batch": size}, limit_s=_FURTHER_S / 10)]
    decides = bool(reference.seen.escapes)
    # Dynamic quantization rounds to 1/255 of the largest activation of the batch, and is meant to.
    quantized = any("quantized.dynamic" in type(part).__module__ for part in reference.usable().modules())
    if not batches or quantized or not (affordable or decides):
        return
    watch = Watch()
    limit_s = _DECIDES_S if decides else _FURTHER_S
    sizes = {**example, "batch": (affordable or batches)[-1]}
    pairs = _neighbours(reference, sizes, searched if decides else ())
    largest = {name: cases.all_sizes(axis)[-1] for name, axis in reference.version.all_axes.items()}
    if decides and reference.cheap({**largest, "batch": sizes["batch"]}, limit_s=_DECIDES_S / 20):
        pairs = itertools.chain(pairs, _neighbours(reference, {**largest, "batch": sizes["batch"]}, ()))
    for tried, (one, two) in enumerate(pairs):
        if tried >= _LEAST and watch.s > limit_s:
            break
        hazard = _beside(reference, names, one, two)
        if hazard:
            yield hazard
            return
    planned = [case for case in reference.cases if case.draw == PLAIN and case.sizes["batch"] > 1]
    planned = [case for case in planned if {**case.sizes, "batch": 1} != {**example, "batch": 1}]
    largest_first = sorted(planned, key=lambda case: -math.prod(case.sizes.values()))
    # What a client gets when others ask the same. Not zeros: moving their last bits does not show what rounding does.
    alike = [cases.case(sizes, draw, 540) for draw in ("same-rows", "ones")]
    for tried, case in enumerate((*alike, *largest_first)):
        batch = case.sizes["batch"]
        whole = reference.answer(case)
        if not _has_rows(whole, names) or not reference.cheap(case.sizes, limit_s=_FURTHER_S):
            continue
        if tried >= _LEAST + len(alike) and watch.s > 2 * limit_s:
            return
        alone = [tensor[-1:].contiguous() for tensor in reference.inputs(case)]
        found = reference.attempt(reference.usable(), alone)
        if not _has_rows(found, names):
            continue
        hazard = _compared(reference, names, case, batch - 1, "alone", (whole, found, 0))
        if hazard:
            yield hazard
            return


def _neighbours(
    reference: Reference, sizes: Mapping[str, int], searched: Iterable[Case]
) -> Iterator[tuple[Case, Case]]:
    """Yield a case, and another whose first and last row are put into it, one at a time."""
    bounded = reference.source.bounds
    draws = [*_NEIGHBOURS, *(("fill=30", "fill=-30", "nan") if None in bounded.values() else ())]
    draws += [f"{draw}@{name}" for draw in _NEIGHBOURS[:4] for name in bounded] if len(bounded) > 1 else []
    numbers = sorted(n for n in reference.seen.numbers if 2 < abs(n) < _LARGEST)[:_NUMBERS]
    draws += [f"{draw}={number!r}" for number in numbers for draw in ("fill", "spike")]
    plain = cases.case(sizes, PLAIN, 510)
    for i, draw in enumerate(draws):
        special = cases.case(sizes, draw, 520 + i)
        yield plain, special
        # Each beside another: the row of one seed may happen to be special itself.
        yield special, cases.case(sizes, PLAIN, 550 + i)
    for case in searched:
        if {**case.sizes, "batch": 1} == {**sizes, "batch": 1}:
            yield plain, case


def _beside(reference: Reference, names: Sequence[str], case: Case, other: Case) -> Hazard | None:
    """Return the hazard of rows that change when the last row becomes another one, or the first."""
    whole = reference.answer(case)
    if not _has_rows(whole, names):
        return None
    batch = case.sizes["batch"]
    pairs = list(zip(reference.inputs(case), reference.inputs(other), strict=True))
    with_last = [torch.cat([tensor[:-1], given[-1:]]) for tensor, given in pairs]
    with_first = [torch.cat([given[:1], tensor[1:]]) for tensor, given in pairs]
    turns = ((with_last, range(batch - 1)[:2], "last"), (with_first, range(1, batch)[-2:], "first"))
    for mixed, rows, which in turns[:1] if reference.dear else turns:
        text = f"beside other rows (the {which} from draw={other.draw} seed={other.seed})"
        found = reference.attempt(reference.usable(), mixed)
        if not isinstance(found, tuple):
            continue
        if not _has_rows(found, names):
            return hazards.found("rows-mixed", f"{text}, the outputs are others in number or rank", case=str(case))
        for row in rows:
            hazard = _compared(reference, names, case, row, text, (whole, found, row))
            if hazard:
                return hazard
    return None


def _has_rows(answer: Answer, names: Sequence[str]) -> TypeGuard[tuple[Tensor, ...]]:
    return isinstance(answer, tuple) and len(answer) == len(names) and all(output.dim() for output in answer)


def _compared(
    reference: Reference,
    names: Sequence[str],
    case: Case,
    row: int,
    text: str,
    answers: tuple[tuple[Tensor, ...], tuple[Tensor, ...], int],
) -> Hazard | None:
    whole, found, at = answers
    moved: list[float] | None = None
    for i, name in enumerate(names):
        expected, got = whole[i][row : row + 1], found[i][at : at + 1]
        difference = compare.difference(expected, got, reference.tolerance)
        if difference is None:
            continue
        if difference.kind == "values":
            moved = moved or sensitivity(reference, [x[row : row + 1].contiguous() for x in reference.inputs(case)])
            # Beside others the same kernels run: a value that turns at its last bit is no rounding there.
            small = text == "alone" or difference.error <= _ROUNDING * compare.largest(expected)
            if moved and small and compare.mean_error(expected, got) <= moved[i]:
                reference.sensitive.add(name)
                continue
        return hazards.found(
            "rows-mixed",
            f"output {name}: row {row} differs when it is run {text}: {difference.text}",
            case=str(case),
        )
    return None


def sensitivity(reference: Reference, inputs: Sequence[Tensor]) -> list[float] | None:
    """Return the mean error of each output that rounding explains; None if that cannot be found out.

    It is measured: the float inputs, or the weights where there are none, are moved in their last bits. The mean tells
    a model that amplifies rounding, all of whose elements move, from one that has a few elements on a threshold.
    """
    plain = reference.attempt(reference.usable(), inputs)
    if not isinstance(plain, tuple):
        return None
    floats = any(tensor.is_floating_point() for tensor in inputs)
    largest = [0.0] * len(plain)
    for seed in range(3 if reference.dear else 8):
        generator = torch.Generator().manual_seed(seed)
        nudged = [_nudged(tensor, generator) if tensor.is_floating_point() else tensor for tensor in inputs]
        module = reference.usable() if floats else _moved(reference.fresh(), generator)
        found = reference.attempt(module, nudged)
        if isinstance(found, tuple) and len(found) == len(plain):
            largest = [
                max(error, _CHAOS * compare.mean_error(one, two))
                for error, one, two in zip(largest, plain, found, strict=True)
            ]
    return largest


def _moved(module: nn.Module, generator: torch.Generator) -> nn.Module:
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = _nudged(parameter.data, generator)
    return module


def _nudged(tensor: Tensor, generator: torch.Generator) -> Tensor:
    sign = torch.randint(0, 2, tensor.shape, generator=generator).mul(2).sub(1).to(tensor.device, tensor.dtype)
    return tensor + tensor * sign * (2 * torch.finfo(tensor.dtype).eps)


def _with_row(others: Tensor, tensor: Tensor, row: int) -> Tensor:
    mixed = others.clone()
    mixed[row] = tensor[row]
    return mixed
