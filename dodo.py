"""The build of this project: `doit list` shows its tasks. Add your own below; the import alone is a whole dodo.py."""

import sys

from tritonbuild.graph import *  # noqa: F403


def task_weights():
    """make the weights of the example's second resnet18; stands in for a training run"""
    path = "weights/resnet18.safetensors"
    return {
        "actions": [[sys.executable, "-m", "zoo.make_weights", path]],
        "file_dep": ["src/zoo/make_weights.py"],
        "targets": [path],
        "clean": True,
    }
