"""The build of this project: `doit list` shows its tasks. Add your own below; a dodo.py may be the first line alone."""

from tritonbuild.graph import *
