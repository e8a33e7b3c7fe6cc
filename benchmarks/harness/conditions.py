"""The conditions that a row was measured under, in one form for all benchmarks."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("transformers", "triton", "optuna", "cmaes", "numpy", "scipy", "ray", "sqlalchemy", "psycopg2-binary")


def conditions(device: str = "") -> dict[str, Any]:
    """Machine, device, versions, commit and time of a row.

    ``device`` is the accelerator's name; if not given, that of the first GPU, or "cpu".
    """
    if not device:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "machine": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "device": device,
        "versions": versions(),
        "commit": commit(),
        "when": now(),
    }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of Python, torch, its CUDA, and those of :data:`PACKAGES` that are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def commit() -> str:
    """Short hash of the checkout, with ``+`` for uncommitted changes; empty outside one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
