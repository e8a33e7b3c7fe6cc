"""Commands that look at studies and steer them, from any machine that reaches their database."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from was_search.errors import ConfigError
from was_search.service.cli.command import EXIT_ERROR, Commands, Invocation
from was_search.service.options import Group
from was_search.studies.control import Overrides, Wish

commands = Commands("Watch and steer studies")
Study = Annotated[str, typer.Argument(help="Name of the study.", metavar="STUDY")]


@commands.command(Group.STORAGE)
def studies(invocation: Invocation) -> None:
    """List the studies of a database."""
    from was_search.service.watching import study_list

    invocation.run(study_list.studies)


@commands.command(Group.STORAGE)
def status(
    invocation: Invocation,
    *,
    name: Annotated[str, typer.Argument(help="Name of the study; the newest one if not given.", metavar="STUDY")] = "",
    study: Annotated[str, typer.Option(help="The same name, as an option.")] = "",
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again until ctrl-C.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks with --watch.")] = 2.0,
    gpu_price: Annotated[
        float | None, typer.Option(help="Price of a GPU hour, to show what the search has cost.")
    ] = None,
) -> None:
    """Show where a study stands."""
    from was_search.service.watching import study_status

    if name and study and name != study:
        raise ConfigError(f"study: given twice, as {name!r} and as {study!r}; give one of them")
    wanted = name or study
    if watch:
        invocation.run(lambda context: study_status.watch(context, wanted, seconds=every, gpu_price=gpu_price))
    else:
        invocation.run(lambda context: study_status.status(context, wanted, gpu_price=gpu_price))


@commands.command(Group.STORAGE)
def delete(
    invocation: Invocation,
    *,
    study: Study,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; needed where there is no terminal.")] = False,
) -> None:
    """Delete a study with its trials and its plan in the database; plans in folders stay."""
    from was_search.service.watching import study_list

    def agreed(words: str) -> bool:
        if yes:
            return True
        if not sys.stdin.isatty():
            raise ConfigError(f"delete: give --yes to delete {words}; there is no terminal to ask on")
        print(f"delete {words}? [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    if not invocation.run(lambda context: study_list.delete(context, study, agreed)):
        raise typer.Exit(EXIT_ERROR)


@commands.command(Group.STORAGE)
def dashboard(
    invocation: Invocation,
    *,
    study: Annotated[str, typer.Option(help="Study to point to.")] = "",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8080,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Name under which a proxy, or DNS, makes the page known; may be repeated."),
    ] = None,
    allow_edits: Annotated[
        bool, typer.Option("--allow-edits", help="Let the page change and delete studies; it has no login.")
    ] = False,
) -> None:
    """Serve optuna-dashboard on the studies, read-only unless --allow-edits is given."""
    from was_search.service.watching import study_list

    names = allow_host or []
    invocation.run(
        lambda context: study_list.dashboard(
            context, study=study, host=host, port=port, allow_hosts=names, allow_edits=allow_edits
        )
    )


@commands.command(Group.STORAGE)
def pause(invocation: Invocation, *, study: Study) -> None:
    """Hand out no more trials; those in flight finish, and the coordinator keeps running."""
    _ask(invocation, study, Wish.PAUSE)


@commands.command(Group.STORAGE)
def resume(invocation: Invocation, *, study: Study) -> None:
    """Let a paused study go on."""
    _ask(invocation, study, Wish.RUN)


@commands.command(Group.STORAGE)
def drain(invocation: Invocation, *, study: Study) -> None:
    """Let the trials in flight finish, then end the run, as ctrl-C does; the same command continues it."""
    _ask(invocation, study, Wish.DRAIN)


@commands.command(Group.STORAGE)
def cancel(invocation: Invocation, *, study: Study) -> None:
    """End the run at once; the trials in flight wait for the next run."""
    _ask(invocation, study, Wish.CANCEL)


@commands.command(Group.STORAGE)
def set_(
    invocation: Invocation,
    *,
    study: Study,
    trials: Annotated[
        int | None, typer.Option(help="Trials of the study; a lower number drops those not begun.")
    ] = None,
    workers: Annotated[str | None, typer.Option(help="Size of the pool of workers, or a range such as 2:64.")] = None,
    max_seconds: Annotated[
        float | None, typer.Option(help="Limit in seconds of searching, all runs of this study; 0 lifts it.")
    ] = None,
    max_gpu_seconds: Annotated[float | None, typer.Option(help="Limit in seconds of GPUs held; 0 lifts it.")] = None,
    max_failures: Annotated[int | None, typer.Option(help="Limit of failed trials; 0 lifts it.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Limit of finished trials without a better loss; 0 lifts it.")
    ] = None,
) -> None:
    """Change a study's trials, workers or limits, while it runs or before its next run."""
    from was_search.service.watching import control

    overrides = Overrides(trials, workers, max_seconds, max_gpu_seconds, max_failures, patience)
    invocation.run(lambda context: control.change(context, study, overrides))


def _ask(invocation: Invocation, study: str, wish: Wish) -> None:
    from was_search.service.watching import control

    invocation.run(lambda context: control.ask(context, study, wish))
