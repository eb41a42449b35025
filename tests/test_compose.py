"""docker/compose.yaml: what it says, that the compose tool and the schema accept it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from tritonbuild import compose, spec
from tritonbuild.errors import ImageError

if TYPE_CHECKING:
    from tritonbuild.spec import Pipeline

ROOT = Path(__file__).parent.parent
MODELS = "models: {a: {entry_point: 'nets:A', inputs: {x: {dtype: float32, shape: [1, 4]}}}}\n"


def _pipeline(root: Path, head: str) -> Pipeline:
    (root / "pipeline.yaml").write_text(f'triton: "26.07"\n{head}\n{MODELS}')
    return spec.load(root / "pipeline.yaml")


def test_the_committed_files_are_current() -> None:
    for path, text in compose.files(spec.load(ROOT / "pipeline.yaml")).items():
        assert (ROOT / path).read_text() == text, f"{path} is not current: `doit compose` writes it"


@pytest.mark.parametrize(
    ("device", "files"),
    [
        ("auto", {"docker/compose.yaml", "docker/compose.gpu.yaml", "docker/prometheus.yml"}),
        ("cuda", {"docker/compose.yaml", "docker/prometheus.yml"}),
        ("cpu", {"docker/compose.yaml", "docker/prometheus.yml"}),
    ],
)
def test_the_gpu_is_where_the_device_says(tmp_path: Path, device: str, files: set[str]) -> None:
    texts = compose.files(_pipeline(tmp_path, f"device: {device}\nimage: {{name: vision}}"))
    assert set(texts) == files
    gpu = {"resources": {"reservations": {"devices": [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]}}}
    with_gpu = [
        path for path in texts if yaml.safe_load(texts[path]).get("services", {}).get("triton", {}).get("deploy") == gpu
    ]
    assert with_gpu == {"auto": ["docker/compose.gpu.yaml"], "cuda": ["docker/compose.yaml"], "cpu": []}[device]


def test_the_service_is_closed_by_default(tmp_path: Path) -> None:
    text = compose.files(_pipeline(tmp_path, "image: {name: team/vision, tags: [v2, latest]}"))["docker/compose.yaml"]
    services = yaml.safe_load(text)["services"]
    for name in ("triton", "prometheus"):
        assert {key: services[name].get(key) for key in ("read_only", "cap_drop", "security_opt")} == {
            "read_only": True,
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges:true"],
        }, name
        assert {"mem_limit", "pids_limit"} <= services[name].keys(), name
        assert all("127.0.0.1" in port for port in services[name]["ports"]), name
    service = services["triton"]
    assert service["image"] == "${IMAGE:-team/vision:v2}"
    assert all(port.startswith("${TRITON_BIND:-127.0.0.1}:") for port in service["ports"])
    assert {key: service[key] for key in ("user", "restart")} == {"user": "1000:1000", "restart": "unless-stopped"}


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_the_schema_accepts_it_without_a_tool(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compose.write(_pipeline(tmp_path, f"device: {device}\nimage: {{name: vision}}")) == "the compose schema"


def test_the_schema_refuses_what_compose_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "compose.yaml").write_text("services: {triton: {image: vision, restart: always, port: [80]}}\n")
    with pytest.raises(ImageError) as raised:
        compose.check(tmp_path, ["compose.yaml"])
    assert str(raised.value) == ("compose.yaml: services.triton: 'port' does not match any of the regexes: '^x-'")


@pytest.mark.docker
class TestTool:
    def test_it_accepts_each_combination(self, tmp_path: Path, compose_tool: list[str]) -> None:
        pipeline = _pipeline(tmp_path, "image: {name: vision}")
        assert compose.write(pipeline) == " ".join(compose_tool)
        written = (tmp_path / "docker" / "compose.yaml").stat().st_mtime_ns
        compose.write(pipeline)
        assert (tmp_path / "docker" / "compose.yaml").stat().st_mtime_ns == written

    def test_its_refusal_is_shown(self, tmp_path: Path, compose_tool: list[str]) -> None:
        (tmp_path / "compose.yaml").write_text("services: {triton: {image: vision, port: [80]}}\n")
        with pytest.raises(ImageError) as raised:
            compose.check(tmp_path, ["compose.yaml"])
        assert str(raised.value).startswith(f"compose.yaml: {' '.join(compose_tool)} refuses it: ")
        assert "port" in str(raised.value)


def test_there_is_no_tool_without_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("docker") is None
    assert compose.compose_tool() is None
