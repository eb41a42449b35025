"""Weights files: what loads, what is refused, and that reading one runs no code."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from declared import Declared, Project
from safetensors.torch import save_file
from torch import nn

from tritonbuild.errors import TraceError

if TYPE_CHECKING:
    from pathlib import Path

NET = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.f(x))
"""


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {f"{name}.{key}": value for name, part in PARTS.items() for key, value in part.state_dict().items()}


PARTS = {"f": nn.Linear(4, 3), "norm": nn.BatchNorm1d(3)}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def declare(project: Project, name: str, sha256: str | None = None) -> Declared:
    return project.declare(NET, weights={"path": name, **({"sha256": sha256} if sha256 else {})})


def message(declared: Declared) -> str:
    with pytest.raises(TraceError) as refused:
        declared.builder()()
    return str(refused.value).removeprefix("trace m/1: ")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("w.safetensors", "plain"),
        ("w.pt", "plain"),
        ("w.pth", "plain"),
        ("w.pt", "in a checkpoint"),
        ("w.pt", "legacy"),
    ],
)
def test_a_state_dict_is_loaded(name: str, kind: str, project: Project) -> None:
    path = project.root / name
    if name.endswith(".safetensors"):
        save_file(state(), path)
    else:
        content: Any = {"state_dict": state(), "epoch": 3} if kind == "in a checkpoint" else state()
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    build = declare(project, name, digest).builder()

    for model in (build(), build()):
        assert all(torch.equal(value, state()[key]) for key, value in model.module.state_dict().items())
    # Models share nothing: what one does to its buffers reaches neither the next one nor the file.
    build().module.norm.running_mean.add_(1)
    assert torch.equal(build().module.norm.running_mean, state()["norm.running_mean"])
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest


STATE = "save it with torch.save(model.state_dict(), path), or as safetensors"


def test_no_such_file(project: Project) -> None:
    assert message(declare(project, "weights/w.pt")) == (
        "weights weights/w.pt: no such file\n    paths are relative to the folder of pipeline.yaml"
    )


def test_a_file_that_may_not_be_read(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    (project.root / "w.safetensors").write_bytes(b"")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    assert message(declare(project, "w.safetensors")) == "weights w.safetensors: may not be read by this user"


def test_another_digest_is_refused_before_the_file_is_read(project: Project) -> None:
    (project.root / "w.pt").write_bytes(b"anything")
    assert message(declare(project, "w.pt", "0" * 64)) == (
        f"weights w.pt: found sha256 {hashlib.sha256(b'anything').hexdigest()}, expected {'0' * 64}\n"
        "    the file is not the declared one; fetch it again, or declare the digest found if the change is wanted"
    )


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("code ran",))


def test_a_pickle_runs_no_code(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"f.weight": Evil()}, project.root / "w.pt")
    assert message(declare(project, "w.pt")) == (
        f"weights w.pt: it holds more than tensors, which would run code when it is read (print)\n    {STATE}"
    )
    assert "code ran" not in capsys.readouterr().out


def test_a_whole_model(project: Project) -> None:
    torch.save(nn.Linear(4, 3), project.root / "w.pt")
    assert message(declare(project, "w.pt")) == (
        "weights w.pt: it holds more than tensors, which would run code when it is read "
        f"(torch.nn.modules.linear.Linear)\n    {STATE}"
    )


def test_files_of_another_kind(project: Project) -> None:
    for name in ("w.pt", "w.safetensors"):
        (project.root / name).write_bytes(b"\x80\x02not weights at all, whatever the name says")
    assert message(declare(project, "w.safetensors")) == (
        f"weights w.safetensors: no safetensors file: Error while deserializing header: header too large\n    {STATE}"
    )
    assert message(declare(project, "w.pt")) == f"weights w.pt: it is no file that torch.save wrote\n    {STATE}"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([1, 2], "found list, expected a state dict"),
        ({}, "no state dict: it is empty"),
        ({"epoch": 3}, 'no state dict: "epoch" is int, expected a tensor'),
    ],
)
def test_no_state_dict(content: Any, what: str, project: Project) -> None:
    torch.save(content, project.root / "w.pt")
    assert message(declare(project, "w.pt")) == f"weights w.pt: {what}\n    {STATE}"


def test_weights_of_another_model(project: Project) -> None:
    other = state()
    other["f.weight"] = torch.zeros(3, 5)
    del other["norm.running_var"]
    other |= {f"head.{i}": torch.zeros(1) for i in range(5)}
    save_file(other, project.root / "w.safetensors")
    assert message(declare(project, "w.safetensors")) == (
        "weights w.safetensors do not fit Net: 1 missing: norm.running_var; "
        "5 unexpected: head.0, head.1, head.2 and 2 more; "
        "1 of another shape: f.weight is [3, 5], the model's is [3, 4]\n"
        "    the file holds 11 tensors, the model has 7: same architecture, same kwargs?"
    )


def test_weights_of_a_model_inside_data_parallel(project: Project) -> None:
    save_file({f"module.{key}": value for key, value in state().items()}, project.root / "w.safetensors")
    assert message(declare(project, "w.safetensors")).endswith(
        '\n    every name starts with "module.": save the state dict of the model inside DataParallel'
    )


RENAMED = """
class Net(nn.Module):
    _version = 2

    def __init__(self):
        super().__init__()
        self.new = nn.Linear(4, 3)

    def forward(self, x):
        return self.new(x)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        if local_metadata.get("version") is None:
            for key in ("weight", "bias"):
                if f"old.{key}" in state_dict:
                    state_dict[f"new.{key}"] = state_dict.pop(f"old.{key}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)
"""


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_module_may_know_the_names_of_its_older_versions(name: str, project: Project) -> None:
    # torchvision's ViT, RetinaNet and FPN do: the files that it publishes have the old names.
    old = {f"old.{key}": value for key, value in PARTS["f"].state_dict().items()}
    (save_file if name.endswith(".safetensors") else torch.save)(old, project.root / name)
    build = project.declare(RENAMED, weights={"path": name}).builder()
    for model in (build(), build()):
        assert torch.equal(model.module.new.weight, old["old.weight"])

    del old["old.bias"]
    (save_file if name.endswith(".safetensors") else torch.save)(old, project.root / name)
    assert message(project.declare(RENAMED, weights={"path": name})) == (
        f"weights {name} do not fit Net: 2 missing: new.weight, new.bias; 1 unexpected: old.weight\n"
        "    the file holds 1 tensors, the model has 2: same architecture, same kwargs?"
    )


LENIENT = """

    def load_state_dict(self, state_dict, *_, **__):
        found = super().load_state_dict(state_dict, strict=False)
        return {returned}
"""


@pytest.mark.parametrize("returned", ["found", "None"])
def test_a_module_that_loads_less_strictly_does_not_decide(returned: str, project: Project) -> None:
    incomplete = state()
    save_file(incomplete, project.root / "w.safetensors")
    source = NET.rstrip() + LENIENT.format(returned=returned)
    build = project.declare(source, weights={"path": "w.safetensors"}).builder()
    assert torch.equal(build().module.f.bias, incomplete.pop("f.bias"))

    save_file(incomplete, project.root / "w.safetensors")
    assert message(project.declare(source, weights={"path": "w.safetensors"})) == (
        "weights w.safetensors do not fit Net: 1 missing: f.bias\n"
        "    the file holds 6 tensors, the model has 7: same architecture, same kwargs?"
    )
