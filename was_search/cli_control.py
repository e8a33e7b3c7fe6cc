"""Commands that look at a study and steer it, from any machine that reaches its database."""

from __future__ import annotations

from typing import Annotated

import typer

from was_search.cli_command import STORAGE, Call, command
from was_search.control import Overrides, Wish
from was_search.errors import ConfigError

_PANEL = "While a study runs"
Study = Annotated[str, typer.Argument(help="Name of the study.", metavar="STUDY")]


@command(STORAGE, panel=_PANEL)
def pause(call: Call, *, study: Study) -> None:
    """Hand nothing out any more; what is in flight ends, and the coordinator stays."""
    _ask(call, study, Wish.PAUSE)


@command(STORAGE, panel=_PANEL)
def resume(call: Call, *, study: Study) -> None:
    """Let a paused study go on."""
    _ask(call, study, Wish.RUN)


@command(STORAGE, panel=_PANEL)
def drain(call: Call, *, study: Study) -> None:
    """Let what is in flight end, then end the run, as ctrl-C does; the same command goes on with it."""
    _ask(call, study, Wish.DRAIN)


@command(STORAGE, panel=_PANEL)
def cancel(call: Call, *, study: Study) -> None:
    """End the run at once; what is in flight waits for the next run."""
    _ask(call, study, Wish.CANCEL)


@command(STORAGE, panel=_PANEL)
def set_(
    call: Call,
    *,
    study: Study,
    trials: Annotated[int | None, typer.Option(help="Trials of the study; fewer drops those not begun.")] = None,
    workers: Annotated[str | None, typer.Option(help="Size of the pool of workers, or a range such as 2:64.")] = None,
    max_seconds: Annotated[
        float | None, typer.Option(help="Seconds of searching, all runs of this study; 0 lifts a limit.")
    ] = None,
    max_gpu_seconds: Annotated[float | None, typer.Option(help="Seconds of GPUs held.")] = None,
    max_failures: Annotated[int | None, typer.Option(help="Failed trials.")] = None,
    patience: Annotated[int | None, typer.Option(help="Finished trials without a better loss.")] = None,
) -> None:
    """Change a study's trials, workers or limits, while it runs or before its next run."""
    from was_search import api

    overrides = Overrides(trials, workers, max_seconds, max_gpu_seconds, max_failures, patience)
    call.run(lambda context: api.change(context, study, overrides))


@command(STORAGE, panel=_PANEL)
def status(
    call: Call,
    *,
    name: Annotated[str, typer.Argument(help="Name of the study; the newest one if not given.", metavar="STUDY")] = "",
    study: Annotated[str, typer.Option(help="The same as an option.")] = "",
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again, until ctrl-C.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks with --watch.")] = 2.0,
    gpu_price: Annotated[float | None, typer.Option(help="Price of a GPU hour; gives what the search cost.")] = None,
) -> None:
    """Show where a study stands."""
    from was_search import api

    if name and study and name != study:
        raise ConfigError(f"study: given twice, as {name!r} and as {study!r}; give one of them")
    wanted = name or study
    if watch:
        call.run(lambda context: api.watch(context, wanted, seconds=every, gpu_price=gpu_price))
    else:
        call.run(lambda context: api.status(context, wanted, gpu_price=gpu_price))


def _ask(call: Call, study: str, wish: Wish) -> None:
    from was_search import api

    call.run(lambda context: api.ask(context, study, wish))
