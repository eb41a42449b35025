"""Decides the bytes of a TorchScript file: the same model gives the same bytes, on every machine.

Hides what torch writes and nobody computes with: debug records (local paths, line numbers), the inputs of a trace, a
serialization id, and numbers in class names that count what the process compiled before. Entries are stored, not
compressed (zlib's output depends on its build), with fixed names, times and attributes, and tensor data start at
multiples of 64 bytes. The file is streamed: beside the module itself, nothing as large as its weights is in memory.

Source: torch's caffe2/serialize (inline_container.h: alignment; a reader takes the root name from the first entry)
    and torch/csrc/jit/serialization (one code file per namespace, read lazily by name).
"""

from __future__ import annotations

import pickletools
import re
import struct
import tempfile
import zipfile
import zlib
from io import BytesIO
from itertools import count, pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

_ROOT = "model"
_ALIGNMENT = 64
_TENSORS = ("data/", "constants/")
_PADDING_ID = 0x4246  # "FB": torch's own id for padding in a ZIP extra field


def write(module: torch.jit.ScriptModule, path: Path) -> None:
    """Write the module as a canonical TorchScript file.

    Args:
        module: What `torch.jit.trace`, `script` or `load` returned.
        path: The file to write. It loads with `torch.jit.load`, on any device, and with libtorch's `torch::jit::load`.
            A second file of its size stands beside it meanwhile.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".archive-") as folder:
        raw = Path(folder) / "raw"
        module.save(str(raw))
        with raw.open("rb") as source, path.open("wb") as target:
            _rewrite(source, target)


def canonical(module: torch.jit.ScriptModule) -> bytes:
    """Return the bytes that `write` would write."""
    with tempfile.TemporaryDirectory(prefix="archive-") as folder:
        path = Path(folder) / "model.pt"
        write(module, path)
        return path.read_bytes()


def _rewrite(source: BinaryIO, target: BinaryIO) -> None:
    with zipfile.ZipFile(source) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        kept = [name for name in entries if not _is_dropped(name)]
        texts = {name: archive.read(entries[name]) for name in kept if name.endswith((".py", ".pkl"))}
        texts = _with_canonical_classes(texts)
        order = [name for name in kept if name not in texts and not name.endswith(".py")]
        writer = _Writer(target)
        for name in sorted(texts):
            writer.add(name, len(texts[name]), zlib.crc32(texts[name]), BytesIO(texts[name]))
        for name in order:
            entry = entries[name]
            if entry.compress_type == zipfile.ZIP_STORED:
                source.seek(_start(source, entry))
                writer.add(name, entry.file_size, entry.CRC, source)
            else:
                writer.add(name, entry.file_size, entry.CRC, archive.open(entry))
        writer.finish()


def _is_dropped(name: str) -> bool:
    return (
        name.endswith(".debug_pkl")
        or name.startswith(("traced_inputs/", "traced_inputs."))
        or name == ".data/serialization_id"
    )


def _start(source: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Return where a stored entry's content begins: its local header has lengths of its own."""
    source.seek(entry.header_offset + 26)
    name, extra = struct.unpack("<HH", source.read(4))
    return entry.header_offset + 30 + int(name) + int(extra)


class _Writer:
    """A ZIP file of stored entries. zipfile would read all weights twice more to checksum them, and differs by version.

    Source: PKWARE's APPNOTE.TXT 6.3, sections 4.3 and 4.5.3 (zip64).
    """

    _TIME = struct.pack("<HH", 0, 1 << 5 | 1)  # 1980-01-01 00:00
    _ELSEWHERE = 0xFFFFFFFF  # a field that does not fit into 32 bits: it is in the zip64 part
    large = 0xFFFFFFFF

    def __init__(self, target: BinaryIO) -> None:
        self._target = target
        self._directory: list[bytes] = []

    def add(self, name: str, size: int, checksum: int, content: IO[bytes]) -> None:
        """Copy `size` bytes from where `content` stands."""
        path = f"{_ROOT}/{name}".encode()
        offset = self._target.tell()
        large = struct.pack("<HHQQ", 1, 16, size, size) if size >= self.large else b""
        padding = b""
        if size and name.startswith(_TENSORS):
            length = -(offset + 30 + len(path) + len(large) + 4) % _ALIGNMENT
            padding = struct.pack("<HH", _PADDING_ID, length) + b"\0" * length
        short = self._ELSEWHERE if large else size
        fields = struct.pack("<HH", 0, 0) + self._TIME + struct.pack("<LLL", checksum, short, short)
        far = offset >= self.large
        version = struct.pack("<H", 45 if large or far else 20)
        extra = large + padding
        self._target.write(b"PK\3\4" + version + fields + struct.pack("<HH", len(path), len(extra)) + path + extra)
        left = size
        while left:
            chunk = content.read(min(left, 1 << 20))
            if not chunk:
                raise OSError(f"the TorchScript archive ends inside {name}")
            self._target.write(chunk)
            left -= len(chunk)
        sizes = [size, size] if large else []
        sizes += [offset] if far else []
        extra = struct.pack(f"<HH{len(sizes)}Q", 1, 8 * len(sizes), *sizes) if sizes else b""
        tail = struct.pack("<HHHHHLL", len(path), len(extra), 0, 0, 0, 0, self._ELSEWHERE if far else offset)
        self._directory.append(b"PK\1\2" + version + version + fields + tail + path + extra)

    def finish(self) -> None:
        """Write the directory of all entries."""
        offset, directory, count = self._target.tell(), b"".join(self._directory), len(self._directory)
        self._target.write(directory)
        far = offset >= self.large
        if far or count >= 0xFFFF:
            end = self._target.tell()
            self._target.write(
                b"PK\6\6" + struct.pack("<QHHLLQQQQ", 44, 45, 45, 0, 0, count, count, len(directory), offset)
            )
            self._target.write(b"PK\6\7" + struct.pack("<LQL", 0, end, 1))
        counts = [min(count, 0xFFFF)] * 2
        sizes = [len(directory), self._ELSEWHERE if far else offset]
        self._target.write(b"PK\5\6" + struct.pack("<HHHHLLH", 0, 0, *counts, *sizes, 0))


_DEFINITION = re.compile(r"^(?:class|def) (\w+)", re.MULTILINE)
_NAME = re.compile(r"__torch__(?:\.[A-Za-z_]\w*)+")
_CONSTANTS = re.compile(r"(?:^  \w+ : Final\[.*\] = .*\n)+", re.MULTILINE)
_MANGLE = re.compile(r"\.___torch_mangle_\d+(?=\.)")


def _with_canonical_classes(texts: dict[str, bytes]) -> dict[str, bytes]:
    """Number classes of one name in the order in which the model reaches them, whatever ran in the process before."""
    definitions = _definitions(texts)
    if definitions is None:
        return texts
    reached = _reached(texts, definitions)
    used: set[str] = set()
    numbers = count()
    names: dict[str, str] = {}
    for name in reached:
        new = plain = _MANGLE.sub("", name)
        while new in used:
            namespace, _, last = plain.rpartition(".")
            new = f"{namespace}.___torch_mangle_{next(numbers)}.{last}"
        used.add(new)
        names[name] = new
    code: dict[str, str] = {}
    for name in reached:
        file = "code/" + names[name].rpartition(".")[0].replace(".", "/") + ".py"
        code[file] = code.get(file, "") + _NAME.sub(lambda match: _renamed(match.group(), names), definitions[name])
    # The namespaces of C++ classes, such as quantized weights, are empty files.
    code |= {name: "" for name, data in texts.items() if name.endswith(".py") and not data.strip() and name not in code}
    pickles = {name: _renamed_pickle(data, names) for name, data in texts.items() if name.endswith(".pkl")}
    return pickles | {file: text.encode() for file, text in code.items()}


def _definitions(texts: dict[str, bytes]) -> dict[str, str] | None:
    """Return qualified name -> source of each class and function, or None where the source is not as expected."""
    found: dict[str, str] = {}
    for file, data in texts.items():
        if not file.endswith(".py"):
            continue
        namespace = file.removeprefix("code/").removesuffix(".py").replace("/", ".")
        text = data.decode()
        starts = [match.start() for match in _DEFINITION.finditer(text)]
        if text[: starts[0] if starts else None].strip():
            return None
        for start, end in pairwise([*starts, len(text)]):
            match = _DEFINITION.match(text, start)
            assert match
            body = _CONSTANTS.sub(_in_order, text[start:end].rstrip("\n") + "\n\n")
            found[f"{namespace}.{match.group(1)}"] = body
    return found


def _in_order(run: re.Match[str]) -> str:
    """Sort a run of constants: torch writes them in the order of a set, which changes with each process."""
    return "".join(sorted(run.group().splitlines(keepends=True)))


def _reached(texts: dict[str, bytes], definitions: dict[str, str]) -> list[str]:
    """Return all qualified names: first as the pickled module tree names them, then as their sources do."""
    reached: dict[str, None] = {}
    for file in ("data.pkl", "constants.pkl"):
        for _, _, name in _globals(texts.get(file, b"")):
            if name in definitions:
                reached.setdefault(name)
    queue = list(reached)
    for name in queue:  # grows while it is walked
        for match in _NAME.finditer(definitions[name]):
            known = _longest_known(match.group(), definitions)
            if known and known not in reached:
                reached.setdefault(known)
                queue.append(known)
    for name in sorted(definitions):
        reached.setdefault(name)
    return list(reached)


def _longest_known(name: str, known: dict[str, str]) -> str | None:
    """Return the part of a dotted name that is defined: what follows it may be a member."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def _renamed(name: str, names: dict[str, str]) -> str:
    known = _longest_known(name, names)
    return names[known] + name[len(known) :] if known else name


def _globals(data: bytes) -> Iterator[tuple[int, int, str]]:
    """Yield start, end and qualified name of each GLOBAL in a pickle."""
    if not data:
        return
    for opcode, argument, position in pickletools.genops(data):
        if opcode.name == "GLOBAL":
            assert isinstance(argument, str)
            assert position is not None
            yield position, position + len(argument) + 2, argument.replace(" ", ".")


def _renamed_pickle(data: bytes, names: dict[str, str]) -> bytes:
    parts, last = [], 0
    for start, end, name in _globals(data):
        if name in names:
            module, _, attribute = names[name].rpartition(".")
            parts += [data[last:start], f"c{module}\n{attribute}\n".encode()]
            last = end
    return b"".join([*parts, data[last:]])
