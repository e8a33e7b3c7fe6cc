"""Fixtures shared by all tests: a real Postgres for those marked ``postgres``, and what a terminal is for others."""

from __future__ import annotations

import atexit
import functools
import gc
import os
import shutil
import signal
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.stuck import (  # noqa: F401  hooks of pytest
    pytest_itemcollected,
    pytest_runtest_makereport,
    pytest_timeout_cancel_timer,
    pytest_timeout_set_timer,
)

if TYPE_CHECKING:
    from was_storage.server.database import Database
    from was_storage.server.embedded import EmbeddedServer

SIDE_BY_SIDE = "PYTEST_XDIST_WORKER" in os.environ
"""Whether this is one of several processes that run tests at once, on processors that they share."""

_SLOW_SECONDS = 3.0
"""What a test that is marked ``slow`` takes, where the mark does not say."""

# Until all is collected: what imports make is no garbage, and looking through it takes a fifth of their time.
gc.disable()

os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # a process for each processor, most of them never used

if SIDE_BY_SIDE:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would starve its workers beside other tests

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job, which its children would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)

_ray: pytest.StashKey[Any] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None) and not SIDE_BY_SIDE:
        gc.enable()  # this process hands the tests out and runs none: it needs none of their imports
        return
    import hypothesis
    import torch
    import typer.testing

    torch.set_num_threads(1)  # the models are tiny: a second thread waits more than it works
    # The tree of our commands is built once: a process has one, and typer would build it for every invocation.
    typer.main.get_command = typer.testing._get_command = functools.cache(typer.main.get_command)
    # How long an example takes says something about the machine, not about the code; what is tried is the same each
    # time, unless FUZZ_EXAMPLES asks for more.
    hypothesis.settings.register_profile(
        "any machine",
        deadline=None,
        derandomize="FUZZ_EXAMPLES" not in os.environ,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    """What was imported so far stays: the garbage collector begins with what the tests make."""
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # extension modules complain of what is still there when all is over


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Side by side, the files with the slowest tests begin, so that the short ones fill up the end."""
    if SIDE_BY_SIDE:
        seconds: Counter[Path] = Counter()
        for item in items:
            if (slow := item.get_closest_marker("slow")) is not None:
                seconds[item.path] += slow.kwargs.get("seconds", _SLOW_SECONDS)
        items.sort(key=lambda item: -seconds[item.path])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("ray"):
        from tests.servers.kept_ray import KeptRay

        ray = item.config.stash.setdefault(_ray, None) or KeptRay()
        item.config.stash[_ray] = ray
        ray.keep = item.get_closest_marker("own_ray") is None


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (ray := session.config.stash.get(_ray, None)) is not None:
        ray.end()


@pytest.fixture
def hang_ups_count() -> Iterator[None]:
    """SIGHUP does what it does in a terminal, though these tests may run under nohup, which children inherit."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def server_home() -> Iterator[Path]:
    """A folder that the server's own account may enter: pytest's are private, and Postgres refuses root."""
    home = Path(tempfile.mkdtemp(prefix="was-test-"))
    home.chmod(0o755)
    yield home
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_server(server_home: Path) -> Iterator[EmbeddedServer]:
    """The session's embedded Postgres."""
    from tests.servers.postgres import spare_the_disk
    from was_storage.server.embedded import EmbeddedServer

    with EmbeddedServer.start(server_home / "postgres") as server:
        spare_the_disk(server)
        yield server


@pytest.fixture(scope="module")
def postgres_url(postgres_server: EmbeddedServer) -> str:
    """URL of a database made for this test module."""
    return postgres_server.url(f"test_{uuid.uuid4().hex[:12]}")


@pytest.fixture(scope="module")
def database(postgres_url: str) -> Iterator[Database]:
    """The module's database, open and migrated."""
    from was_storage.server.database import Database

    with Database.open(postgres_url) as opened:
        yield opened
