"""Code in a Python of its own, for what must be seen before anything else is imported; it neither looks for garbage nor
tidies up at its end, which with torch and transformers takes two fifths of its time."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

_AT_ONCE = "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"


def run_fresh(
    code: str, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The end of a process that ran ``code``: an exception in it is a returncode of 1, its traceback in ``stderr``."""
    whole = f"import gc\ngc.disable()\n{textwrap.dedent(code)}{_AT_ONCE}"
    command = [sys.executable, "-c", whole]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def said_by(code: str) -> str:
    """What ``code`` prints; it must end well."""
    run = run_fresh(code)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()
