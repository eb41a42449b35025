"""The one tree of errors that a user can mend.

    BuildError                 exit code 1: a task failed for a reason that the user can mend
    ├── SpecError              exit code 3: pipeline.yaml is not valid; every problem of the file at once
    ├── TraceError             an entry point, its weights or its TorchScript
    ├── ProofError             the TorchScript differs, or may differ, from eager
    ├── ConfigError            config.pbtxt cannot be what the declaration asks for
    ├── RepositoryError        models/ holds something that is not ours, or cannot be written
    ├── StoreError             the store of results; mostly a warning, never a wrong build
    ├── ServerError            a Triton server did not start, or not with this model
    ├── SmokeError             a served answer is not the proved one
    └── ImageError             the Docker image or its container

A text is `WHERE: WHAT` on one line, in lower case, no full stop, with the value found and the value expected;
then at most two indented lines that say what to do. Only `graph` prints one and turns it into an exit code. An
exception of any other kind is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class BuildError(Exception):
    """A failure that the user can mend.

    Args:
        where: The place: `pipeline.yaml:9: models.pnet.max_batchsize`, `trace resnet18/1`, `smoke pnet/1`.
        what: What is wrong there: the value found, the value expected.
        advice: What to do about it, at most two lines.
    """

    def __init__(self, where: str, what: str, *advice: str) -> None:
        super().__init__(where, what, *advice)
        self.where = where
        self.what = what
        self.advice = advice

    def __str__(self) -> str:
        return "\n    ".join([f"{self.where}: {self.what}", *self.advice])


class SpecError(BuildError):
    """pipeline.yaml is not valid. Built from all of its problems, in line order."""

    def __init__(self, problems: list[str]) -> None:
        Exception.__init__(self, problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


class TraceError(BuildError):
    """The entry point, its weights or its TorchScript."""


class ProofError(BuildError):
    """The TorchScript differs, or may differ, from eager somewhere in the declared axes."""


class ConfigError(BuildError):
    """config.pbtxt cannot be what the declaration asks for."""


class RepositoryError(BuildError):
    """models/ holds something that is not ours, or cannot be written."""


class StoreError(BuildError):
    """The store of results. Mostly shown as a warning: a store that is down never fails a build."""


class ServerError(BuildError):
    """A Triton server did not start, or not with this model."""


class SmokeError(BuildError):
    """A served answer is not the proved one."""


class ImageError(BuildError):
    """The Docker image or its container."""
