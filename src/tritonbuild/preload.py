"""What the fork server imports once for all children. Nothing here may touch CUDA: a forked CUDA context is broken."""

import os

# Read when torch loads OpenMP. Threads that spin while they wait take the cores from the ones that work: on two busy
# cores a proof took four times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: F401

import tritonbuild.trace
import tritonbuild.worker  # noqa: F401
