from __future__ import annotations

import json
import platform
import subprocess
from datetime import datetime
from pathlib import Path

import torch

from benchmarks.harness.conditions import conditions


def test_conditions_say_machine_versions_commit_and_time():
    found = conditions()
    assert set(found) == {"machine", "device", "versions", "commit", "when"}
    assert found["device"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == torch.__version__
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert found["commit"].removesuffix("+") == head.stdout.strip()
    assert datetime.fromisoformat(found["when"]).tzinfo is not None
    assert json.loads(json.dumps(found)) == found


def test_a_device_that_was_named_stands_in_the_row():
    assert conditions("a GPU")["device"] == "a GPU"
