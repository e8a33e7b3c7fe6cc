"""Connect to Ray: a local one of our own, or a running cluster to which our packages are shipped."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from was_search.errors import ResourceError
from was_search.process.redaction import SECRET_VARIABLES
from was_search.process.signals import Terminated, handler_kept

_IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""A variable that Ray sets in the processes of a job."""

PACKAGES = ("was_search", "was_storage", "was_workers", "was_kernels")


@dataclass(frozen=True)
class Cluster:
    """What Ray offers. ``local`` says that it was started by this process and ends with it."""

    local: bool
    address: str
    cpus: float
    gpus: float


def resolve_address(ray_option: str) -> str:
    """What ``auto`` stands for here: the address in RAY_ADDRESS, else ``local``; other options stay as they are."""
    return (os.environ.get("RAY_ADDRESS") or "local") if ray_option == "auto" else ray_option


@contextmanager
def connect(ray_option: str, *, workers: int) -> Iterator[Cluster]:
    """Ray for ``auto`` (the cluster named by RAY_ADDRESS, else local), ``local``, or an address.

    Raises:
        ResourceError: no cluster answers at the address, or it asks for a token that we do not have.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    from ray.exceptions import AuthenticationError

    address = resolve_address(ray_option)
    local = address == "local"
    if not local and address != "auto":
        _probe(address)
    try:
        with handler_kept(signal.SIGTERM):  # Ray replaces it with its own handler: nothing would be drained or closed
            _start(address, workers)
    except SystemExit as error:  # from Ray's own handler, while it starts
        raise Terminated(signal.SIGTERM) from error
    except AuthenticationError as error:
        raise ResourceError(
            f"ray: the cluster at {address!r} asks for a token and none was found here; put the head's "
            "('ray get-auth-token') into RAY_AUTH_TOKEN, or its file's path into RAY_AUTH_TOKEN_PATH"
        ) from error
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        # A wrong token is the same ConnectionError as a wrong address.
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ResourceError(
            f"ray: no cluster could be reached at {address!r} ({reason}); start one with 'ray start --head', "
            "check that RAY_AUTH_MODE and the token are the head's, or use --ray local"
        ) from error
    try:
        offered = ray.cluster_resources()  # type: ignore[no-untyped-call]
        yield Cluster(local, address, float(offered.get("CPU", 0)), float(offered.get("GPU", 0)))
    finally:
        ray.shutdown()


def _start(address: str, workers: int) -> None:
    import ray

    if address != "local":
        ray.init(
            address=address,
            # Inside a Ray job they are there already, and Ray takes a runtime environment but once.
            runtime_env=None if _IN_A_JOB in os.environ else {"py_modules": package_folders()},
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
        return
    folders = dict.fromkeys(str(Path(module).parent) for module in package_folders())
    path = os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])
    # Ray's processes find our packages as this one does and inherit no password: workers never touch the database. An
    # inherited address would win over "local" in them.
    with _environment({"PYTHONPATH": path, "RAY_ADDRESS": None, **dict.fromkeys(SECRET_VARIABLES)}):
        ray.init(
            address="local",
            num_cpus=max(workers, os.cpu_count() or 1),
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )


@contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Processes that are started inside the block inherit the ``changes``; None takes a variable away."""
    before = {name: os.environ.get(name) for name in changes}
    _set_environment(changes)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def package_folders() -> list[str]:
    """The folders of our four packages."""
    return [str(Path(str(importlib.import_module(name).__file__)).parent) for name in PACKAGES]


def _probe(address: str) -> None:
    """Refuse an address where nothing listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ResourceError(f"ray: must be auto, local or HOST:PORT, got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ResourceError(
            f"ray: nothing answers at {address} ({error}); start a cluster with 'ray start --head', or use --ray local"
        ) from error
