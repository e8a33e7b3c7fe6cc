"""Commands about machines: what this one has, a database of one's own, and jobs on a Ray cluster."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from was_search.errors import ConfigError
from was_search.service.cli.command import EXIT_ERROR, Commands, Invocation
from was_search.service.options import Group

commands = Commands("Machines")
db = typer.Typer(no_args_is_help=True, help="Set a database up, as its owner.")
commands.typer.add_typer(db, name="db", rich_help_panel=commands.panel)


@commands.command(Group.MODEL, Group.TEXT, Group.STORAGE, "calibration_sequences", "search_sequences", "ray", "workers")
def doctor(
    invocation: Invocation,
    *,
    services: Annotated[bool, typer.Option("--services/--no-services", help="Also start Postgres and Ray.")] = True,
) -> None:
    """Check what this machine has, and with --model and --data what a run of them would meet."""
    from was_search.service.watching import machine_checks

    checks = invocation.run(lambda context: machine_checks.doctor(context, start_services=services))
    if any(check.good is False for check in checks):
        raise typer.Exit(EXIT_ERROR)


@db.callback()
def group() -> None:
    """Set a database up, as its owner."""


@db.command()
def init(
    storage: Annotated[
        str, typer.Option(envvar="WAS_SEARCH_STORAGE", help="The owner's Postgres URL, or embedded.")
    ] = "embedded",
    coordinator: Annotated[str, typer.Option(help="Role of those who run searches.")] = "was_search_coordinator",
    reader: Annotated[str, typer.Option(help="Role of those who look.")] = "was_search_reader",
) -> None:
    """Make or upgrade all tables, and two roles that can do no more than they need."""
    from was_storage.server.database import Database
    from was_storage.server.roles import init_roles

    with Database.open(storage) as database:
        done = init_roles(database, coordinator, reader)
    sys.stdout.write("".join(f"{statement};\n" for statement in done))


SUBMITTED = ("run", "calibrate", "seed", "search", "export", "compensate", "evaluate", "doctor")
"""Commands that make sense on a cluster."""


def check(arguments: list[str], known: Mapping[str, Any]) -> None:
    """Refuse here, not on the cluster, what one of the ``known`` commands would refuse.

    Raises:
        ConfigError: no command, or one that is not for a cluster; click's own error for a command's wrong options.
    """
    if not arguments or arguments[0] not in SUBMITTED:
        got = repr(arguments[0]) if arguments else "nothing"
        raise ConfigError(f"submit: a command to run is needed after --, one of {', '.join(SUBMITTED)}; got {got}")
    from was_workers.jobs import refuse_secrets

    refuse_secrets(arguments)
    known[arguments[0]].make_context(arguments[0], list(arguments[1:]))


@commands.typer.command(
    rich_help_panel=commands.panel, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def submit(
    context: typer.Context,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Ray's dashboard on the head.")
    ] = "http://127.0.0.1:8265",
    name: Annotated[str, typer.Option(help="Name of the job; Ray makes one up if it is not given.")] = "",
    detach: Annotated[bool, typer.Option("--detach", help="Return at once, without the job's output.")] = False,
) -> None:
    """Run a command on a Ray cluster as a job: was-search submit -- run --model ... --workers 8.

    The database's URL must be in the head's environment, as WAS_SEARCH_STORAGE. Stopping the job drains the
    study; submitting the same again goes on with it.
    """
    from was_workers.jobs import SUCCEEDED, Jobs

    check(context.args, context.find_root().command.commands)  # type: ignore[attr-defined]
    jobs = Jobs(address)
    job = jobs.submit(context.args, name=name)
    sys.stderr.write(
        f"job {job}: its output with 'ray job logs --follow {job}', an end with 'ray job stop {job}' "
        f"(both with --address {address})\n"
    )
    if detach:
        sys.stdout.write(f"{job}\n")
        return
    status = jobs.follow(job, typer.echo)
    if status != SUCCEEDED:
        sys.stderr.write(f"job {job}: {status.lower()}\n")
        raise typer.Exit(EXIT_ERROR)
