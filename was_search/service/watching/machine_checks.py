"""What this machine has, and what to do about what is missing."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from was_search import __version__
from was_search.service.context import Context
from was_search.service.watching.check import Check, guarded
from was_search.service.watching.input_checks import check_inputs, surroundings

if TYPE_CHECKING:
    from was_storage.server.database import Database
    from was_workers.cluster import Cluster


def doctor(context: Context, *, start_services: bool = True) -> list[Check]:
    """Look at Python, packages, GPU, compilers, Ray and Postgres, and at the model and the data, and show a table.

    Args:
        context: its storage option is the database that is tried; model and data are looked at if they are set.
        start_services: also open the database and connect to Ray, which takes some seconds.
    """
    checks = [_python(), _packages(), _gpu(), _triton(), _compiler(), _tasks()]
    checks += [*surroundings(context), *check_inputs(context)]
    if start_services:
        checks += [
            guarded("Postgres", lambda: _postgres(context.database)),
            guarded("Ray", lambda: _ray(context.cluster)),
        ]
    marks = {True: "ok", False: "missing", None: "none"}
    context.reporter.table(
        f"was-search {__version__}",
        ["", "", "found", "what to do"],
        [[check.name, marks[check.good], check.found, check.advice] for check in checks],
    )
    context.reporter.result({"checks": [vars(check) for check in checks]})
    return checks


def _python() -> Check:
    good = sys.version_info >= (3, 11) and platform.system() == "Linux"
    return Check(
        "Python",
        good,
        f"{platform.python_version()} on {platform.system()}",
        "" if good else "Linux and Python >= 3.11",
    )


def _packages() -> Check:
    names = ("torch", "transformers", "ray", "optuna", "sqlalchemy", "optuna-dashboard", "accelerate")
    found, missing = [], []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    return Check("packages", not missing, ", ".join(found), f"pip install {' '.join(missing)}" if missing else "")


def _gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        advice = (
            "searches run on CPU, which suits small models only"
            if built
            else "this is a CPU build of torch; for a GPU install a CUDA build (pytorch.org/get-started)"
        )
        return Check("GPU", None, "no CUDA device", advice)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    free, total = torch.cuda.mem_get_info()
    return Check(
        "GPU",
        True,
        f"{', '.join(names)}; {free / 2**30:.0f} of {total / 2**30:.0f} GiB free, CUDA {torch.version.cuda}",
    )


def _triton() -> Check:
    from was_kernels import triton_available

    good, reason = triton_available()
    advice = "" if good else "decoding falls back to the plain reference, which is right but not faster"
    return Check("Triton kernels", good or None, reason, advice)


def _compiler() -> Check:
    from was_kernels.runtime.compiled_code import compiles_here

    good, reason = compiles_here()
    advice = "" if good else "decoding on a CPU takes torch's own products, which is right but slower"
    return Check("C++ compiler", good or None, "compiles for this CPU" if good else reason, advice)


def _tasks() -> Check:
    try:
        return Check("lm-eval tasks", True, f"lm-eval {version('lm-eval')}")
    except PackageNotFoundError:
        return Check("lm-eval tasks", None, "not installed", "for evaluate --tasks: pip install 'was-search[tasks]'")


def _postgres(database: Database) -> Check:
    from sqlalchemy import text

    with database.engine.connect() as connection:
        server = str(connection.execute(text("show server_version")).scalar_one())
        over_tcp = connection.execute(text("SELECT inet_server_addr() IS NOT NULL")).scalar_one()
        tls = connection.execute(text("SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()")).scalar()
    how = "" if not over_tcp else f", {tls}" if tls else ", not encrypted"
    return Check("Postgres", True, f"{server} at {database.display_url}{how}")


def _ray(cluster: Cluster) -> Check:
    kind = "local" if cluster.local else f"cluster at {cluster.address}"
    return Check("Ray", True, f"{version('ray')}, {kind}: {cluster.cpus:g} CPUs, {cluster.gpus:g} GPUs")
