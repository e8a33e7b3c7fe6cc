"""Users as containers make them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

UNNAMED = 54321
"""A user id that no passwd has."""

ROOT = Path(__file__).parents[2]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


BECOME = f"""
import os
os.setgroups([])
os.setgid({UNNAMED})
os.setuid({UNNAMED})
"""


def run_unnamed(imports: str, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``code`` under a user id without a name, in ``/`` and with no environment but this.

    ``imports`` run before: the interpreter may lie where only root can read it.
    """
    path = os.pathsep.join(str(ROOT / name) for name in (".", "storage", "workers", "kernels"))
    return subprocess.run(
        [sys.executable, "-c", imports + BECOME + code],
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
