"""Decides what a Docker image of the model repository consists of: its layers, its labels, its names.

One layer per model version, so that one changed model of fifty moves one layer. Hides what makes a layer's digest the
same on every machine and with both builders: each layer is a tar file in .build/context, equal bytes for equal
content, which the Dockerfile unpacks with ADD. COPY cannot do it: folders that it makes, and with BuildKit also
those that it copies, get the time of the build (measured). The tar file's own time follows from its content:
BuildKit takes a file of equal size and time for unchanged and does not read it again.

Source: measured on Docker 20.10 with the classic builder and BuildKit; docs.docker.com/reference/dockerfile;
    Triton's docs/customization_guide/deploy.md for the server's flags; the OCI image specification's annotations.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from tritonbuild import docker, keys, repository, spec, state
from tritonbuild.errors import BuildError, ImageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tritonbuild.spec import Image, Pipeline

DOCKERFILE = "docker/Dockerfile"
CONTEXT = ".build/context"
_RECORD = ".build/image.json"
_LOG = ".build/log/image.log"

# An engine stacks 125 layers (maxLayerDepth in moby). The rest is for the base image, NVIDIA's has some dozens, and
# for what a user builds on top.
_MOST_VERSION_LAYERS = 64
_MOST_LAYERS = 125


class Layer(NamedTuple):
    """One ADD of the Dockerfile."""

    name: str
    """Its tar file in the build context, without the suffix."""
    versions: tuple[str, ...]
    """The model versions in it: `pnet/1`; none in the layer of the configs."""


def layers(pipeline: Pipeline) -> list[Layer]:
    """Return the layers in the order of the Dockerfile: model versions sorted by name, the configs last.

    Beyond 64 model versions they are dealt out to 64 layers by a digest of their label: a version that is added or
    removed then changes the layer that it is in, and no other.
    """
    labels = [
        f"{name}/{number}" for name, model in sorted(pipeline.models.items()) for number in sorted(model.versions)
    ]
    if len(labels) <= _MOST_VERSION_LAYERS:
        return [*(Layer(f"versions/{label}", (label,)) for label in labels), Layer("configs", ())]
    groups: dict[int, list[str]] = {}
    for label in labels:
        groups.setdefault(int(sha256(label.encode()).hexdigest(), 16) % _MOST_VERSION_LAYERS, []).append(label)
    return [*(Layer(f"groups/{group:02}", tuple(groups[group])) for group in sorted(groups)), Layer("configs", ())]


def dockerfile(pipeline: Pipeline) -> str:
    """Return the text of docker/Dockerfile. It follows from the declaration alone."""
    adds = []
    for layer in layers(pipeline)[:-1]:
        if layer.name.startswith("groups/"):
            adds.append(f"# {' '.join(layer.versions)}")
        adds.append(f"ADD {layer.name}.tar /")
    return template("Dockerfile", NAME=declared(pipeline).name, RELEASE=pipeline.triton, VERSIONS="\n".join(adds))


def template(name: str, **values: str) -> str:
    """Return a file of templates/ with each `@NAME@` replaced by its value."""
    text = (Path(__file__).parent / "templates" / name).read_text()
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


def declared(pipeline: Pipeline) -> Image:
    """Return what the declaration says of the image.

    Raises:
        ImageError: It says nothing.
    """
    if pipeline.image is None:
        raise ImageError("image", f"{pipeline.path.name} declares no image", "add: image: {name: vision}")
    return pipeline.image


def base_image(pipeline: Pipeline) -> str:
    """Return the base: TRITON_IMAGE of the environment, like the Dockerfile's ARG, or NVIDIA's image of the release."""
    return os.environ.get("TRITON_IMAGE") or f"nvcr.io/nvidia/tritonserver:{pipeline.triton}-py3"


def names(pipeline: Pipeline, tag: str) -> list[str]:
    """Return all names that the image gets: the digest first, then the declared tags, or `latest`."""
    image = declared(pipeline)
    return [f"{image.name}:{tag}" for tag in (tag, *(image.tags or ("latest",)))]


# -------------------------------------------------------------------------------------------- the build context


def stage(pipeline: Pipeline) -> dict[str, dict[str, str]]:
    """Write docker/Dockerfile and the build context: a tar file for each layer, made again only when it changed.

    Returns:
        Name of each layer -> path in the image -> sha256 of the file.

    Raises:
        ImageError: A declared model version has no files in models/.
    """
    root = pipeline.root
    write(root / DOCKERFILE, dockerfile(pipeline))
    contents = _contents(pipeline)
    wanted = set()
    for name, files in contents.items():
        tar = root / CONTEXT / f"{name}.tar"
        wanted.add(tar)
        try:
            _pack(root, tar, files)
        except OSError as error:
            what = f"{CONTEXT}/{name}.tar cannot be written: {(error.strerror or str(error)).lower()}"
            raise ImageError("image", what, "the build context takes as much room as models/") from None
    for path in (root / CONTEXT).rglob("*"):
        if path not in wanted and not path.is_dir():
            path.unlink()
    return contents


def write(path: Path, text: str) -> None:
    """Write a generated file, unless it is that already."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _contents(pipeline: Pipeline) -> dict[str, dict[str, str]]:
    layer_of = {label: layer.name for layer in layers(pipeline) for label in layer.versions}
    contents: dict[str, dict[str, str]] = {layer.name: {} for layer in layers(pipeline)}
    files = [f"models/{path}" for path in repository.content(pipeline.root)]
    for path, digest in keys.file_digests(pipeline.root, files).items():
        model, part = path.split("/")[1:3]
        name = layer_of.get(f"{model}/{part}", "" if part.isdigit() else "configs")
        if digest and name and model in pipeline.models:
            contents[name][path] = digest
    for label, name in layer_of.items():
        if not any(path.startswith(f"models/{label}/") for path in contents[name]):
            raise ImageError("image", f"models/{label} is missing", f"`doit trace:{label}` makes it")
    return contents


_EPOCH = 315_532_800  # 1980-01-01, before which some file systems know no time


def _pack(root: Path, target: Path, files: Mapping[str, str]) -> None:
    """Write a layer's tar file, unless it has the size and the time that follow from this content."""
    seconds = _EPOCH + int(keys.digest(files), 16) % 2**30
    if target.exists() and target.stat().st_mtime == seconds:
        return
    new = target.with_suffix(".new")
    new.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(new, "w", format=tarfile.GNU_FORMAT) as tar:
        folders = {parent.as_posix() for path in files for parent in PurePosixPath(path).parents[:-1]}
        for path in sorted({"models", *folders, *files}):
            entry = tarfile.TarInfo(path)
            entry.uid = entry.gid = 1000
            entry.mtime = _EPOCH
            if path not in files:
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(entry)
                continue
            with (root / path).open("rb") as file:
                entry.size, entry.mode = os.fstat(file.fileno()).st_size, 0o644
                tar.addfile(entry, file)
    os.utime(new, (seconds, seconds))
    new.replace(target)


# Releases before the first are open to what follows. 25.07: NVIDIA's bulletin 5687, cited by its maintainers in
# triton-inference-server/pytriton#108. 26.04: projects that moved there because of bulletin 5828 say so; unconfirmed.
_FLOORS = (
    ("25.07", "CVE-2025-23310, -23311, -23319, -23320 and -23334: code execution from the network", "fixed"),
    ("26.04", "CVE-2026-24206 to -24209: access without login, denial of service", "said to be fixed"),
)


def release_warnings(pipeline: Pipeline) -> list[str]:
    """Return one line for each security fix that the declared Triton release is too old for."""
    place = spec.place(pipeline.path, ("triton",))
    return [
        f'{place}: "{pipeline.triton}" is open to {what}; {state} in {floor}'
        for floor, what, state in _FLOORS
        if pipeline.triton < floor
    ]


def record(pipeline: Pipeline) -> dict[str, Any] | None:
    """Return what .build/image.json says of the image that was built last, or None."""
    try:
        found = json.loads((pipeline.root / _RECORD).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def why(pipeline: Pipeline) -> str | None:
    """Return the first reason to build the image, or None when it is up to date and in the engine."""
    known = record(pipeline)
    if known is None:
        return "never built on this machine"
    # A base that was removed after the build is not pulled again to find out that nothing has changed.
    base = _image_id(base_image(pipeline)) or (known["base"]["name"] == base_image(pipeline) and known["base"]["id"])
    try:
        difference = keys.difference(known["parts"], _parts(pipeline, _contents(pipeline), base))
    except ImageError as error:
        return error.what
    if difference:
        return difference
    wanted = names(pipeline, known["tag"])
    ids = docker.ask("image", "inspect", "--format", "{{.Id}}", *wanted).printed.split()
    if ids != [known["image"]] * len(wanted):
        return f"{' or '.join(wanted)} is not in the engine, or is another image"
    pushed = known["pushed"] == wanted or not declared(pipeline).push
    return None if pushed else f"{' and '.join(wanted)} not pushed yet"


def build(pipeline: Pipeline) -> dict[str, Any]:
    """Build the image, give it its names, and push it where that is declared.

    Returns:
        What is written to .build/image.json: `image` (its id), `tag`, `tags` (all names), `base`, `bytes` (added to
        the base), `layers` [{`content`, `digest`, `bytes`, `new`}], `pushed`, and `parts`, from which the tag follows.

    Raises:
        ImageError: The base is missing, the disk is full, the engine is gone, the registry refuses, ...
    """
    where = f"image {declared(pipeline).name}"
    contents = stage(pipeline)
    base = base_image(pipeline)
    base_id = _image_id(base) or _pull(pipeline, where, base)
    below = _layer_digests(where, base_id)
    if len(below) + len(contents) > _MOST_LAYERS:
        raise ImageError(
            where,
            f"{base} has {len(below)} layers and {len(contents)} are added, more than the {_MOST_LAYERS} of an engine",
            "take a base image with fewer layers",
        )
    parts = _parts(pipeline, contents, base_id)
    tag = keys.digest(parts)[:12]
    wanted = names(pipeline, tag)
    docker.run(where, _build_command(pipeline, contents, base, parts, wanted), pipeline.root / _LOG)
    built_id = _image_id(wanted[0])
    if not built_id:
        raise ImageError(
            where, "was built, but is not in the engine", "the builder keeps its results: `docker buildx use default`"
        )
    digests = _layer_digests(where, built_id)[len(below) :]
    known = record(pipeline) or {"layers": [], "pushed": []}
    before = {layer["digest"] for layer in known["layers"]}
    made = {
        "image": built_id,
        "tag": tag,
        "tags": wanted,
        "base": {"name": base, "id": base_id},
        "bytes": sum(_bytes(pipeline, files) for files in contents.values()),
        "layers": [
            {"content": name, "digest": digest, "bytes": _bytes(pipeline, files), "new": digest not in before}
            for (name, files), digest in zip(contents.items(), digests, strict=True)
        ],
        "pushed": known["pushed"] if known["pushed"] == wanted else [],
        "parts": parts,
    }
    _remember(pipeline, made)
    return push(pipeline) if declared(pipeline).push else made


def push(pipeline: Pipeline) -> dict[str, Any]:
    """Push the image under all of its names; layers that the registry has are not sent again.

    Raises:
        ImageError: The registry refuses or cannot be reached; or nothing was built.
    """
    made = record(pipeline)
    where = f"image {declared(pipeline).name}"
    if made is None:
        raise ImageError(where, "no image was built", "`doit image` builds it")
    for name in made["tags"]:
        docker.run(f"push {name}", ["push", name], pipeline.root / _LOG)
    made["pushed"] = made["tags"]
    _remember(pipeline, made)
    return made


def summary(made: Mapping[str, Any]) -> str:
    """Return what a build has done, in one line."""
    new = [layer for layer in made["layers"] if layer["new"]]
    moved = sum(layer["bytes"] for layer in new) / 1e6
    pushed = ", pushed" if made["pushed"] else ""
    return f"{made['tags'][0]}: {len(new)} of {len(made['layers'])} layers new, {moved:.1f} MB{pushed}"


def _parts(pipeline: Pipeline, contents: Mapping[str, Mapping[str, str]], base_id: str | bool) -> keys.Parts:
    """Return all that the image consists of. Revision and source are labels alone: a commit is no new image."""
    return {
        "dockerfile": sha256(dockerfile(pipeline).encode()).hexdigest(),
        "base": base_id,
        "files": {path: digest for files in contents.values() for path, digest in files.items()},
    }


def _build_command(
    pipeline: Pipeline, contents: Mapping[str, Mapping[str, str]], base: str, parts: keys.Parts, wanted: list[str]
) -> list[str]:
    labels = {
        "org.opencontainers.image.version": wanted[0].rpartition(":")[2],
        "org.opencontainers.image.base.digest": parts["base"],
        **_origin(pipeline.root),
        "tritonbuild.pipeline": keys.digest(pipeline.model_dump(mode="json")),
        "tritonbuild.repository": keys.digest(parts["files"]),
    }
    for files in contents.values():
        for path, digest in files.items():
            if path.endswith((".pt", ".pbtxt")):
                labels[f"tritonbuild.{path}"] = f"sha256:{digest}"
    return [
        "build",
        *(["--format=docker"] if docker.is_podman() else []),  # the OCI format has no HEALTHCHECK
        f"--file={pipeline.root / DOCKERFILE}",
        f"--build-arg=TRITON_IMAGE={base}",
        *(f"--label={key}={value}" for key, value in labels.items()),
        *(f"--tag={name}" for name in wanted),
        str(pipeline.root / CONTEXT),
    ]


def _origin(root: Path) -> dict[str, str]:
    """Return the labels for the commit and the address of the source, without a password that may be in it."""
    labels = {}
    for label, command in (
        ("org.opencontainers.image.revision", ["describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]),
        ("org.opencontainers.image.source", ["config", "--get", "remote.origin.url"]),
    ):
        try:
            done = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return {}
        if done.returncode == 0:
            labels[label] = re.sub(r"(?<=://)[^/@]*@", "", done.stdout.strip())
    return labels


def _pull(pipeline: Pipeline, where: str, base: str) -> str:
    print(f"   pulling {base}; {_LOG} shows how far it is", flush=True)
    docker.run(f"{where}: base {base}", ["pull", base], pipeline.root / _LOG)
    return _image_id(base)


def _image_id(name: str) -> str:
    """Return the id of an image in the engine, or nothing."""
    return docker.ask("image", "inspect", "--format", "{{.Id}}", name).printed.strip()


def _layer_digests(where: str, image: str) -> list[str]:
    done = docker.ask("image", "inspect", "--format", "{{json .RootFS.Layers}}", image)
    if done.code:
        raise docker.complaint(where, done.complaint, ImageError)
    digests: list[str] = json.loads(done.printed)
    return digests


def _bytes(pipeline: Pipeline, files: Mapping[str, str]) -> int:
    return sum((pipeline.root / path).stat().st_size for path in files)


def _remember(pipeline: Pipeline, made: Mapping[str, Any]) -> None:
    path = pipeline.root / _RECORD
    new = path.with_suffix(".new")
    new.write_text(json.dumps(made, indent=2) + "\n")
    new.replace(path)


if __name__ == "__main__":  # writes the build context where there is no engine, for another builder
    try:
        _pipeline = spec.load(Path((sys.argv[1:] or ["pipeline.yaml"])[0]))
        state.State(str(_pipeline.root / ".build" / "state.sqlite"))
        stage(_pipeline)
    except BuildError as _error:
        sys.exit(f"ERROR: {_error}")
    sys.stdout.write(f"docker build -f {DOCKERFILE} -t {declared(_pipeline).name} {CONTEXT}\n")
