"""Terminals in which a guide's blocks are typed; each keeps what was exported in it, as a real one does."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from tests.chaos.counted_worker import FOLDER

ROOT = Path(__file__).resolve().parents[2]


class Machine:
    """One user's home on this machine, with commands on its path as an installation puts them there.

    Args:
        folder: of the home, the terminals' logs and all that is started; marks the processes.
        programs: of Postgres.
        postgres: environment variables that make ``sudo -u postgres`` reach the test's server.
    """

    def __init__(self, folder: Path, programs: Path, postgres: dict[str, str]) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.bin = folder / "bin"
        for made in (self.home, self.bin):
            made.mkdir()
        as_postgres = " ".join(f"{name}={shlex.quote(value)}" for name, value in postgres.items())
        self._command("was-search", f'exec {sys.executable} -m was_search "$@"')
        self._command("ray", f'exec {sys.executable} -m ray.scripts.scripts "$@"')
        # The server's package is there, and its superuser is reached through the server's socket.
        self._command("sudo", f'[ "$1" = apt-get ] && exit 0\nshift 2\nexec env {as_postgres} "$@"')
        paths = [str(ROOT / part) for part in ("", "storage", "workers", "kernels")]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "WAS_", "PG"))}
        self.environment = {
            **kept,
            FOLDER: str(folder),
            "HOME": str(self.home),
            "PATH": os.pathsep.join([str(self.bin), str(programs), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "RAY_TMPDIR": str(folder / "ray"),
            "RAY_worker_niceness": "0",
            "XDG_RUNTIME_DIR": str(folder),
        }

    def _command(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
        path.chmod(0o755)


class Terminal:
    """A shell on ``machine``."""

    def __init__(self, machine: Machine, name: str) -> None:
        self._machine = machine
        self._exports = machine.folder / f"{name}.exports"
        self._exports.touch()
        self.folder = machine.folder
        self.log = machine.folder / f"{name}.log"

    def type(self, text: str, *, answers: str = "", seconds: float = 600.0) -> str:
        """Run the lines of ``text`` and return what they printed; ``answers`` is what is typed at prompts.

        Raises:
            AssertionError: a line failed, or they took longer than ``seconds``.
        """
        before = self.log.stat().st_size if self.log.exists() else 0
        process = self._start(f"{text}\nexport -p > {self._exports}", answers)
        try:
            code: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            code = f"none within {seconds:.0f} s"
        printed = self.log.read_bytes()[before:].decode(errors="replace")
        assert code == 0, f"exit code {code} of\n{text}\n{printed[-6000:]}"
        return printed

    def leave_running(self, text: str) -> subprocess.Popen[bytes]:
        """Start ``text``, which goes on until it is ended."""
        return self._start(f"exec {text}", "")

    def _start(self, script: str, answers: str) -> subprocess.Popen[bytes]:
        typed = self._machine.folder / "answers"
        typed.write_text(answers, encoding="utf-8")
        # Not pipes: what `ray start` leaves behind would keep them open. A session of its own has no terminal to ask.
        with self.log.open("ab") as output, typed.open("rb") as given:
            return subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", f"source {self._exports}\n{script}"],
                cwd=self._machine.home,
                env=self._machine.environment,
                stdin=given,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
