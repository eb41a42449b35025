"""Makes weights/resnet18.safetensors, the second version of the example's resnet18; the same bytes on every
machine.

    python -m zoo.make_weights weights/resnet18.safetensors

Stands in for a training run. pipeline.yaml pins the file's sha256, so the numbers must not depend on the
machine, the number of threads or the versions of torch and numpy: they are raw PCG64 words (a stream that
numpy promises to keep, NEP 19), turned to float32 by operations that IEEE 754 defines to the last bit.
Neither torch nor torchvision is needed.

Source for names and shapes: torchvision's resnet18; K. He et al., "Deep Residual Learning for Image
Recognition", CVPR 2016, table 1. Scale of the weights: K. He et al., "Delving Deep into Rectifiers", ICCV
2015.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

if TYPE_CHECKING:
    from collections.abc import Iterator

Array = NDArray[np.float32] | NDArray[np.int64]


def resnet18(seed: int) -> dict[str, Array]:
    """Return a state dict of torchvision's resnet18: its names, shapes and dtypes, numbers drawn from `seed`.

    Batch normalisation gets statistics, weights and biases that are neither 0 nor 1, so that a build that
    lost them would not give the same answers.
    """
    words = np.random.PCG64(seed)
    weights: dict[str, Array] = {}

    def uniform(name: str, shape: tuple[int, ...], low: float, high: float) -> None:
        # 24 random bits are a float32 without rounding; the product and the sum round once each.
        bits = (words.random_raw(math.prod(shape)) >> np.uint64(40)).astype(np.float32)
        weights[name] = (bits * np.float32((high - low) / 2**24) + np.float32(low)).reshape(shape)

    for name, shape in _convolutions():
        bound = math.sqrt(6 / math.prod(shape[1:]))
        uniform(f"{name}.weight", shape, -bound, bound)
        # torchvision names the normalisation of conv1 bn1, and that of downsample.0 downsample.1
        norm = name.replace("conv", "bn") if "conv" in name else name.replace("downsample.0", "downsample.1")
        uniform(f"{norm}.weight", shape[:1], 0.5, 0.75)
        uniform(f"{norm}.bias", shape[:1], -0.25, 0.25)
        uniform(f"{norm}.running_mean", shape[:1], -0.25, 0.25)
        uniform(f"{norm}.running_var", shape[:1], 0.5, 1.5)
        weights[f"{norm}.num_batches_tracked"] = np.array(1, dtype=np.int64)
    uniform("fc.weight", (1000, 512), -math.sqrt(3 / 512), math.sqrt(3 / 512))
    uniform("fc.bias", (1000,), -0.05, 0.05)
    return weights


def _convolutions() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape [out, in, height, width] of resnet18's convolutions."""
    yield "conv1", (64, 3, 7, 7)
    channels_in = 64
    for layer, channels in enumerate((64, 128, 256, 512), start=1):
        for block in (0, 1):
            name = f"layer{layer}.{block}"
            yield f"{name}.conv1", (channels, channels_in, 3, 3)
            yield f"{name}.conv2", (channels, channels, 3, 3)
            if channels_in != channels:
                yield f"{name}.downsample.0", (channels, channels_in, 1, 1)
            channels_in = channels


def main() -> None:
    """Write the file whole or not at all."""
    parser = argparse.ArgumentParser(description="Make the weights of resnet18's second version.")
    parser.add_argument("path", type=Path, help="the safetensors file to write")
    parser.add_argument("--seed", type=int, default=2)
    arguments = parser.parse_args()
    path: Path = arguments.path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(save(resnet18(arguments.seed)))
    unfinished.replace(path)


if __name__ == "__main__":
    main()
