"""The layout of models/: what is ours, what is refused, and that no reader, kill or full disk sees half a file."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tritonbuild import repository
from tritonbuild.errors import RepositoryError

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = b'name: "pnet"\n'


def publish_pnet(root: Path) -> None:
    repository.publish(root, "pnet", {"model.pt": b"one"}, version=1)
    repository.publish(root, "pnet", {"model.pt": b"two"}, version=2)
    repository.publish(root, "pnet", {"config.pbtxt": CONFIG, "labels.txt": b"a\nb\n", "warmup/image": b"\0" * 8})


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, links by where they lead."""
    return {
        path.relative_to(folder).as_posix(): str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    }


MARKER = b"""\
# tritonbuild wrote the files below; it replaces and removes them, and no others.
1/model.pt
2/model.pt
config.pbtxt
labels.txt
warmup/image
"""

PNET = {
    "pnet/.tritonbuild": MARKER,
    "pnet/1/model.pt": b"one",
    "pnet/2/model.pt": b"two",
    "pnet/config.pbtxt": CONFIG,
    "pnet/labels.txt": b"a\nb\n",
    "pnet/warmup/image": b"\0" * 8,
}


def test_what_is_published_is_there_and_nothing_else(tmp_path: Path) -> None:
    publish_pnet(tmp_path)
    assert tree(tmp_path / "models") == PNET
    assert repository.content(tmp_path) == {
        name: tmp_path / "models" / name for name in sorted(PNET) if not name.endswith(".tritonbuild")
    }
    repository.check(tmp_path)
    assert repository.prune(tmp_path, {"pnet": {1, 2}}) == []
    assert tree(tmp_path / "models") == PNET


def test_a_file_is_copied_and_its_source_left_alone(tmp_path: Path) -> None:
    source = tmp_path / "built.pt"
    source.write_bytes(b"weights" * 1000)
    repository.publish(tmp_path, "pnet", {"model.pt": source}, version=7)
    copy = tmp_path / "models/pnet/7/model.pt"
    assert copy.read_bytes() == source.read_bytes()
    assert not copy.samefile(source)


def test_a_result_that_nobody_may_write_is_linked_and_survives_being_replaced(tmp_path: Path) -> None:
    source = tmp_path / "stored.pt"
    source.write_bytes(b"stored")
    source.chmod(0o444)
    target = tmp_path / "models/pnet/1/model.pt"
    for _ in range(2):
        repository.publish(tmp_path, "pnet", {"model.pt": source}, version=1)
        assert target.samefile(source)
    repository.publish(tmp_path, "pnet", {"model.pt": b"another"}, version=1)
    assert (source.read_bytes(), target.read_bytes()) == (b"stored", b"another")
    repository.prune(tmp_path, {})
    assert source.exists()


def test_a_file_of_the_user_that_nobody_may_write_is_copied(tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_bytes(b"cat")
    labels.chmod(0o444)
    repository.publish(tmp_path, "pnet", {"labels.txt": labels})
    labels.chmod(0o644)
    labels.write_bytes(b"dog")
    assert (tmp_path / "models/pnet/labels.txt").read_bytes() == b"cat"


def test_publishing_again_replaces_its_part_and_no_other(tmp_path: Path) -> None:
    publish_pnet(tmp_path)
    repository.publish(tmp_path, "pnet", {"model.pt": b"new"}, version=2)
    repository.publish(tmp_path, "pnet", {"config.pbtxt": b"new"})
    assert tree(tmp_path / "models") == {
        "pnet/.tritonbuild": b"\n".join(MARKER.split(b"\n")[:4]) + b"\n",
        "pnet/1/model.pt": b"one",
        "pnet/2/model.pt": b"new",
        "pnet/config.pbtxt": b"new",
    }
    assert not (tmp_path / "models/pnet/warmup").exists()


def test_a_version_that_loses_a_file_loses_only_that(tmp_path: Path) -> None:
    repository.publish(tmp_path, "pnet", {"model.pt": b"one", "extra.bin": b"more"}, version=1)
    repository.publish(tmp_path, "pnet", {"model.pt": b"one"}, version=1)
    assert list(repository.content(tmp_path)) == ["pnet/1/model.pt"]


def test_same_bytes_are_not_touched_so_a_polling_server_does_not_reload(tmp_path: Path) -> None:
    publish_pnet(tmp_path)
    files = [path for path in (tmp_path / "models").rglob("*") if path.is_file()]
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}
    source = tmp_path / "same.pt"
    source.write_bytes(b"two")
    publish_pnet(tmp_path)
    repository.publish(tmp_path, "pnet", {"model.pt": source}, version=2)
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files} == before


def test_a_file_edited_by_hand_is_written_again(tmp_path: Path) -> None:
    publish_pnet(tmp_path)
    (tmp_path / "models/pnet/config.pbtxt").write_bytes(b'name: "edit"\n')
    (tmp_path / "models/pnet/1/model.pt").unlink()
    publish_pnet(tmp_path)
    assert tree(tmp_path / "models") == PNET


@pytest.mark.parametrize("name", ["# labels.txt", "labels (1).txt", "Größe.txt", " "])
def test_a_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    for text in (b"a", b"b"):
        repository.publish(tmp_path, "pnet", {name: text})
        repository.check(tmp_path)
    assert repository.content(tmp_path) == {f"pnet/{name}": tmp_path / "models/pnet" / name}
    repository.publish(tmp_path, "pnet", {"config.pbtxt": CONFIG})
    assert tree(tmp_path / "models/pnet").keys() == {".tritonbuild", "config.pbtxt"}


# What is not ours


def refused(path: str, what: str = "not written by tritonbuild", *, declared: str = "") -> str:
    advice = (
        f'move it away, or give the model "{declared}" of pipeline.yaml another name'
        if declared
        else "models/ is generated, and Triton serves what it finds there: move it away"
    )
    return f"{path}: {what}\n    {advice}"


def test_a_foreign_folder_with_a_declared_name_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "models/pnet/1").mkdir(parents=True)
    (tmp_path / "models/pnet/1/model.pt").write_bytes(b"by hand")
    with pytest.raises(RepositoryError) as caught:
        repository.publish(tmp_path, "pnet", {"model.pt": b"one"}, version=1)
    assert str(caught.value) == refused("models/pnet", declared="pnet")
    assert tree(tmp_path / "models") == {"pnet/1/model.pt": b"by hand"}


def test_all_foreign_folders_are_named_at_once_hidden_ones_too(tmp_path: Path) -> None:
    publish_pnet(tmp_path)
    for name in ("other", ".ipynb_checkpoints", "third", "fourth", "fifth"):
        (tmp_path / "models" / name).mkdir()
        (tmp_path / "models" / name / "config.pbtxt").write_bytes(b"")
    before = tree(tmp_path / "models")
    for action in (repository.check, lambda root: repository.prune(root, {"pnet": {1, 2}})):
        with pytest.raises(RepositoryError) as caught:
            action(tmp_path)
        assert str(caught.value) == refused(
            "models/.ipynb_checkpoints",
            "not written by tritonbuild; nor models/fifth, models/fourth, models/other and more",
        )
    assert tree(tmp_path / "models") == before


@pytest.mark.parametrize("path", ["pnet/3/model.pt", "pnet/1/notes.txt", "pnet/notes.txt", "pnet/configs/gpu.pbtxt"])
def test_a_foreign_file_in_our_folder_is_refused_and_kept(tmp_path: Path, path: str) -> None:
    publish_pnet(tmp_path)
    file = tmp_path / "models" / path
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"by hand")
    for action in (repository.check, lambda root: repository.prune(root, {})):
        with pytest.raises(RepositoryError) as caught:
            action(tmp_path)
        assert str(caught.value) == refused(f"models/{path}")
    assert tree(tmp_path / "models") == {**PNET, path: b"by hand"}


def test_an_empty_folder_with_a_number_would_be_a_version_to_triton(tmp_path: Path) -> None:
    publish_pnet(tmp_path)
    (tmp_path / "models/pnet/9").mkdir()
    with pytest.raises(RepositoryError) as caught:
        repository.check(tmp_path)
    assert str(caught.value) == refused("models/pnet/9")


def test_a_foreign_file_in_the_way_of_a_new_version_is_refused_and_kept(tmp_path: Path) -> None:
    publish_pnet(tmp_path)
    (tmp_path / "models/pnet/3").mkdir()
    (tmp_path / "models/pnet/3/model.pt").write_bytes(b"by hand")
    with pytest.raises(RepositoryError) as caught:
        repository.publish(tmp_path, "pnet", {"model.pt": b"three"}, version=3)
    assert str(caught.value) == (
        "models/pnet/3/model.pt: not written by tritonbuild\n"
        "    it is in the way of a file that pipeline.yaml declares: move it away"
    )
    assert tree(tmp_path / "models") == {**PNET, "pnet/3/model.pt": b"by hand"}


def test_plain_files_beside_the_models_and_hidden_files_within_are_left_alone(tmp_path: Path) -> None:
    publish_pnet(tmp_path)
    for path in ("README.md", "pnet/.DS_Store", "pnet/1/.model.pt.swp"):
        (tmp_path / "models" / path).write_bytes(b"mine")
    before = tree(tmp_path / "models")
    digest = repository.digest(tmp_path)
    repository.check(tmp_path)
    assert repository.prune(tmp_path, {"pnet": {1, 2}}) == []
    assert tree(tmp_path / "models") == before
    for path in ("README.md", "pnet/.DS_Store", "pnet/1/.model.pt.swp"):
        (tmp_path / "models" / path).unlink()
    assert repository.digest(tmp_path) == digest


def test_an_empty_folder_with_a_declared_name_is_taken(tmp_path: Path) -> None:
    (tmp_path / "models/pnet").mkdir(parents=True)
    publish_pnet(tmp_path)
    assert tree(tmp_path / "models") == PNET


# Links


def test_models_may_be_a_link_inside_the_project_only(tmp_path: Path) -> None:
    root = tmp_path / "project"
    (root / "generated").mkdir(parents=True)
    (root / "models").symlink_to("generated")
    publish_pnet(root)
    assert tree(root / "generated") == PNET

    (root / "models").unlink()
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / "models").symlink_to(outside)
    for action in (publish_pnet, repository.check, repository.content, lambda root: repository.prune(root, {})):
        with pytest.raises(RepositoryError) as caught:
            action(root)
        assert str(caught.value) == (
            f"models: is a symbolic link to {outside}, outside of the project\n"
            "    replace it by a folder; on another disk, move the whole project there"
        )
    assert list(outside.iterdir()) == []


def test_models_may_not_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "models").write_bytes(b"")
    with pytest.raises(RepositoryError) as caught:
        publish_pnet(tmp_path)
    assert str(caught.value) == "models: is a file, expected a folder\n    move it away"


def test_a_model_folder_may_not_be_a_link(tmp_path: Path) -> None:
    publish_pnet(tmp_path)
    (tmp_path / "models/again").symlink_to("pnet")
    link = "a symbolic link, not written by tritonbuild"
    with pytest.raises(RepositoryError) as caught:
        repository.check(tmp_path)
    assert str(caught.value) == refused("models/again", link)
    with pytest.raises(RepositoryError) as caught:
        repository.publish(tmp_path, "again", {"model.pt": b"one"}, version=1)
    assert str(caught.value) == refused("models/again", link, declared="again")
    assert tree(tmp_path / "models/pnet") == tree(tmp_path / "models/again")


@pytest.mark.parametrize("path", ["1", "warmup", "1/model.pt"])
def test_nothing_is_written_or_removed_through_a_link(tmp_path: Path, path: str) -> None:
    publish_pnet(tmp_path)
    outside = tmp_path / "outside"
    target = tmp_path / "models/pnet" / path
    target.rename(outside)
    target.symlink_to(outside)
    link = "a symbolic link, not written by tritonbuild"
    with pytest.raises(RepositoryError) as caught:
        repository.prune(tmp_path, {})
    assert str(caught.value) == refused(f"models/pnet/{path}", link)
    if path != "1/model.pt":
        with pytest.raises(RepositoryError) as caught:
            publish_pnet(tmp_path)
        assert str(caught.value) == (
            f"models/pnet/{path}: {link}\n    it is in the way of a file that pipeline.yaml declares: move it away"
        )
    else:
        publish_pnet(tmp_path)  # the link was in the place of a file of ours: it is replaced, not followed
        assert tree(tmp_path / "models") == PNET
    assert outside.exists()


# Pruning


def test_models_and_versions_that_are_not_declared_are_removed(tmp_path: Path) -> None:
    publish_pnet(tmp_path)
    repository.publish(tmp_path, "old", {"model.pt": b"x"}, version=1)
    repository.publish(tmp_path, "old", {"config.pbtxt": b"x", "warmup/image": b"x"})
    assert repository.prune(tmp_path, {"pnet": {2}}) == ["models/old", "models/pnet/1"]
    kept = {name: data for name, data in PNET.items() if name != "pnet/1/model.pt"}
    assert tree(tmp_path / "models") == kept | {"pnet/.tritonbuild": MARKER.replace(b"1/model.pt\n", b"")}
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["pnet"]
    assert not (tmp_path / "models/pnet/1").exists()
    assert repository.prune(tmp_path, {"pnet": {2}}) == []


def test_a_hidden_file_keeps_the_folder_of_a_removed_model(tmp_path: Path) -> None:
    publish_pnet(tmp_path)
    (tmp_path / "models/pnet/.notes").write_bytes(b"mine")
    with pytest.raises(RepositoryError) as caught:
        repository.prune(tmp_path, {})
    assert str(caught.value) == (
        "models/pnet/.notes: not written by tritonbuild, in the folder of a model that is no longer declared\n"
        "    move it away; then the folder is removed"
    )
    assert tree(tmp_path / "models") == {**PNET, "pnet/.notes": b"mine"}


def test_pruning_without_models_is_quiet(tmp_path: Path) -> None:
    assert repository.prune(tmp_path, {"pnet": {1}}) == []
    assert repository.content(tmp_path) == {}


# Kills, full disks, and two at once


def test_leftovers_of_killed_runs_are_removed(tmp_path: Path) -> None:
    publish_pnet(tmp_path)
    left = tmp_path / "models/pnet/.tritonbuild-4711"
    (left / "1").mkdir(parents=True)
    (left / "1/model.pt").write_bytes(b"hal")
    (tmp_path / "models/pnet/.tritonbuild-marker").write_bytes(b"# tri")
    # A kill between making a folder and marking it as ours:
    (tmp_path / "models/begun/.tritonbuild-4711").mkdir(parents=True)
    repository.check(tmp_path)
    assert repository.prune(tmp_path, {"pnet": {1, 2}}) == ["models/begun"]
    assert tree(tmp_path / "models") == PNET
    assert not left.exists()


PUBLISH_FOR_EVER = """
import sys
from pathlib import Path
from tritonbuild import repository
root, turn = Path(sys.argv[1]), 0
print("ready", flush=True)
while True:
    turn += 1
    data = bytes([turn % 251]) * 300_000
    repository.publish(root, "pnet", {"model.pt": data, "extra.bin": data}, version=1)
    repository.publish(root, "pnet", {"config.pbtxt": data, "labels.txt": data})
    if turn % 3 == 0:
        repository.prune(root, {"pnet": set()})
    if turn % 5 == 0:
        repository.prune(root, {})
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def whole(path: Path) -> bool:
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return True
    return len(data) == 300_000 and len(set(data)) == 1


def test_a_kill_at_any_moment_leaves_whole_files_that_are_known_as_ours(tmp_path: Path) -> None:
    seconds = random.Random(0)
    files = [tmp_path / "models/pnet" / name for name in ("1/model.pt", "1/extra.bin", "config.pbtxt", "labels.txt")]
    for _ in range(12):
        child = start(PUBLISH_FOR_EVER, tmp_path)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        until = time.monotonic() + seconds.uniform(0.0, 0.15)
        while time.monotonic() < until:
            assert all(map(whole, files)), "a reader saw half a file"
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
        assert child.stderr is not None
        child.stderr.close()
        assert all(map(whole, files))
        repository.check(tmp_path)
    repository.prune(tmp_path, {})
    assert list((tmp_path / "models").iterdir()) == []


PUBLISH_ONE = """
import sys
from pathlib import Path
from tritonbuild import repository
from tritonbuild.errors import RepositoryError
exec(sys.argv[2])
try:
    repository.publish(Path(sys.argv[1]), "pnet", {"model.pt": b"x" * 100_000, "extra.bin": b"y"}, version=1)
except RepositoryError as error:
    print(error)
"""


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    publish_pnet(tmp_path)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))"
    child = start(PUBLISH_ONE, tmp_path, limit)
    assert child.communicate() == (
        "models/pnet/1: cannot be written: file too large\n    nothing is half-written: mend this and run doit again\n",
        "",
    )
    assert tree(tmp_path / "models") == PNET


def test_a_read_only_folder_loses_nothing(tmp_path: Path) -> None:
    publish_pnet(tmp_path)
    (tmp_path / "models/pnet").chmod(0o555)
    give_up_root = ""
    if os.geteuid() == 0:
        give_up_root = "import os; os.setgid(65534); os.setuid(65534)"
        (tmp_path / ".build/repository.lock").chmod(0o666)
        for parent in [tmp_path, *tmp_path.parents][:4]:
            parent.chmod(parent.stat().st_mode | 0o055)
    child = start(PUBLISH_ONE, tmp_path, give_up_root)
    text = (
        "models/pnet/1: cannot be written: permission denied\n"
        "    nothing is half-written: mend this and run doit again\n"
    )
    assert child.communicate() == (text, "")
    assert tree(tmp_path / "models") == PNET
    (tmp_path / "models/pnet").chmod(0o755)


def test_a_source_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError) as caught:
        repository.publish(tmp_path, "pnet", {"model.pt": tmp_path / "gone.pt"}, version=1)
    assert str(caught.value) == (
        f"models/pnet/1: cannot be written: no such file or directory: {tmp_path}/gone.pt\n"
        "    nothing is half-written: mend this and run doit again"
    )


def test_what_a_failed_run_wrote_is_known_as_ours(tmp_path: Path) -> None:
    repository.publish(tmp_path, "pnet", {"labels.txt": b"a"})
    (tmp_path / "models/pnet/labels.txt").unlink()
    (tmp_path / "models/pnet/labels.txt").mkdir()
    for _ in range(2):
        with pytest.raises(RepositoryError) as caught:
            repository.publish(tmp_path, "pnet", {"a.txt": b"first", "labels.txt": b"b"})
        assert str(caught.value) == (
            "models/pnet: cannot be written: is a directory\n    nothing is half-written: mend this and run doit again"
        )
        assert tree(tmp_path / "models/pnet").keys() == {".tritonbuild", "a.txt"}
    (tmp_path / "models/pnet/labels.txt").rmdir()
    repository.check(tmp_path)
    assert repository.prune(tmp_path, {}) == ["models/pnet"]


PUBLISH_VERSIONS = """
import sys
from pathlib import Path
from tritonbuild import repository
for version in range(int(sys.argv[2]), 40, 2):
    repository.publish(Path(sys.argv[1]), "pnet", {"model.pt": b"%d" % version}, version=version)
"""


def test_two_tasks_publish_versions_of_one_model_at_once(tmp_path: Path) -> None:
    children = [start(PUBLISH_VERSIONS, tmp_path, first) for first in (1, 2)]
    assert [child.communicate() for child in children] == [("", ""), ("", "")]
    assert list(repository.content(tmp_path)) == sorted(f"pnet/{version}/model.pt" for version in range(1, 40))
    repository.check(tmp_path)


# The digest


def test_the_digest_depends_on_names_and_contents_only(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "some/where/else"
    here.mkdir()
    there.mkdir(parents=True)
    publish_pnet(here)
    repository.publish(there, "pnet", {"warmup/image": b"\0" * 8, "labels.txt": b"a\nb\n", "config.pbtxt": CONFIG})
    repository.publish(there, "pnet", {"model.pt": b"two"}, version=2)
    repository.publish(there, "pnet", {"model.pt": b"one"}, version=1)
    os.utime(there / "models/pnet/1/model.pt", (0, 0))
    digest = repository.digest(here)
    assert digest == repository.digest(there) == "d7840ae8598ee0716fdf7af211286d8598b7126e53b646f1d3e2e9d6ad8e8134"
    seen = {digest}
    for change in (
        lambda: repository.publish(there, "pnet", {"model.pt": b"One"}, version=1),
        lambda: repository.publish(there, "pnet", {"other.pt": b"One"}, version=1),
        lambda: repository.publish(there, "second", {"config.pbtxt": b""}),
        lambda: repository.prune(there, {"pnet": {1, 2}}),
        lambda: repository.prune(there, {"pnet": {2}}),
    ):
        before = repository.digest(there)
        change()
        assert repository.digest(there) != before
        seen.add(repository.digest(there))
    assert len(seen) == 5  # the fourth change undid the third


def test_the_digest_takes_file_digests_from_whoever_knows_them(tmp_path: Path) -> None:
    publish_pnet(tmp_path)
    asked: list[str] = []

    def known(path: Path) -> str:
        asked.append(path.relative_to(tmp_path).as_posix())
        return "0" * 64

    assert repository.digest(tmp_path, known) != repository.digest(tmp_path)
    assert asked == [f"models/{name}" for name in sorted(PNET) if not name.endswith(".tritonbuild")]
