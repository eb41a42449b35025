"""Decides how the tritonserver of the nvidia-pytriton wheel runs without Docker, and that it never outlives us.

Hides the backend directory that Triton's Python backend wants, and the guard: a bash, leader of the server's own
process group, that waits for the end of a pipe which only this process holds. When the pipe closes, on success,
failure, Ctrl-C or SIGKILL, the guard kills server and model instances and removes their shared memory. Triton's own
way to stop takes two seconds and more, and leaves an instance that is still importing torch behind for ever
(measured, 2.51.0); there is nothing in this server that must be saved, so it is killed.

Source: triton-inference-server/python_backend, src/stub_launcher.cc and src/pb_stub.cc;
    triton-inference-server/pytriton, pytriton/server/triton_server.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tritonbuild.errors import ServerError

if TYPE_CHECKING:
    from collections.abc import Iterator

# $1 prefix of the shared memory, $2... the command. The pipe is moved to descriptor 3, which the server does not get.
_GUARD = """
exec 3<&0 </dev/null
prefix=$1; shift
"$@" 3<&- &
server=$!
{ read -r _; kill -KILL "$server"; } <&3 2>/dev/null &
wait "$server"
echo "tritonserver ended with status $?"
rm -f "/dev/shm/$prefix"*
kill -KILL 0
"""

_running: set[subprocess.Popen[bytes]] = set()


@contextmanager
def tritonserver(
    repository: Path, build_dir: Path, name: str, port: int, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run tritonserver on loopback, without models; it may end by itself when it does not come up.

    Args:
        repository: The model repository.
        build_dir: Where the backend directory is kept, as `server/<digest>/`.
        name: What the server calls itself (`--id`).
        port: Of the HTTP endpoint; there are no others.
        log: File to which the server's output is appended.

    Yields:
        The guard's process, which ends when the server does.

    Raises:
        ServerError: If this machine cannot run it; the text says what to install.
    """
    bash = shutil.which("bash")
    if bash is None:
        raise ServerError("server", "bash not found; Triton's Python backend needs it", "apt-get install bash")
    prepared = _prepare(build_dir)
    with _plain_paths(repository.resolve(), prepared.resolve()) as (models, plain):
        prefix = f"tritonbuild-{secrets.token_hex(8)}-"
        command = [bash, "-c", _GUARD, "tritonbuild-guard", prefix, *_command(models, plain, name, port, prefix)]
        owner = os.getpid()
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=_environment(plain),
                start_new_session=True,  # a Ctrl-C in the terminal is for us; we stop the server then
            )
        _running.add(process)
        try:
            yield process
        finally:
            _running.discard(process)
            if os.getpid() == owner:
                _stop(process)


def _command(models: Path, prepared: Path, name: str, port: int, prefix: str) -> list[str]:
    cores = len(os.sched_getaffinity(0))
    return [
        str(_wheel() / "bin" / "tritonserver"),
        f"--id={name}",
        f"--model-repository={models}",
        f"--backend-directory={prepared}/backends",
        "--model-control-mode=explicit",
        "--exit-on-error=false",
        "--strict-readiness=true",
        "--disable-auto-complete-config",
        "--http-address=127.0.0.1",
        f"--http-port={port}",
        f"--http-thread-count={cores + 8}",  # a load request holds its thread until the model is ready
        f"--model-load-thread-count={max(cores, 4)}",
        "--allow-grpc=false",
        "--allow-metrics=false",
        f"--backend-config=python,shm-region-prefix-name={prefix}",
        "--backend-config=python,stub-timeout-seconds=120",
    ]


def _environment(prepared: Path) -> dict[str, str]:
    """The stub finds its Python through PATH, as python3: the first one must be ours, for its torch."""
    wheel = _wheel()
    libraries = [wheel.parents[1] / "nvidia_pytriton.libs", wheel / "external_libs", prepared / "lib"]
    inherited = os.environ.get("LD_LIBRARY_PATH", "")
    return {
        # Threads of one instance that spin while they wait take the cores from the other instances.
        "OMP_WAIT_POLICY": "passive",
        **os.environ,
        "LD_LIBRARY_PATH": ":".join([*map(str, libraries), *filter(None, [inherited])]),
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
    }


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let the guard do its work, and see that the whole process group is gone."""
    assert process.stdin is not None
    process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    deadline = time.monotonic() + 2
    while _alive(process.pid) and time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.005)
    process.wait()


def _alive(group: int) -> bool:
    """Whether a process of the group still runs; one that only waits for its parent's attention does not."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, member_of = entry.read_text().rpartition(")")[2].split()[:3]
            if member_of == str(group) and state not in "ZX":
                return True
    return False


def _let_go() -> None:
    """In a forked child: close the pipes, which would otherwise keep the servers alive when the parent is killed."""
    for process in _running:
        assert process.stdin is not None
        process.stdin.close()


os.register_at_fork(after_in_child=_let_go)


def _prepare(build_dir: Path) -> Path:
    """Return a folder with what Triton's Python backend wants beside each other; made once per set of versions."""
    wheel, libpython = _wheel(), _libpython()
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = wheel / "python_backend_stubs" / python / "triton_python_backend_stub"
    if not stub.exists():
        known = ", ".join(sorted(os.listdir(stub.parents[1]), key=lambda name: int(name.split(".")[1])))
        raise ServerError("server", f"nvidia-pytriton has no Python backend for Python {python}, only for {known}")
    backend = Path(__file__).parent / "backends" / "pytorch" / "model.py"
    library = wheel / "backends" / "python" / "libtriton_python.so"
    parts = [importlib.metadata.version("nvidia-pytriton"), python, str(libpython), str(wheel), backend.read_text()]
    folder = build_dir / "server" / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        new = Path(scratch) / "new"
        for name, sources in {
            "backends/python": [library, library.with_name("triton_python_backend_utils.py"), stub],
            "backends/pytorch": [backend],
        }.items():
            (new / name).mkdir(parents=True)
            for source in sources:
                shutil.copy(source, new / name)  # no links: Triton refuses a library that leads out of its folder
        (new / "lib").mkdir()
        (new / "lib" / libpython.name).symlink_to(libpython)
        with contextlib.suppress(OSError):  # another process has put it there meanwhile
            new.rename(folder)
    return folder


def _wheel() -> Path:
    """Return the folder of tritonserver in the installed wheel; pytriton itself is not imported."""
    found = importlib.util.find_spec("pytriton")
    if found is None or not found.submodule_search_locations:
        raise ServerError(
            "server",
            "the nvidia-pytriton wheel, which carries tritonserver, is not installed",
            "install it (Linux on x86-64 only), or smoke with server=docker or server=<host>:<port>",
        )
    return Path(found.submodule_search_locations[0]) / "tritonserver"


def _libpython() -> Path:
    """Return the shared libpython of the running Python, to which the wheel's stub is linked."""
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    folders = [sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("LIBPL"), f"{sys.base_prefix}/lib"]
    for folder in filter(None, folders):
        if (Path(folder) / name).exists():
            return Path(folder) / name
    raise ServerError(
        "server",
        f"{name}, the shared library of {sys.base_prefix}/bin/python3, not found; Triton's Python backend needs it",
        f"Debian and Ubuntu: apt-get install {name.removesuffix('.so.1.0')}",
        "pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install",
    )


@contextmanager
def _plain_paths(models: Path, prepared: Path) -> Iterator[tuple[Path, Path]]:
    """Give both folders plain paths: the Python backend puts them into a shell command, unquoted; a : ends a path."""
    if re.fullmatch(r"[\w./@+,=-]+", f"{models}{prepared}", re.ASCII):
        yield models, prepared
        return
    with tempfile.TemporaryDirectory(prefix="tritonbuild-") as folder:
        (Path(folder) / "models").symlink_to(models)
        (Path(folder) / "prepared").symlink_to(prepared)
        yield Path(folder) / "models", Path(folder) / "prepared"
