"""Decides how a model is called: eager as in PyTorch, TorchScript as Triton calls it; seeded, under fixed settings.

Hides the settings that make equal calls differ on a GPU, what an exception says, and whether a call has changed its
inputs.

Source: the PyTorch backend's instance (inference mode, no gradients, optimized execution); torch.backends.
"""

from __future__ import annotations

import contextlib
import math
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tritonbuild import memory
from tritonbuild.monitors import Site, first_party

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SEED = 0x5EED
"""Set before every call, eager and TorchScript; not 0, which models set themselves."""


@dataclass(frozen=True)
class Failure:
    """What a call raised; `memory` when only memory was short; the line of model code that it came from."""

    text: str
    memory: bool = False
    where: Site | None = None


Answer = tuple[Tensor, ...] | Failure


class Watch:
    """How long a search has lasted, for limits of our own: what it finds must not depend on what else a machine does.

    Counted is the work of this thread; a wait, for a GPU or for other programs, counts for a quarter.
    """

    def __init__(self) -> None:
        self._worked, self._passed = time.thread_time(), time.perf_counter()

    @property
    def s(self) -> float:
        """Seconds."""
        return max(time.thread_time() - self._worked, (time.perf_counter() - self._passed) / 4)


@contextlib.contextmanager
def settings(device: str) -> Iterator[None]:
    """Fix what makes equal calls differ on a GPU: TensorFloat-32, and cuDNN's choice of algorithms."""
    if not device.startswith("cuda"):
        yield
        return
    with (
        _without_tf32(),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
    ):
        yield


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Set both of PyTorch's switches for it, and put them back: where they disagree, to read the older one raises."""
    parts: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    older = []
    for part in parts:
        with contextlib.suppress(RuntimeError):
            older.append((part, part.allow_tf32))
    if hasattr(torch.backends, "fp32_precision"):  # from 2.9 on; a model's code may have set it
        cudnn: Any = torch.backends.cudnn
        newer = [(part, part.fp32_precision) for part in (torch.backends, cudnn, parts[0], cudnn.conv, cudnn.rnn)]
    else:
        newer = []
    for part, _ in newer:
        part.fp32_precision = "ieee"
    for part in parts:
        part.allow_tf32 = False
    try:
        yield
    finally:
        for part, allowed in older:
            part.allow_tf32 = allowed
        for part, precision in newer:
            part.fp32_precision = precision


def failure(error: BaseException) -> Failure:
    """Return what an exception says, on one line."""
    text = str(error).strip()
    short = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in text
    lines = text.splitlines() or [""]
    # TorchScript puts the tracebacks of its own code in front of the reason.
    line = lines[-1] if "TorchScript interpreter" in text else lines[0]
    frames = [(frame.f_code.co_filename, at) for frame, at in traceback.walk_tb(error.__traceback__)]
    own = [Site(file, at) for file, at in frames if first_party(file)]
    said = line if "Error: " in line else f"{type(error).__name__}: {line}".rstrip(": ")
    return Failure(said, short, own[-1] if own else None)


def eager(module: Callable[..., Any], inputs: Sequence[Tensor], device: str, seed: int = SEED) -> tuple[Tensor, ...]:
    """Call eager once, seeded, without gradients; the outputs share no memory with anything."""
    memory.seed_all(seed)
    with torch.no_grad(), settings(device):
        return _own(module(*inputs))


def torchscript(module: Callable[..., Any], inputs: Sequence[Tensor], device: str) -> Answer:
    """Call TorchScript once as the server does, with the seed of eager; return what it raises instead of raising it."""
    dtype = torch.get_default_dtype()
    memory.seed_all(SEED)
    torch.set_default_dtype(torch.float32)  # the server's, whatever the entry point has set here
    try:
        with torch.inference_mode(), settings(device):
            return _own(module(*inputs))
    except Exception as error:  # noqa: BLE001 (TorchScript raises what its operators raise)
        return failure(error)
    finally:
        torch.set_default_dtype(dtype)


def _own(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(output.detach().clone() for output in ((outputs,) if isinstance(outputs, Tensor) else outputs))


class Unchanged:
    """Tells whether a call has changed its inputs."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.versions = [tensor._version for tensor in inputs]
        # numpy writes past torch's counter: small inputs are compared as well.
        small = sum(tensor.numel() for tensor in inputs) <= 2**25
        self.copies = [tensor.clone() for tensor in inputs] if small else None

    def broken(self, inputs: Sequence[Tensor]) -> int | None:
        """Return the index of an input that was changed, or None."""
        for i, tensor in enumerate(inputs):
            if tensor._version != self.versions[i]:
                before = self.copies[i] if self.copies else None
                if before is None or not _equal(before, tensor):
                    return i
            elif self.copies is not None and not _equal(self.copies[i], tensor):
                return i
        return None


def _equal(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    return torch.equal(one, two) or bool(((one == two) | ((one != one) & (two != two))).all())


def available_bytes(device: str) -> float:
    """Return the memory that tensors on the device can still take; infinity when it is not known."""
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf
    return kilobytes * 1024.0
