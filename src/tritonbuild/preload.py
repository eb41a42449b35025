"""What the fork server does once for all children: imports, and the first use of what PyTorch sets up when it is used.

Nothing here may touch CUDA or start a thread: a forked CUDA context is broken, and threads do not survive a fork. All
that the children see of it is that they begin sooner: random state and settings are as after the imports alone.
"""

import contextlib
import gc
import io
import os

# Read when torch loads OpenMP. Threads that spin while they wait take the cores from the ones that work: on two busy
# cores a proof took four times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import safetensors.torch  # noqa: F401
import torch
import torch.utils._device
from torch import Tensor, nn

import tritonbuild.trace
import tritonbuild.worker
from tritonbuild.candidates import quiet


class _First(nn.Module):
    """A convolution and a product; of no class of torch.nn, whose names a child's model shall be the first to use."""

    def forward(self, image: Tensor, kernel: Tensor, weight: Tensor) -> Tensor:
        found = nn.functional.conv2d(image, kernel).relu().flatten(1)
        return nn.functional.linear(found, weight).softmax(1)


def warm() -> None:
    """Use TorchScript and the kernels of most models for the first time: a third of what a small model costs."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)  # or OpenMP starts its threads here, and the children wait for them for ever
    try:
        with quiet(), torch.no_grad():
            inputs = (torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3), torch.ones(2, 4 * 6 * 6))
            nn.Linear(4, 4)(nn.BatchNorm2d(4).eval()(nn.Conv2d(3, 4, 3)(inputs[0])).mean((2, 3)))
            written = io.BytesIO()
            torch.jit.save(torch.jit.trace(_First(), inputs, check_trace=False), written)  # type: ignore[no-untyped-call]
            written.seek(0)
            loaded = torch.jit.load(written)  # type: ignore[no-untyped-call]
            with torch.inference_mode():
                for _ in range(3):  # the profiling executor changes the code after the first call
                    loaded(*inputs)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


with contextlib.suppress(Exception):  # what fails here fails in the children, which say so
    warm()
tritonbuild.worker.remember_modules()
# The children's garbage collectors leave alone what is there now: to look at a page is to copy it.
gc.collect()
gc.freeze()
