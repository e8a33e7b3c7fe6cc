"""Connect to Ray: a local one of our own, or a running cluster to which our packages are shipped."""

from __future__ import annotations

import importlib
import logging
import os
import signal
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from psutil import Process

from was_search.errors import ResourceError, WasError
from was_search.process.collector import collector_at_rest
from was_search.process.redaction import SECRET_VARIABLES
from was_search.process.signals import Terminated, handler_kept
from was_workers.addresses import require_ray
from was_workers.local_ray import end_processes, family, ray_processes
from was_workers.session_folder import rays_choice, session_folder

_IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""A variable that Ray sets in the processes of a job."""

_STARTS = 3
"""Attempts to start a local Ray."""

_TOO_SLOW = "timed out during startup"
"""In what Ray says where it was not up in time."""

_logger = logging.getLogger(__name__)

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
        ResourceError: no cluster answers at the address, it asks for a token that we do not have, or none can be
            started here.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with collector_at_rest():
        import ray

    address = resolve_address(ray_option)
    _started(address, workers)
    try:
        offered = ray.cluster_resources()  # type: ignore[no-untyped-call]
        yield Cluster(address == "local", address, float(offered.get("CPU", 0)), float(offered.get("GPU", 0)))
    finally:
        _shut_down()


def start_anew(cluster: Cluster) -> None:
    """Start a local Ray in place of one whose processes have died; nothing of the old one is of use any more.

    Raises:
        ResourceError: none can be started.
    """
    _shut_down()
    _started(cluster.address, int(cluster.cpus))


def _shut_down(*, but: Set[Process] = frozenset()) -> None:
    """Leave Ray; of a local one nothing stays behind, except for processes of Ray that are spared by ``but``.

    Ray gives its raylet a second. Where that was too little, on a busy machine, the raylet's agents find out two
    seconds later, and then for a minute try to tell the control store, which has gone too.
    """
    import ray

    left = family(ray_processes() - but)
    ray.shutdown()
    if not ray.is_initialized():
        end_processes(left)


def _started(address: str, workers: int) -> None:
    """Connect to Ray, or start one; its failures are said in our words."""
    from ray.exceptions import AuthenticationError

    try:
        if address not in ("local", "auto"):
            require_ray(address)
        with handler_kept(signal.SIGTERM):  # Ray replaces it with its own handler: nothing would be drained or closed
            _start_patiently(address, workers)
    except SystemExit as error:  # from Ray's own handler, while it starts
        raise Terminated(signal.SIGTERM) from error
    except AuthenticationError as error:
        raise ResourceError(
            f"ray: the cluster at {address!r} asks for a token and none was found here; put the head's "
            "('ray get-auth-token') into RAY_AUTH_TOKEN, or its file's path into RAY_AUTH_TOKEN_PATH"
        ) from error
    except WasError:
        raise
    except Exception as error:  # Ray raises whatever it likes: Exception, RuntimeError, TimeoutError, ValueError
        raise ResourceError(_failure(address, error)) from error


def _start_patiently(address: str, workers: int) -> None:
    """Start again where a local Ray was not up within Ray's fixed 30 seconds, as on a machine that is busy."""
    for left in reversed(range(_STARTS)):
        before = ray_processes()
        try:
            return _start(address, workers)
        except BaseException as error:  # a signal's too
            if ray_processes() - before:
                _shut_down(but=before)
            if not left or address != "local" or _TOO_SLOW not in str(error):
                raise
        _logger.warning("the local Ray did not start within 30 s; it is tried again")


def _failure(address: str, error: Exception) -> str:
    """What to say where Ray did not start, or did not connect."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    reason = lines[0]
    if reason.startswith("Version mismatch"):
        return (
            f"ray: the cluster at {address!r} runs other versions ({' '.join(lines)[:300]}); install the cluster's Ray "
            "and Python here, or start the command on its head ('was-search submit')"
        )
    if address == "local":
        logs = f"{session_folder() or rays_choice()}/session_latest/logs"
        return (
            f"ray: none could be started on this machine ({reason}); its logs are in {logs}; "
            "RAY_TMPDIR names another folder for them, --ray HOST:PORT a cluster instead"
        )
    # A wrong token is the same ConnectionError as a wrong address.
    return (
        f"ray: no cluster could be reached at {address!r} ({reason}); start one with 'ray start --head', "
        "check that RAY_AUTH_MODE and the token are the head's, or use --ray local"
    )


def _start(address: str, workers: int) -> None:
    import ray
    import ray._private.worker

    # Ray prints on standard output what its processes say of every death, by the page; we say it in a line.
    ray._private.worker._worker_logs_enabled = False
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
    with _environment({"PYTHONPATH": path, "RAY_ADDRESS": None, **dict.fromkeys(SECRET_VARIABLES)}), _groups_apart():
        ray.init(
            address="local",
            num_cpus=max(workers, os.cpu_count() or 1),
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            **_in_a_short_folder(),
        )


@contextmanager
def _groups_apart() -> Iterator[None]:
    """Processes of Ray that are started inside the block get no signal that our process group does.

    ``timeout`` signals all of a command's group: Ray's processes would die before the command has closed what they
    hold, and Ray ends a command whose own processes have gone. They still end with it, whatever ends it.
    """
    import ray._private.services as services

    plain = services.ConsolePopen
    services.ConsolePopen = partial(plain, process_group=0)  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        services.ConsolePopen = plain  # type: ignore[misc]


def _in_a_short_folder() -> dict[str, Any]:
    """Options of ``ray.init`` for a session outside of Ray's own folder, whose path is too long; {} where it is not."""
    folder = session_folder()
    if folder is None:
        return {}
    large = Path(rays_choice()).parent  # what does not fit into memory goes where the machine's owner wants it
    return {"_temp_dir": str(folder), **({"object_spilling_directory": str(large)} if large.is_dir() else {})}


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
