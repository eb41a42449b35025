"""Decides which hazards exist: how a TorchScript may differ from eager, what each is called, and the way out.

A hazard is why a proof failed. Its name is what a person writes under `trace: {accept: {...}}`, what proof.json holds,
and the heading of its section in docs/hazards.md; a test keeps the three equal. Imports no torch, so that reading a
pipeline.yaml stays fast.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple


class Meaning(NamedTuple):
    """What a hazard is, and what to do about it."""

    meaning: str
    """One line, as in docs/hazards.md."""
    way_out: str
    """One line: the change that mends it."""


_SCRIPT = "script the part that decides (trace: {script: [submodule]}, or method: script)"

HAZARDS: dict[str, Meaning] = {
    "branch-on-values": Meaning(
        "Python chooses a path by the values of a tensor; the trace keeps the path of the example",
        f"use torch.where or masks instead of if, or {_SCRIPT}",
    ),
    "branch-on-shape": Meaning(
        "Python chooses a path by a size; the trace keeps the path of the example's size",
        f"make one path right for every size, or {_SCRIPT}",
    ),
    "loop-over-length": Meaning(
        "a Python loop runs once per element of an axis; the trace keeps the example's number of turns",
        f"use an operation over the whole axis, or {_SCRIPT}",
    ),
    "frozen-batch": Meaning(
        "the batch size of the example is a constant in the trace",
        "pass x.shape[0] itself, or -1, without int() or len() around it",
    ),
    "frozen-size": Meaning(
        "a size of the example, not the batch, is a constant in the trace",
        "pass x.shape[i] itself, or -1, without int(), len(), numpy or a stored copy of it",
    ),
    "frozen-value": Meaning(
        "a number computed from the inputs left torch for Python and is a constant in the trace",
        "keep it a tensor: no item(), tolist(), float(), numpy() or torch.tensor() on what depends on the inputs",
    ),
    "frozen-tensor": Meaning(
        "a tensor that depends on the call (mask, positions, cache, copy of an input) is a constant in the trace",
        "compute it in forward with torch operations on the inputs, for every call anew",
    ),
    "frozen-device": Meaning(
        "the trace names a device that the server will not have",
        "create tensors with x.new_zeros, torch.zeros_like or a registered buffer, not with a fixed device",
    ),
    "nondeterministic": Meaning(
        "the same inputs give different outputs: random numbers, time, an environment variable or uninitialised memory",
        "pass the random numbers in as an input, or accept it: trace: {accept: {nondeterministic: reason}}",
    ),
    "training-mode": Meaning(
        "dropout or a normalisation runs in training mode although the model is in eval()",
        "pass training=self.training, call train() nowhere in forward, let batch norm keep track_running_stats",
    ),
    "state": Meaning(
        "the output depends on earlier calls: a counter, a cache, a buffer changed in place, a global",
        "make forward a function of its inputs: pass the state in and return it, or drop it",
    ),
    "input-mutation": Meaning(
        "forward changes one of its input tensors in place",
        "work on a copy: x = x + 1 or x.clone() instead of x += 1",
    ),
    "rows-mixed": Meaning(
        "a row's answer depends on the other rows of its batch; Triton puts rows of several requests into one batch",
        "reduce over other axes than 0, or serve without a batch axis: max_batch_size: 0",
    ),
    "batch-not-first": Meaning(
        "axis 0 of an output is not the batch; Triton would cut it between requests as if it were",
        "transpose or reshape the output to batch first, or serve without a batch axis: max_batch_size: 0",
    ),
    "scalar-output": Meaning(
        "an output has no axis at all; Triton carries none",
        "return it with an axis: y.reshape(1)",
    ),
    "dtype-changes": Meaning(
        "the dtype of an output is not the same for every case; config.pbtxt can name one only",
        "cast the output to one dtype before it is returned",
    ),
    "rank-changes": Meaning(
        "the number of an output's axes is not the same for every case; config.pbtxt can name one only",
        "name the axis: squeeze(1) instead of squeeze(), flatten(1) instead of a test on the size",
    ),
    "outputs-change": Meaning(
        "the number of outputs is not the same for every case",
        "return the same outputs always, with zeros where there is nothing",
    ),
    "eager-fails": Meaning(
        "the model itself raises for inputs that are declared",
        "narrow the axes (min, max, multiple_of) or the range of the input to what the model takes, or mend the model",
    ),
    "torchscript-fails": Meaning(
        "the TorchScript raises for declared inputs that eager takes",
        f"find what is fixed to the example at that line, or {_SCRIPT}",
    ),
    "unstable-calls": Meaning(
        "the TorchScript's answer changes from call to call for the same inputs, eager's does not",
        "look for a buffer that forward changes; if there is none, report it to PyTorch and use the other method",
    ),
    "not-finite": Meaning(
        "NaN or infinity is where eager has none, or the other way round",
        "test for NaN and infinity with torch.where and torch.nan_to_num, not with Python's if",
    ),
    "numeric-drift": Meaning(
        "outputs differ by more than rounding explains, by less than another path would",
        "raise trace: {rtol, atol} if the error is harmless to you, or keep sensitive parts in float64",
    ),
    "asks-if-traced": Meaning(
        "the model asks whether it is traced or scripted, and does something else then",
        "make both paths equal, declare only sizes at which they are (multiple_of, a fixed size), or accept it",
    ),
    "differs": Meaning(
        "outputs differ from eager and none of the other hazards explains it",
        f"compute sizes in whole numbers, compare both at that case, or {_SCRIPT}",
    ),
    "unknown-operator": Meaning(
        "the libtorch of the declared Triton release does not know an operator of the TorchScript",
        "declare a newer triton: release, or trace with the PyTorch of that release",
    ),
    "custom-operator": Meaning(
        "the TorchScript calls an operator that no Triton image has",
        "replace the operator with PyTorch's own, or add its library to the image and accept it with that reason",
    ),
    "unproved": Meaning(
        "the model was looked at in too few places for the proof to mean anything",
        "raise trace: {budget_s}, declare fewer sizes (min, max, multiple_of), or accept it with the reason",
    ),
    "crash": Meaning(
        "running the model ended the process",
        "look for a state or a buffer that is sized by the example (an LSTM's initial state), and size it by the input",
    ),
}
"""Name -> meaning. The order is that of docs/hazards.md."""


@dataclass(frozen=True)
class Hazard:
    """One hazard of one model version, as proof.json holds it.

    Attributes:
        hazard: A name of `HAZARDS`.
        case: The smallest known case that shows it: `batch=3 height=12 draw=normal seed=5`; "" if no case is needed.
        where: The line of the user's source, `src/zoo/text.py:12`; "" when it is not known.
        detail: What was seen: values, sizes of errors, tolerances.
        way_out: What to do.
    """

    hazard: str
    case: str
    where: str
    detail: str
    way_out: str

    def __str__(self) -> str:
        """Return the hazard on one line: name, case, line, what was seen."""
        parts = [f"case {self.case}"] if self.case else []
        parts += [self.where] if self.where else []
        return f"{self.hazard}: " + ": ".join([*parts, self.detail])

    def record(self) -> dict[str, str]:
        """Return the hazard as proof.json holds it."""
        return asdict(self)


def found(name: str, detail: str, *, case: str = "", where: object = None) -> Hazard:
    """Return a hazard with the way out that the list gives for it; `where` is a line, or None."""
    return Hazard(name, case, str(where or ""), detail, HAZARDS[name].way_out)
