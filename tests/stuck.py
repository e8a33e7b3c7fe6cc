"""What a test was doing that runs into its limit: the stacks of its process and of all that it started.

``timeout`` in pyproject.toml is the limit of a test, its fixtures included; those on services have more. Shortly before
it is over, the stacks are taken, and the failure's report shows them.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

SERVICES_SECONDS = 900.0
"""Of a test on real processes: longer than what it waits for itself, whose end says more."""

_BEFORE_SECONDS = 10.0
_MOST_PROCESSES = 20
_timer = pytest.StashKey[threading.Timer]()
_stacks = pytest.StashKey[str]()


def pytest_itemcollected(item: pytest.Item) -> None:
    services = any(item.get_closest_marker(name) for name in ("ray", "postgres", "slow"))
    if services and item.get_closest_marker("timeout") is None:
        item.add_marker(pytest.mark.timeout(SERVICES_SECONDS))


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings) -> None:
    seconds = max(settings.timeout - _BEFORE_SECONDS, settings.timeout / 2)
    item.stash[_timer] = timer = threading.Timer(seconds, _look, [item])
    timer.daemon = True
    timer.start()


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> None:
    if (timer := item.stash.get(_timer, None)) is not None:
        timer.cancel()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if report.failed and _stacks in item.stash:
        report.sections.append(("Stacks shortly before the limit", item.stash[_stacks]))
    return report


def _look(item: pytest.Item) -> None:
    item.stash[_stacks] = own_stacks() + "".join(map(stacks_of, descendants(os.getpid())[:_MOST_PROCESSES]))


def own_stacks() -> str:
    """Of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def stacks_of(process: int) -> str:
    """A process's command and, of a Python, its threads' stacks: py-spy reads them, which Ray brings along."""
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    except OSError:
        return ""
    shown = f"\nprocess {process}: {command}\n"
    spy = shutil.which("py-spy", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if spy is None:
        return shown
    try:
        found = subprocess.run([spy, "dump", "--pid", str(process)], capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return shown
    return shown + found.stdout


def descendants(process: int) -> list[int]:
    """The processes that ``process`` started and those that they started, as far as they are still theirs."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(after_name[1]), []).append(int(folder.name))
    found = [process]
    for each in found:
        found += parents.get(each, [])
    return found[1:]
