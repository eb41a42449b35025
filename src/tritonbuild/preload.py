"""What the fork server imports once for all children. Nothing here may touch CUDA: a forked CUDA context is broken."""

import torch  # noqa: F401

import tritonbuild.trace  # noqa: F401
import tritonbuild.worker  # noqa: F401
