"""Decides how the image runs under docker compose: docker/compose.yaml, and beside it what it refers to.

One service that runs everywhere; the GPU is in the same file when the declaration says `device: cuda`, and in
compose.gpu.yaml, to be added, when it says `auto`. Hides which compose tool checks the result: the plugin, the older
docker-compose, or, where there is neither, the JSON schema of the compose file format.

Source: github.com/compose-spec/compose-spec; docs.docker.com/compose/how-tos/gpu-support. compose-spec.json is the
    schema as published in docker-compose 1.29.2, Copyright Docker Inc., Apache License 2.0, unchanged.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from tritonbuild import image
from tritonbuild.errors import ImageError

if TYPE_CHECKING:
    from tritonbuild.spec import Pipeline

COMPOSE = "docker/compose.yaml"
_GPU_OVERRIDE = "docker/compose.gpu.yaml"
_GPU = """\
    deploy:
      resources:
        reservations:
          devices:
            - driver: nvidia
              count: all
              capabilities: [gpu]
"""


def files(pipeline: Pipeline) -> dict[str, str]:
    """Return path -> text for compose.yaml and what it refers to. They follow from the declaration alone."""
    declared = image.declared(pipeline)
    override = pipeline.device == "auto"
    texts = {
        COMPOSE: image.template(
            "compose.yaml",
            IMAGE=f"{declared.name}:{(declared.tags or ('latest',))[0]}",
            GPU=_GPU if pipeline.device == "cuda" else "",
            GPU_HINT=f"\n# A GPU is added by `-f {_GPU_OVERRIDE}`." if override else "",
        ),
        "docker/prometheus.yml": image.template("prometheus.yml"),
    }
    if override:
        texts[_GPU_OVERRIDE] = image.template("compose.gpu.yaml", GPU=_GPU.rstrip("\n"))
    return texts


def write(pipeline: Pipeline) -> str:
    """Write the files and check them; return what checked them.

    Raises:
        ImageError: See `check`.
    """
    texts = files(pipeline)
    for path, text in texts.items():
        image.write(pipeline.root / path, text)
    return check(pipeline.root, [path for path in texts if Path(path).name.startswith("compose")])


def check(root: Path, paths: list[str]) -> str:
    """Check the first compose file alone, and all of them together; return what checked them.

    Raises:
        ImageError: The compose tool, or the schema where there is none, refuses a file.
    """
    tool = compose_tool()
    if not tool:
        return _check_by_schema(root, paths)
    for chosen in (paths[:1], paths):
        command = [*tool, *(f"--file={path}" for path in chosen), "config", "--quiet"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ImageError(chosen[-1], f"{' '.join(tool)} refuses it: {done.stderr.strip()}")
    return " ".join(tool)


def compose_tool() -> list[str] | None:
    """Return the command of the compose tool: the plugin or the older program; None where there is neither."""
    if shutil.which("docker"):
        plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
        if plugin.returncode == 0:
            return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


def _check_by_schema(root: Path, paths: list[str]) -> str:
    import jsonschema  # type: ignore[import-untyped]

    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text())
    for path in paths:
        document = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (root / path).read_text()))
        for error in jsonschema.Draft201909Validator(schema).iter_errors(document):
            raise ImageError(path, f"{'.'.join(map(str, error.absolute_path))}: {error.message}")
    return "the compose schema"
