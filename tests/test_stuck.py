"""A test that hangs fails, and says where it and the processes that it started were."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HANGS = """
import subprocess, sys

def test_next_one_hangs(): pass

def test_hangs():
    child = subprocess.Popen([sys.executable, "-c", "import time\\ndef deep_down(): time.sleep(300)\\ndeep_down()"])
    try:
        child.wait()
    finally:
        child.kill()

def test_last(): pass
"""


def test_a_test_that_hangs_fails_with_all_stacks(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text(HANGS)
    command = [sys.executable, "-m", "pytest", "-p", "tests.stuck", "--timeout", "4", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
    run = subprocess.run(
        [*command, "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "1 failed, 2 passed" in run.stdout, run.stdout + run.stderr
    assert "Timeout (>4.0s)" in run.stdout
    stacks = run.stdout[run.stdout.index("Stacks shortly before the limit") :]
    assert re.search(r"test_one.py\", line \d+ in test_hangs", stacks)
    assert re.search(r"process \d+: .*python.* -c import time", stacks)
    if shutil.which("py-spy", path=Path(sys.executable).parent) and os.geteuid() == 0:
        assert "deep_down (<string>:2)" in stacks
