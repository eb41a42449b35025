"""Decides the TorchScript of a model version: the first candidate that passes the proof.

Runs in a child of its own (`worker`): imports and builds the model, lets `candidates` make TorchScripts, writes each as
a canonical archive, loads that file back and has it proved. So what is proved is what is shipped, byte for byte.

Source: docs/architecture.md; docs/hazards.md, "What is run".
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from tritonbuild import archive, cases, proof
from tritonbuild.candidates import candidates, explained, quiet
from tritonbuild.entry import Builder, builder
from tritonbuild.errors import BuildError, ProofError, TraceError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tritonbuild.proof import Verdict
    from tritonbuild.spec import ModelVersion

__all__ = ["builder", "candidates", "run"]


def run(version: ModelVersion, root: Path, out: Path, say: Callable[[str], None] = lambda _: None) -> str:
    """Trace and prove one model version.

    Args:
        version: The declaration.
        root: The project's folder; it and its src/ are put in front of sys.path.
        out: An existing, empty folder. Takes model.pt, signature.json, cases.safetensors and proof.json; after a
            failure proof.json alone.
        say: Called with what begins, once per step. Standard output gets the same, and more, with times.

    Returns:
        The kind of device that it ran on, cuda or cpu.

    Raises:
        TraceError: The entry point, its weights, or every way to a TorchScript failed.
        ProofError: No TorchScript passed the proof.
    """
    work = _Run(version, root, out, say)
    try:
        with quiet():
            work.start()
            work.measure()
            work.choose()
    except BuildError as error:
        (out / "model.pt").unlink(missing_ok=True)
        work.record["error"] = str(error)
        raise
    finally:
        (out / "proof.json").write_text(json.dumps(work.record, indent=2) + "\n")
    return work.device.type


class _Run:
    """The run of one model version: its steps, in order, and what proof.json will say."""

    def __init__(self, version: ModelVersion, root: Path, out: Path, say: Callable[[str], None]) -> None:
        self.version = version
        self.root = root
        self.out = out
        self.where = f"trace {version.label}"
        self.record: dict[str, Any] = {"verdict": "failed", "hazards": [], "cases": 0, "max_abs_error": {}}
        self.record |= {"torch": torch.__version__, "device": version.device}
        self._say = say
        self._started = time.perf_counter()

    def start(self) -> None:
        """Import the entry point; build a first model."""
        self.device = _device(self.version)
        self.record["device"] = str(self.device)
        self.build = Builder(self.version, self.root, self.device)
        self._begin(f"building {self.version.entry_point} on {self.device}")
        self.reference = proof.Reference(self.version, self.build, str(self.device), self.root)

    def measure(self) -> None:
        """Run the example: it shows how the model is called and what it returns."""
        try:
            _ = self.reference.example
        except Exception as error:
            example = proof.example(self.version, self.device, self.root)
            shown = ", ".join(
                f"{name} {declared.dtype}{list(tensor.shape)}"
                for (name, declared), tensor in zip(self.version.inputs.items(), example, strict=True)
            )
            raise self.build.raised(f"forward({shown})", error, *self._half(), *self._outside(error)) from error
        interface = self.build.interface
        assert interface
        for name, source in interface.sources:
            self._note(f"output {name} is {source or 'the result'}")
        if interface.left_out:
            self._note(f"not served: {', '.join(interface.left_out)}")
        if interface.cast is not None:
            self._note("the model is bfloat16: float inputs are cast to it")

    def _half(self) -> tuple[str, ...]:
        kinds = {parameter.dtype for parameter in self.build().parameters() if parameter.is_floating_point()}
        wide = [name for name, declared in self.version.inputs.items() if declared.dtype in ("float32", "float64")]
        return (
            (f"the model is float16: declare {', '.join(wide)} as float16",)
            if kinds == {torch.float16} and wide
            else ()
        )

    def _outside(self, error: Exception) -> tuple[str, ...]:
        """Return what to do about a number for which a table has no row."""
        ranges = [f"{name} {list(i.range)}" for name, i in self.version.inputs.items() if i.range and "int" in i.dtype]
        if not isinstance(error, IndexError) or not ranges:
            return ()
        return (f"narrow the range ({', '.join(ranges)}) to what the model takes, or mend the model",)

    def choose(self) -> None:
        """Write the first candidate that passes the proof.

        Raises:
            TraceError: None can be made.
            ProofError: None passes.
        """
        path = self.out / "model.pt"
        tried: list[tuple[str, Verdict | TraceError]] = []
        example = proof.example(self.version, self.device, self.root)
        for description, make in candidates(self.version, self.build, example):
            self._begin(f"making the TorchScript ({description})")
            self.reference.forget()
            try:
                read = [self._written(make(), path)]
            except TraceError as error:
                self._note(str(error))
                tried.append((description, error))
                continue
            self._begin(f"proving it ({description})")
            verdict = self._proved(path, read, make.warnings, traced=make.traced)
            self._note(f"{verdict.cases} cases, {len(verdict.hazards)} hazards, {verdict.seconds:.1f} s")
            if verdict.passed:
                self.record = {**proof.report(verdict, self.reference), "candidate": description, **_tried(tried)}
                self._finish(path, verdict.arguments)
                return
            for hazard in verdict.hazards:
                self._note(str(hazard))
                make.blamed.append(hazard.where)

            tried.append((description, verdict))
            if any(hazard in self.reference.hazards_of_eager for hazard in verdict.hazards):
                break  # it is the model itself; no other TorchScript of it can pass
        raise self._failure(tried)

    def _written(self, made: torch.jit.ScriptModule, path: Path) -> torch.jit.ScriptModule:
        """Write the file, and return what is read of it: PyTorch writes names that it cannot read."""
        try:
            archive.write(made, path)
        except UnicodeDecodeError as error:
            raise self._unreadable(error) from error
        except RuntimeError as error:
            if "Could not export Python function" not in str(error):
                raise
            # A torch.autograd.Function, @torch.jit.ignore: they stay Python.
            what = f"the TorchScript cannot be saved: {explained(error, self.root)}"
            raise TraceError(self.where, what, "call operators of torch instead, or script the part") from error
        try:
            return self._load(path)
        except RuntimeError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> TraceError:
        model = self.build().module
        kinds = (f"{type(part).__module__}.{type(part).__qualname__}" for part in model.modules())
        members = (name for part in model.modules() for name in (*part._modules, *part._parameters, *part._buffers))
        other = next((name for name in (*kinds, *members) if not name.isascii()), None)
        what = "PyTorch cannot read the TorchScript that it wrote"
        if other:
            return TraceError(self.where, f'{what}: the name "{other}" is not ASCII', "rename it")
        return TraceError(self.where, f"{what}: {explained(error, self.root)}")

    def _load(self, path: Path) -> torch.jit.ScriptModule:
        return torch.jit.load(path, map_location=self.device)  # type: ignore[no-untyped-call,no-any-return]

    def _proved(self, path: Path, read: list[torch.jit.ScriptModule], warnings: list[Any], *, traced: bool) -> Verdict:
        return proof.prove(
            self.version,
            self.build,
            lambda: read.pop() if read else self._load(path),
            self.device,
            warnings,
            self.reference,
            traced=traced,
        )

    def _finish(self, path: Path, arguments: list[str]) -> None:
        signature = proof.signature(self.version, self.reference, arguments)
        text = json.dumps(signature, indent=2, sort_keys=True) + "\n"
        (self.out / "signature.json").write_text(text)
        kept = cases.save(self.reference, self.out / "cases.safetensors")
        self._note(f"{path.stat().st_size} bytes, {kept} cases kept")

    def _failure(self, tried: list[tuple[str, Verdict | TraceError]]) -> BuildError:
        # The first verdict is that of the trace, or of what the declaration asks for: it is what a person can mend.
        first = next((pair for pair in tried if not isinstance(pair[1], TraceError)), tried[0])
        others = _lines([pair for pair in tried if pair is not first])
        description, outcome = first
        if isinstance(outcome, TraceError):
            return TraceError(self.where, outcome.what, *(others or outcome.advice))
        self.record = {**proof.report(outcome, self.reference), "candidate": description, **_tried(tried)}
        hazard, *more = outcome.hazards
        what = f"{hazard}{f' (and {len(more)} more)' if more else ''}"
        return ProofError(self.where, what, hazard.way_out, *others)

    def _begin(self, step: str) -> None:
        self._say(step)
        self._note(step)

    def _note(self, text: str) -> None:
        sys.stdout.write(f"{time.perf_counter() - self._started:7.2f} s  {text}\n")
        sys.stdout.flush()


def _device(version: ModelVersion) -> torch.device:
    if version.device == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if version.device == "cuda":
        raise TraceError(
            f"trace {version.label}",
            f"device is cuda, but PyTorch {torch.__version__} finds no GPU here",
            "use device: auto to trace on the CPU where there is no GPU, or install a PyTorch with CUDA",
        )
    return torch.device("cpu")


def _why(outcome: Verdict | TraceError) -> str:
    return outcome.what if isinstance(outcome, TraceError) else str(outcome.hazards[0])


def _tried(tried: list[tuple[str, Verdict | TraceError]]) -> dict[str, Any]:
    return {"tried": [{"candidate": name, "why_not": _why(outcome)} for name, outcome in tried]}


def _lines(tried: list[tuple[str, Verdict | TraceError]]) -> tuple[str, ...]:
    """Return the one line of advice that says why the other ways did not pass."""
    if not tried:
        return ()
    return ("also tried: " + "; ".join(f"{name}: {_why(outcome)}" for name, outcome in tried),)
