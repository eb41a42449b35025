"""A second Docker engine with little room: its data lies on a tmpfs. For a full disk and a dead daemon."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def running(folder: Path, megabytes: int) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run an engine; gives its address for DOCKER_HOST, and its process. Needs root.

    Args:
        folder: A folder with a path short enough for sockets.
        megabytes: Room for its images.
    """
    data = folder / "data"
    data.mkdir()
    address = f"unix://{folder}/engine"
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(data)], check=True)
    try:
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [
                    # In a network of its own: an engine without a bridge removes docker0, which is another engine's.
                    "unshare",
                    "--net",
                    "dockerd",
                    f"--data-root={data}",
                    f"--exec-root={folder}/exec",
                    f"--pidfile={folder}/pid",
                    f"--host={address}",
                    "--bridge=none",
                    "--iptables=false",
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            for _ in range(300):
                version = ["docker", "version"]
                if (
                    subprocess.run(version, env={**os.environ, "DOCKER_HOST": address}, capture_output=True).returncode
                    == 0
                ):
                    break
                if process.poll() is not None:
                    raise RuntimeError((folder / "log").read_text())
                time.sleep(0.1)
            yield address, process
        finally:
            process.terminate()  # it ends its own containerd on SIGTERM
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()
    finally:
        subprocess.run(["umount", "--lazy", str(data)], check=True)
