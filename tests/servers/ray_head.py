"""A Ray head in processes of its own, as `ray start` makes it, that takes jobs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.servers.ports import free_port
from was_search.errors import ResourceError
from was_workers.jobs import Jobs

START_SECONDS = 300.0
"""For a head to take jobs; with several other things on two processors it needs minutes."""


@contextmanager
def ray_head(log: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """The address of its dashboard, which may not answer yet; see :func:`jobs_at`."""
    port, agent, gcs = free_port(), free_port(), free_port()
    folder = tempfile.mkdtemp(prefix="ray-job-", dir="/tmp")  # Unix sockets: a short path
    bin_folder = str(Path(sys.executable).parent)
    command = [
        f"{bin_folder}/ray", "start", "--head", f"--port={gcs}", f"--dashboard-port={port}", "--num-cpus=1",
        f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}", "--disable-usage-stats", "--block",
    ]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env={**environment, "PATH": f"{bin_folder}{os.pathsep}{environment['PATH']}"},
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()  # itself only, which ends the others: without them it waits for half a minute
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def jobs_at(address: str) -> Jobs:
    """The head's jobs, once it answers."""
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            return Jobs(address)
        except ResourceError:
            assert time.monotonic() < end, f"no Ray head answers at {address}"
            time.sleep(1.0)
