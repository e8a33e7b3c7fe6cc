"""``was-search submit``: run another command as a Ray job on a cluster."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from was_search.cli_command import EXIT_ERROR, app
from was_search.errors import ConfigError

SUBMITTED = ("run", "calibrate", "seed", "search", "export", "evaluate", "doctor")
"""Commands that make sense there."""


def check(arguments: list[str]) -> None:
    """Raise a ConfigError, or click's own error, for what the command would refuse: here, and not on the cluster."""
    if not arguments or arguments[0] not in SUBMITTED:
        got = repr(arguments[0]) if arguments else "nothing"
        raise ConfigError(f"submit: a command to run is needed behind --, one of {', '.join(SUBMITTED)}; got {got}")
    from was_workers.jobs import refuse_secrets

    refuse_secrets(arguments)
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    commands[arguments[0]].make_context(arguments[0], list(arguments[1:]))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def submit(
    context: typer.Context,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Ray's dashboard on the head.")
    ] = "http://127.0.0.1:8265",
    name: Annotated[str, typer.Option(help="The job's; Ray makes one up if it is not given.")] = "",
    detach: Annotated[bool, typer.Option("--detach", help="Return at once, without the job's output.")] = False,
) -> None:
    """Run a command on a Ray cluster as a job: was-search submit -- run --model ... --workers 8.

    The database's URL must be in the head's environment, as WAS_SEARCH_STORAGE. Stopping the job drains the
    study; submitting the same again goes on with it.
    """
    from was_workers.jobs import SUCCEEDED, Jobs

    check(context.args)
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
