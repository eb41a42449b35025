"""Results are made once: kept, found, verified, shared; and what happens when the store does not do its part.

The bucket is moto's server on loopback: real S3 requests by s3fs, with faults made by a proxy of this test in front
of it.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pytest
from conftest import DODO, Project

from tritonbuild import remote, store
from tritonbuild.results import Reads, Result, describe, parse_result, reads
from tritonbuild.state import State
from tritonbuild.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

NETS = """\
import torch


class Net(torch.nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.layer = torch.nn.Linear(4, width)

    def forward(self, x):
        return self.layer(x)
"""
YAML = """\
triton: "26.07"
device: cpu
models:
  net:
    entry_point: nets:Net
    max_batch_size: 4
    inputs:
      x: {dtype: float32, shape: [batch, 4]}
    trace: {cases: 3, budget_s: 1}
"""


# -------------------------------------------------------------------------------------------- the local store by itself


class Kept:
    """A project's store, and results to keep in it."""

    def __init__(self, root: Path, url: str | None = None, mode: str = "read-write") -> None:
        self.root = root
        State(str(root / ".build" / "state.sqlite"))
        self.store = Store(root, url, mode)

    def make(self, key: str, content: bytes, files: tuple[str, ...] = ("net.py",), base: str = "0" * 64) -> Result:
        out = self.out()
        (out / "model.pt").write_bytes(content)
        (out / "proof.json").write_text('{"verdict": "passed"}\n')
        result = describe(key, base, out, ["model.pt", "proof.json"], reads(files, ["torch"]), 12.5)
        self.store.keep(result, out)
        return result

    def out(self) -> Path:
        out = self.root / ".build" / "tmp" / f"out{time.monotonic_ns()}"
        out.mkdir(parents=True)
        return out

    def find(self, key: str, base: str = "0" * 64) -> Result | None:
        return self.store.find(base, lambda files, distributions: key)

    def blob(self, content: bytes) -> Path:
        digest = hashlib.sha256(content).hexdigest()
        return self.root / ".build" / "store" / "blobs" / digest[:2] / digest


A, B, C = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path)


def test_what_was_kept_is_found_by_what_it_read(kept: Kept) -> None:
    kept.make(A, b"first")
    kept.make(B, b"second", ("net.py", "size.json"))
    asked: list[tuple[tuple[str, ...], tuple[str, ...]]] = []

    def key_of(files: tuple[str, ...], distributions: tuple[str, ...]) -> str:
        asked.append((tuple(files), tuple(distributions)))
        return B if "size.json" in files else C

    found = kept.store.find("0" * 64, key_of)
    assert found is not None
    assert found.key == B
    assert found.seconds == 12.5
    assert sorted(asked) == [(("net.py",), ("torch",)), (("net.py", "size.json"), ("torch",))]
    out = kept.out()
    assert kept.store.fetch(found, out)
    assert (out / "model.pt").read_bytes() == b"second"
    assert kept.find(C) is None
    assert kept.find(B, base="1" * 64) is None


def test_a_fetched_file_is_a_link_that_nobody_may_write(kept: Kept) -> None:
    found = kept.make(A, b"content")
    out = kept.out()
    kept.store.fetch(found, out)
    assert (out / "model.pt").samefile(kept.blob(b"content"))
    assert (out / "model.pt").stat().st_mode & 0o777 == 0o444


def test_equal_files_are_kept_once(kept: Kept) -> None:
    kept.make(A, b"content")
    inode = kept.blob(b"content").stat().st_ino
    kept.make(B, b"content")
    assert kept.blob(b"content").stat().st_ino == inode
    assert len(list((kept.store.folder / "blobs").glob("*/*"))) == 2


def test_a_target_edited_by_hand_does_not_damage_a_result(kept: Kept, capsys: pytest.CaptureFixture[str]) -> None:
    found = kept.make(A, b"content")
    out = kept.out()
    kept.store.fetch(found, out)
    with (out / "model.pt").open("wb") as target:  # as root it can be written
        target.write(b"CONTENT")
    assert not kept.store.fetch(found, kept.out())
    assert capsys.readouterr().out == (
        f"   store: a file of a result was changed by hand or damaged; {kept.blob(b'content').name[:12]} is removed\n"
    )
    kept.make(A, b"content")
    assert kept.store.fetch(found, kept.out())


@pytest.mark.parametrize("folder", ["results", "index"])
@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"files": 1}', b'{"files": ["x"]}', b"\xff\x00"])
def test_a_damaged_description_is_a_miss(kept: Kept, damage: bytes, folder: str) -> None:
    kept.make(A, b"content")
    (path,) = (kept.store.folder / folder).glob("*/*.json")
    path.write_bytes(damage)
    assert kept.find(A) is None


def test_a_description_may_not_lead_out_of_the_project(kept: Kept) -> None:
    good = kept.make(A, b"content")
    assert parse_result(A, good.text()) == good
    beside = Result(A, good.base, good.files, Reads(("../common/nets.py", "nets.py"), ()), 1.0)
    assert parse_result(A, beside.text()) == beside
    for wrong in (("../x",), ("/etc/passwd",), ("a/../../x",), ("/nets.py",), ("a/../../nets.py",), ("../a/../b.py",)):
        assert parse_result(A, Result(A, good.base, good.files, Reads(wrong, ()), 1.0).text()) is None
    for name in ("../model.pt", "model", "a/b.pt"):
        assert parse_result(A, Result(A, good.base, {name: ("0" * 64, 1)}, good.reads, 1.0).text()) is None
    assert parse_result(A, Result(A, good.base, {"model.pt": ("../x", 1)}, good.reads, 1.0).text()) is None


def test_what_was_used_longest_ago_is_collected_first(kept: Kept) -> None:
    for number, key in enumerate((A, B, C)):
        kept.make(key, key[:1].encode() * 1000, base=key[:1] * 64)
        path = kept.store.folder / "results" / key[:2] / f"{key}.json"
        os.utime(path, (1000 + number, 1000 + number))
    found = kept.find(A, base=A)
    assert found is not None
    kept.store.fetch(found, kept.out())
    assert kept.store.collect(1500, in_use={C}) == (1, 1000)
    assert kept.find(A, base=A)
    assert kept.find(B, base=B) is None
    assert kept.find(C, base=C)
    assert kept.store.collect(0, in_use={C}) == (1, 1000)
    assert [path.parent.name for path in (kept.store.folder / "index").glob("*/*")] == [C]


def test_the_local_store_keeps_its_limit_by_itself(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.store.limit_bytes = 10_000
    for number in range(30):
        kept.make(f"{number:064}", b"%d" % number * 1000)
    assert 5_000 < kept.store.size_bytes() <= 10_100  # the result that was kept last is never removed
    assert kept.find(f"{29:064}")


def test_a_store_that_cannot_be_written_is_one_warning(kept: Kept, capsys: pytest.CaptureFixture[str]) -> None:
    (kept.root / ".build" / "store").write_text("a file in its place")
    kept.make(A, b"content")
    kept.make(B, b"content")
    assert capsys.readouterr().err == (
        f"   warning: {kept.blob(b'content').parent}: Not a directory\n    results are not kept there\n"
    )


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("17", 17), ("500M", 500 << 20), ("5G", 5 << 30), ("1k", 1024), ("2T", 2 << 40)]
)
def test_sizes(text: str, size: int) -> None:
    assert store.size_of(text, "--limit") == size


def test_a_variable_with_another_value_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value, message in [
        ("TRITONBUILD_STORE", "readonly", 'found "readonly", expected read-write, read-only or off'),
        ("TRITONBUILD_STORE_LIMIT", "many", 'found "many", expected a size such as 500M or 5G'),
    ]:
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            with pytest.raises(store.StoreError, match=re.escape(f"{name}: {message}")):
                store.of(tmp_path, None)


# ------------------------------------------------------------------------------------------------ a shared folder


def test_two_projects_share_a_folder(tmp_path: Path) -> None:
    first = Kept(tmp_path / "first", str(tmp_path / "shared"))
    first.make(A, b"content")
    first.store.share()
    second = Kept(tmp_path / "second", (tmp_path / "shared").as_uri())
    found = second.find(A)
    assert found is not None
    assert found.remote
    assert second.store.missing_bytes(found) == len(b"content") + 22
    out = second.out()
    assert second.store.fetch(found, out)
    assert (out / "model.pt").read_bytes() == b"content"
    again = second.find(A)
    assert again is not None
    assert not again.remote
    (blob,) = (tmp_path / "shared" / "blobs").glob(f"*/{second.blob(b'content').name}")
    assert not blob.samefile(out / "model.pt")  # a hand must not reach a colleague's result


def test_what_a_killed_run_has_left_in_a_shared_folder_is_not_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Kept(tmp_path / "first", str(tmp_path / "shared"))
    first.make(A, b"content")
    first.store.share()
    (path,) = (tmp_path / "shared" / "index").glob("*/*")
    path.with_name(f".new-0-{path.name}").write_bytes(path.read_bytes()[:9])
    second = Kept(tmp_path / "second", str(tmp_path / "shared"))
    assert second.find(B) is None
    assert second.find(A)
    assert capsys.readouterr().err == ""


def test_read_only_shares_nothing_and_off_asks_nobody(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    kept = Kept(tmp_path / "project", str(shared), "read-only")
    kept.make(A, b"content")
    kept.store.share()
    assert not shared.exists()
    assert kept.find(A)
    assert Kept(tmp_path / "project", str(shared), "off").find(A) is None


def test_what_could_not_be_shared_is_shared_by_a_later_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = tmp_path / "shared"
    shared.write_text("not a folder yet")
    kept = Kept(tmp_path / "project", str(shared))
    kept.make(A, b"content")
    kept.store.share()
    assert "   warning: store " in capsys.readouterr().err
    shared.unlink()
    later = Kept(tmp_path / "project", str(shared))
    later.root = tmp_path / "project"
    shutil.rmtree(tmp_path / "project" / ".build" / "tmp")  # as each run of doit begins
    later.make(B, b"more")
    later.store.share()
    assert len(list((shared / "results").glob("*/*.json"))) == 2
    assert list((tmp_path / "project" / ".build" / "store" / "pending").iterdir()) == []


@pytest.mark.parametrize(("key", "kept"), [("cuda", False), ("cpu", True)])
def test_a_trace_on_another_device_than_its_key_says_is_not_kept(key: str, kept: bool, tmp_path: Path) -> None:
    """A machine may have a GPU that PyTorch cannot use: its trace names the CPU, and a GPU must not be given it."""
    made = Project(tmp_path / "project").write(
        {
            "dodo.py": f"from tritonbuild import keys\n\nkeys.device_kind = lambda: '{key}'\n{DODO}",
            "pipeline.yaml": YAML.replace("device: cpu", "device: auto"),
            "nets.py": NETS,
        }
    )
    for _ in range(2):
        ran = made.doit("trace", CUDA_VISIBLE_DEVICES="-1")
        assert ran.code == 0, ran.out
        for name in ("state.sqlite", "outlines", "proof"):
            path = made.root / ".build" / name
            path.unlink() if path.is_file() else shutil.rmtree(path)
        shutil.rmtree(made.root / "models")
    assert ("from the store" in ran.out) == kept, ran.out


def test_many_writers_of_one_key_are_harmless(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_store import Kept, A; from pathlib import Path\n"
        "kept = Kept(Path(sys.argv[2]), sys.argv[3])\n"
        "for _ in range(30):\n"
        "    kept.make(A, b'content' * 1000); kept.store.share()\n"
        "    found = kept.find(A); assert found and kept.store.fetch(found, kept.out())\n"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent)]
    roots = [tmp_path / "one", tmp_path / "one", tmp_path / "two", tmp_path / "two"]
    running = [subprocess.Popen([*command, str(root), str(tmp_path / "shared")]) for root in roots]
    assert [process.wait(60) for process in running] == [0, 0, 0, 0]
    blobs = list((tmp_path / "shared" / "blobs").glob("*/*"))
    assert sorted(hashlib.sha256(blob.read_bytes()).hexdigest() for blob in blobs) == sorted(
        blob.name for blob in blobs
    )


# --------------------------------------------------------------------------------------------------- a real bucket


@dataclass
class Faults:
    """A proxy in front of the S3 server that fails as it is told."""

    port: int = 0
    kind: str = ""
    requests: list[str] = field(default_factory=list)

    def bytes_of(self, method: str, path: str, status: int, body: bytes) -> tuple[int, bytes]:
        is_blob = method == "GET" and "/blobs/" in path
        if self.kind == "500":
            return 500, b"<Error><Code>InternalError</Code><Message>we are sorry</Message></Error>"
        if self.kind == "403 put" and method == "PUT":
            return 403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        if self.kind == "wrong bytes" and is_blob:
            return status, b"x" * len(body)
        if self.kind == "truncated" and is_blob:
            return status, body[: len(body) // 2]
        if self.kind == "wrong description" and path.endswith(".json") and method == "GET" and status == 200:
            return status, b"<html>a captive portal</html>"
        return status, body


_NOT_PASSED = ("content-length", "transfer-encoding", "connection", "date", "server", "x-amz-checksum", "x-amzn-trace")


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[str, Faults]]:
    """The endpoint of an S3 server with the bucket `results`, and the faults that it can be told to make."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    faults = Faults()

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass(self) -> None:
            faults.requests.append(f"{self.command} {self.path}")
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            connection = http.client.HTTPConnection(host, port)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            status, content = faults.bytes_of(self.command, self.path, answer.status, answer.read())
            self.send_response(status)
            for name, value in answer.getheaders():
                # Without the checksums of S3, which not every store behind an S3 interface has.
                if not name.lower().startswith(_NOT_PASSED):
                    self.send_header(name, value)
            is_head = self.command == "HEAD"
            self.send_header(
                "Content-Length", answer.getheader("Content-Length") or "0" if is_head else str(len(content))
            )
            self.end_headers()
            if is_head:
                return
            if faults.kind == "slow" and "/blobs/" in self.path:
                for byte in content[:30]:
                    self.wfile.write(bytes([byte]))
                    time.sleep(1)
                return
            self.wfile.write(content)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass

        def log_message(self, *arguments: object) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    proxy.daemon_threads = True
    faults.port = proxy.server_address[1]
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    connection = http.client.HTTPConnection(host, port)
    connection.request("PUT", "/results")
    assert connection.getresponse().status == 200
    yield f"http://127.0.0.1:{faults.port}", faults
    proxy.shutdown()
    server.stop()


def environment(endpoint: str, **more: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        **more,
    }


def clone(folder: Path, url: str | None, nets: str = NETS) -> Project:
    text = YAML + (f"store: {url}\n" if url else "")
    return Project(folder).write({"dodo.py": DODO, "nets.py": nets, "pipeline.yaml": text})


def models(project: Project) -> dict[str, bytes]:
    folder = project.root / "models"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


BUILD = ("check", "trace", "config", "repository")
FETCHED = "   trace net/1: from the shared store, made in "


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, s3: tuple[str, Faults]) -> tuple[Project, str]:
    """A project that was built and whose results are in the bucket."""
    url = "s3://results/team/vision"
    project = clone(tmp_path_factory.mktemp("first") / "here", url)
    ran = project.doit(*BUILD, **environment(s3[0]))
    assert ran.code == 0, ran.out
    assert "store" not in ran.out
    return project, url


def test_a_fresh_clone_with_a_warm_bucket_imports_no_torch_and_has_the_same_bytes(
    first: tuple[Project, str], s3: tuple[str, Faults], tmp_path: Path
) -> None:
    """In another folder, and with another virtual environment."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]
    ours = str(Path(store.__file__).parent.parent)
    (packages / "all.pth").write_text("\n".join([*here, ours]))
    project = clone(tmp_path / "elsewhere" / "a longer name", first[1])
    ran = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-X", "importtime", "-m", "doit", *BUILD],
        cwd=project.root,
        env={**os.environ, **environment(s3[0])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    assert FETCHED in ran.stdout
    imported = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
    assert "s3fs.core" in imported
    assert not imported & {"torch", "numpy", "torchvision", "tritonbuild.worker", "tritonbuild.trace"}
    assert models(project) == models(first[0])
    for kind in ("signature", "cases", "proof"):
        (path,) = (project.root / ".build" / kind / "net").iterdir()
        assert path.read_bytes() == (first[0].root / path.relative_to(project.root)).read_bytes()
    assert project.doit(*BUILD, **environment(s3[0])).tasks == []


@pytest.mark.parametrize(
    ("kind", "found", "warning"),
    [
        ("500", False, r".*(InternalError|500|sorry).*"),
        ("wrong bytes", True, r"blobs/\S+ has other bytes than its name says"),
        ("truncated", True, r"(blobs/\S+ has other bytes than its name says|.*)"),
        ("wrong description", False, r"index/\S+ is not what tritonbuild wrote"),
        ("slow", True, r"no answer within 2 s"),
    ],
)
def test_every_fault_is_a_miss_and_one_warning(
    s3: tuple[str, Faults],
    tmp_path: Path,
    kind: str,
    found: bool,
    warning: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment(s3[0]).items():
        monkeypatch.setenv(name, value)
    url = f"s3://results/fault/{kind.replace(' ', '-')}"
    first = Kept(tmp_path / "first", url)
    first.make(A, b"content" * 1000)
    first.store.share()
    monkeypatch.setattr(s3[1], "kind", kind)
    second = Kept(tmp_path / "second", url)
    result = second.find(A)
    assert (result is not None) == found
    if kind == "slow":  # other faults are answered, after some tries of the client
        monkeypatch.setattr(remote, "TIME_OUT_S", 2.0)
    assert result is None or not second.store.fetch(result, second.out())
    result = second.find(A)
    assert result is None or not second.store.fetch(result, second.out())
    said = re.findall(r"^   warning: (.*)$", capsys.readouterr().err, re.MULTILINE)
    assert len(said) == 1, said
    assert re.fullmatch(f"store {url}: {warning}", said[0]), said[0]
    assert second.find(B) is None


def test_a_fault_ends_in_a_right_build(first: tuple[Project, str], s3: tuple[str, Faults], tmp_path: Path) -> None:
    project = clone(tmp_path / "clone", first[1])
    s3[1].kind = "truncated"
    try:
        ran = project.doit(*BUILD, **environment(s3[0], TRITONBUILD_STORE="read-only"))
    finally:
        s3[1].kind = ""
    assert ran.code == 0, ran.out
    assert models(project) == models(first[0])
    assert ran.out.count("warning") == 1
    assert "Traceback" not in ran.out
    assert project.doit(*BUILD, **environment(s3[0])).tasks == []


def test_a_refused_connection_is_one_warning(first: tuple[Project, str], tmp_path: Path) -> None:
    project = clone(tmp_path / "clone", first[1])
    ran = project.doit(*BUILD, **environment("http://127.0.0.1:9"))
    assert ran.code == 0, ran.out
    assert ran.out.count("warning") == 1
    assert (
        '   warning: store s3://results/team/vision: Could not connect to the endpoint URL: "http://127.0.0.1:9/results"\n'
        "    what it may hold is made here; what is made here is not shared in this run\n"
    ) in ran.out
    assert models(project) == models(first[0])


def test_a_store_that_may_only_be_read_says_so_once_and_is_still_read(
    first: tuple[Project, str], s3: tuple[str, Faults], tmp_path: Path
) -> None:
    project = clone(tmp_path / "clone", first[1], NETS.replace("width=3", "width=5"))
    s3[1].kind = "403 put"
    try:
        ran = project.doit(*BUILD, **environment(s3[0]))
    finally:
        s3[1].kind = ""
    assert ran.code == 0, ran.out
    assert ran.out.count("warning") == 1
    assert "store s3://results/team/vision: may not be written: Access Denied\n" in ran.out
    assert "    TRITONBUILD_STORE=read-only says that it shall not be\n" in ran.out


def test_wrong_bytes_are_replaced_by_the_next_who_makes_them(s3: tuple[str, Faults], tmp_path: Path) -> None:
    url = "s3://results/replaced"
    assert clone(tmp_path / "first", url).doit(*BUILD, **environment(s3[0])).code == 0
    s3[1].kind = "wrong bytes"
    try:
        ran = clone(tmp_path / "second", url).doit(*BUILD, **environment(s3[0]))
    finally:
        s3[1].kind = ""
    assert ran.code == 0, ran.out
    assert "it is made here instead, and replaced where the store may be written\n" in ran.out
    assert any(line.startswith("PUT") and "/blobs/" in line for line in s3[1].requests[-12:])
    assert FETCHED in clone(tmp_path / "third", url).doit(*BUILD, **environment(s3[0])).out


@pytest.mark.parametrize(
    ("url", "warning"),
    [
        ("gs://bucket/prefix", "store gs://bucket/prefix: needs gcsfs"),
        ("nonsense://bucket", "store nonsense://bucket: Protocol not known: nonsense"),
        ("~nobody.here/store", "store ~nobody.here/store: Could not determine home directory."),
        ("s3://user:secret@bucket", "store s3://bucket: "),
    ],
)
def test_a_store_that_cannot_be_opened_is_a_warning_without_secrets(
    tmp_path: Path, url: str, warning: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    kept = Kept(tmp_path, url)
    kept.make(A, b"content")
    assert kept.find(B) is None
    kept.store.share()
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert said.startswith(f"   warning: {warning}")
    assert "secret" not in said


def test_four_runs_on_one_checkout_and_two_clones_build_each_key_once(s3: tuple[str, Faults], tmp_path: Path) -> None:
    url = "s3://results/four"
    one, two = clone(tmp_path / "one", url), clone(tmp_path / "two", url)
    running = [project.start(*BUILD, **environment(s3[0])) for project in (one, one, one, two, two)]
    outs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0] * 5, outs
    made = [out.count(".  trace:net/1\n") - out.count(FETCHED) for out in outs]
    assert sum(made[:3]) <= 1
    assert sum(made[3:]) <= 1
    assert sum(made) >= 1
    assert models(one) == models(two)


def test_a_result_in_a_bucket_costs_three_questions_and_its_files(
    s3: tuple[str, Faults], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not more, at whatever distance the bucket is; and none that grows with what else is in the bucket."""
    for name, value in environment(s3[0]).items():
        monkeypatch.setenv(name, value)
    one = Kept(tmp_path / "one", "s3://results/asked")
    content = os.urandom(40 << 20)  # several spans of several pieces, and an odd end
    one.make(A, content + b"end", base=B)
    one.store.share()
    two = Kept(tmp_path / "two", "s3://results/asked")
    s3[1].requests.clear()
    found, out = two.find(A, base=B), two.out()
    assert found is not None
    assert two.store.fetch(found, out)
    assert (out / "model.pt").read_bytes() == content + b"end"
    questions = [re.sub(r"\?list-type=2&prefix=([^&]*).*", r" list \1", unquote(line)) for line in s3[1].requests]
    reads_name = next((two.root / ".build/store/index" / B).iterdir()).name
    assert [line for line in questions if "/blobs/" not in line] == [
        f"GET /results list asked/index/{B}/",
        f"GET /results/asked/index/{B}/{reads_name}",
        f"GET /results/asked/results/{A[:2]}/{A}.json",
    ]
    pieces = [line for line in questions if "/blobs/" in line]
    assert {line.split()[0] for line in pieces} == {"GET"}
    assert len(pieces) == 11 + 1  # of model.pt: 4 and 4 of the first spans, 3 of the last; proof.json
    s3[1].requests.clear()
    assert two.find(C, base=C) is None
    assert not [line for line in s3[1].requests if "prefix=asked/index/&" in unquote(line)]


def test_one_store_serves_all_tasks_of_a_run(tmp_path: Path) -> None:
    """A bucket's client for each of a thousand tasks takes gigabytes."""
    assert store.of(tmp_path, "s3://results") is store.of(tmp_path, "s3://results")
    assert store.of(tmp_path, "s3://results") is not store.of(tmp_path / "other", "s3://results")


def test_the_store_is_asked_nothing_by_a_run_with_nothing_to_do(
    first: tuple[Project, str], s3: tuple[str, Faults], tmp_path: Path
) -> None:
    s3[1].requests.clear()
    assert first[0].doit(*BUILD, **environment(s3[0])).tasks == []
    assert s3[1].requests == []


def test_plan_tells_what_would_be_fetched(first: tuple[Project, str], s3: tuple[str, Faults], tmp_path: Path) -> None:
    project = clone(tmp_path / "clone", first[1])
    out = project.doit("plan", "trace", **environment(s3[0])).out
    assert re.fullmatch(
        r"trace:net/1  fetch, [\d.]+ kB from the shared store, made in [\d.]+ s\n"
        r"    never finished here, or forgotten\n"
        r"0 would run, 1 fetched, 0 may follow, 0 up to date\n",
        out,
    ), out
    assert not (project.root / "models").exists()
