"""Decides what models/ holds: who wrote each file there, and how a new one takes the place of an old one.

Hides the marker: `models/<model>/.tritonbuild` lists the files of ours, one a line; only they are ever replaced or
removed, and anything else that Triton would serve is refused, not deleted. Hides atomicity: new files are written
beside the old ones, brought to disk and renamed, so that a reader, a full disk or a kill at any moment leaves
whole files; leftovers are removed by the next run. Temporary names live inside a model's folder, never in models/
itself, where Triton takes every folder for a model, hidden ones too (measured on tritonserver 2.51).

Source: Triton's model_repository.md; rename(2).
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from tritonbuild.errors import RepositoryError
from tritonbuild.store import link

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

MARKER = ".tritonbuild"
_MARKER_TEXT = "# tritonbuild wrote the files below; it replaces and removes them, and no others.\n"
_LEFTOVER = ".tritonbuild-"
_BLOCK = 1 << 20


def publish(root: Path, model: str, files: Mapping[str, Path | bytes], version: int | None = None) -> None:
    """Make one part of a model's folder hold exactly these files, whole.

    A new version's folder appears at once, by one rename; in one that exists each file is replaced by a rename,
    config.pbtxt after all others. Files that have the bytes already are not touched, so that a server that polls
    the folder sees no change.

    Args:
        root: The project's folder.
        model: The model's name.
        files: Path inside the part, with forward slashes -> where the content comes from.
        version: Which version's folder is meant; None: what lies beside the version folders.

    Raises:
        RepositoryError: The folder or a file in the way is not ours, or cannot be written; nothing is half-written.
    """
    prefix = "" if version is None else f"{version}/"
    wanted = {prefix + path: source for path, source in files.items()}
    folder = root / "models" / model
    with _writing(root, f"models/{model}/{prefix}".rstrip("/")):
        listed = _claim(root, model)
        _remove_leftovers(folder)
        for path in wanted:
            _refuse_stranger(folder, path, listed)
        changed = {path: source for path, source in wanted.items() if not _same(folder / path, source)}
        new = folder / f"{_LEFTOVER}{os.getpid()}"
        try:
            for path, source in changed.items():
                _write(new / path, source, may_link=version is not None)
            # Listed before they are in place: after a kill in between they are still known as ours.
            _write_marker(folder, listed | set(wanted))
            if version is not None and changed and not (folder / prefix).exists():
                _rename(new / prefix, folder / prefix)
            else:
                for path in sorted(changed, key=lambda path: (path == "config.pbtxt", path)):
                    _rename(new / path, folder / path)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        stale = {path for path in listed - set(wanted) if _part(path) == version}
        _remove(folder, stale)
        _write_marker(folder, (listed | set(wanted)) - stale)


def check(root: Path) -> None:
    """Refuse what is in models/ and not ours. Cheap: called before anything is traced.

    Raises:
        RepositoryError: models/ leaves the project, or Triton would serve something that tritonbuild did not write.
    """
    models = _models(root)
    strangers: list[Path] = []
    for name in _folders(models):
        folder = models / name
        if folder.is_symlink() or not (_is_ours(folder) or _is_blank(folder)):
            strangers.append(folder)
        else:
            strangers += [folder / path for path in _strangers(folder) if not _is_hidden(path)]
    if strangers:
        first, *others = (path.relative_to(root).as_posix() for path in strangers)
        more = f"; nor {', '.join(others[:3])}" + (" and more" if others[3:] else "") if others else ""
        raise RepositoryError(
            first,
            f"{_not_ours(strangers[0])}{more}",
            "models/ is generated, and Triton serves what it finds there: move it away",
        )


def prune(root: Path, versions: Mapping[str, Collection[int]]) -> list[str]:
    """Remove our models and versions that are not declared.

    Args:
        root: The project's folder.
        versions: The declared version numbers of each declared model.

    Returns:
        What was removed, such as `models/old` or `models/pnet/3`, sorted.

    Raises:
        RepositoryError: See `check`; or a folder to be removed holds a file that is not ours. Then all is kept.
    """
    check(root)
    models = _models(root)
    removed: list[str] = []
    for name in _folders(models):
        folder = models / name
        declared = versions.get(name)
        with _writing(root, f"models/{name}"):
            _remove_leftovers(folder)
            listed = _listed(folder)
            orphans = {path for path in listed if declared is None or _part(path) not in {None, *declared}}
            if declared is None:
                _refuse_hidden(name, folder)
                _remove(folder, orphans)
                (folder / MARKER).unlink(missing_ok=True)
                folder.rmdir()
                removed.append(f"models/{name}")
            elif orphans:
                _remove(folder, orphans)
                _write_marker(folder, listed - orphans)
                removed += {f"models/{name}/{_part(path)}" for path in orphans}
    return sorted(removed)


def content(root: Path) -> dict[str, Path]:
    """Return `pnet/1/model.pt` -> its path for every file that tritonbuild wrote and that is there, sorted."""
    models = _models(root)
    found = {f"{name}/{path}": models / name / path for name in _folders(models) for path in _listed(models / name)}
    return {path: found[path] for path in sorted(found) if found[path].is_file()}


def digest(root: Path, digest_of: Callable[[Path], str | None] | None = None) -> str:
    """Return the digest of the model repository: its files' names and contents, equal on every machine.

    Args:
        root: The project's folder.
        digest_of: Returns the sha256 of a file, in hexadecimal; by default each file is read.
    """
    hasher = sha256()
    for path, file in content(root).items():
        hasher.update(f"{path}\0{(digest_of or _sha256)(file)}\n".encode())
    return hasher.hexdigest()


def _models(root: Path) -> Path:
    models = root / "models"
    if models.is_symlink() and not models.resolve().is_relative_to(root.resolve()):
        raise RepositoryError(
            "models",
            f"is a symbolic link to {models.resolve()}, outside of the project",
            "replace it by a folder; on another disk, move the whole project there",
        )
    if models.exists() and not models.is_dir():
        raise RepositoryError("models", "is a file, expected a folder", "move it away")
    return models


def _folders(models: Path) -> list[str]:
    # Plain files beside the models are left alone: Triton ignores them.
    return sorted(entry.name for entry in models.iterdir() if entry.is_dir()) if models.exists() else []


def _claim(root: Path, model: str) -> set[str]:
    """Return what we wrote in the model's folder, which is made when it is not there."""
    folder = _models(root) / model
    if folder.is_symlink() or (folder.exists() and not (_is_ours(folder) or _is_blank(folder))):
        raise RepositoryError(
            f"models/{model}",
            _not_ours(folder),
            f'move it away, or give the model "{model}" of pipeline.yaml another name',
        )
    folder.mkdir(parents=True, exist_ok=True)
    return _listed(folder)


def _is_ours(folder: Path) -> bool:
    return (folder / MARKER).is_file()


def _is_blank(folder: Path) -> bool:
    """Return whether a folder is empty but for what a killed run of ours may have left."""
    return folder.is_dir() and all(entry.name.startswith(_LEFTOVER) for entry in folder.iterdir())


def _listed(folder: Path) -> set[str]:
    try:
        text = (folder / MARKER).read_text(encoding="utf-8")
    except FileNotFoundError:
        return set()
    return set(text.partition("\n")[2].splitlines())  # the first line says what this is


def _write_marker(folder: Path, listed: set[str]) -> None:
    text = (_MARKER_TEXT + "".join(f"{path}\n" for path in sorted(listed))).encode()
    if _same(folder / MARKER, text):
        return
    new = folder / f"{_LEFTOVER}marker"
    _write(new, text)
    _rename(new, folder / MARKER)


def _part(path: str) -> int | None:
    """Return the version whose folder a listed path is in; None for what lies beside the version folders."""
    first, slash, _ = path.partition("/")
    return int(first) if slash and re.fullmatch(r"[1-9][0-9]*", first) else None


def _is_hidden(path: str) -> bool:
    # What a desktop or an editor leaves (.DS_Store, .config.pbtxt.swp): Triton does not read it.
    return any(part.startswith(".") for part in PurePosixPath(path).parts)


def _strangers(folder: Path) -> list[str]:
    """Return the paths in a folder of ours that we did not write; a link in the place of a file of ours is one."""
    listed = _listed(folder) | {MARKER}
    found = []
    for path, folders, files in os.walk(folder):
        here = Path(path)
        if here == folder:
            folders[:] = [name for name in folders if not name.startswith(_LEFTOVER)]
            # Triton takes every folder with a number for a version, an empty one too.
            unknown = [name for name in folders if not any(file.startswith(f"{name}/") for file in listed)]
            found += [here / name for name in unknown if name[0].isdigit() and not any((here / name).iterdir())]
        found += [here / name for name in folders if (here / name).is_symlink()]
        found += [here / name for name in files if not name.startswith(_LEFTOVER)]
    paths = ((file, file.relative_to(folder).as_posix()) for file in found)
    return sorted(path for file, path in paths if path not in listed or file.is_symlink())


def _not_ours(path: Path) -> str:
    return "a symbolic link, not written by tritonbuild" if path.is_symlink() else "not written by tritonbuild"


def _refuse_stranger(folder: Path, path: str, listed: set[str]) -> None:
    """Refuse to write where something is in the way that is not ours: a file, or a link on the way there."""
    for step in [*reversed(PurePosixPath(path).parents[:-1]), PurePosixPath(path)]:
        place = folder / step
        is_end = str(step) == path
        in_the_way = os.path.lexists(place) and path not in listed if is_end else place.is_symlink()
        if in_the_way:
            raise RepositoryError(
                f"models/{folder.name}/{step}",
                _not_ours(place),
                "it is in the way of a file that pipeline.yaml declares: move it away",
            )


def _refuse_hidden(name: str, folder: Path) -> None:
    strangers = _strangers(folder)
    if strangers:
        raise RepositoryError(
            f"models/{name}/{strangers[0]}",
            "not written by tritonbuild, in the folder of a model that is no longer declared",
            "move it away; then the folder is removed",
        )


def _remove_leftovers(folder: Path) -> None:
    for entry in folder.iterdir():
        if not entry.name.startswith(_LEFTOVER):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _remove(folder: Path, paths: set[str]) -> None:
    for path in sorted(paths, key=lambda path: (path != "config.pbtxt", path)):
        (folder / path).unlink(missing_ok=True)
        for parent in (folder / path).parents:
            if parent == folder or not parent.is_dir() or any(parent.iterdir()):
                break
            parent.rmdir()


def _same(target: Path, source: Path | bytes) -> bool:
    if target.is_symlink() or not target.is_file():
        return False
    if isinstance(source, bytes):
        return target.stat().st_size == len(source) and target.read_bytes() == source
    if target.stat().st_size != source.stat().st_size:
        return False
    if target.samefile(source):
        return True
    with target.open("rb") as old, source.open("rb") as new:
        while block := old.read(_BLOCK):
            if block != new.read(_BLOCK):
                return False
    return True


def _write(path: Path, source: Path | bytes, *, may_link: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if may_link and isinstance(source, Path) and not source.stat().st_mode & 0o222:
        # A result of the store, which nobody may write: one file on the disk, not two. Labels and warm-up data are the
        # user's, who may write them once more.
        link(source, path)
        return
    if isinstance(source, bytes):
        path.write_bytes(source)
    else:
        shutil.copyfile(source, path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(new: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # The folder is not brought to disk: after a power cut it holds the old file or the new one, whole, and a task
    # whose target is not what it wrote runs again.
    new.replace(target)


@contextmanager
def _writing(root: Path, where: str) -> Iterator[None]:
    """Hold the lock on models/, and say a failure of the file system in our words."""
    try:
        (root / ".build").mkdir(exist_ok=True)
        # Two tasks of one run publish parts of one model at once: they share its marker.
        with (root / ".build" / "repository.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        path = Path(str(error.filename or root / "models"))
        source = "" if path.is_relative_to(root / "models") else f": {path}"
        raise RepositoryError(
            where, f"cannot be written: {reason}{source}", "nothing is half-written: mend this and run doit again"
        ) from None


def _sha256(path: Path) -> str:
    hasher = sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            hasher.update(block)
    return hasher.hexdigest()
