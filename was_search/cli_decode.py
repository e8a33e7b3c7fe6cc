"""Commands that decode with a plan: text, and how fast; and the profile that predicts it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from was_search.cli_command import MODEL, STORAGE, Call, Gpus, PlanIn, command, load_plan, option

_PLACE = {name: MODEL[name] for name in ("model", "revision", "device", "dtype", "weights")}
_PROFILE = {"profile": option(str | None, "File of 'was-search profile': print what it predicts too.")}
_TEXT = {name: MODEL[name] for name in ("data", "test_sequences")}


@command(_PLACE)
def generate(
    call: Call,
    *,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    plan: PlanIn = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 64,
    gpus: Gpus = 1,
) -> None:
    """Decode greedily with a plan's sparse runtime, or densely without a plan."""
    from was_search import api

    loaded, base = load_plan(plan)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "gpus": gpus}
    call.run(lambda context: api.generate(context, loaded, prompt, **options), base)


@command(_PLACE, _TEXT, _PROFILE)
def bench(
    call: Call,
    *,
    plan: PlanIn = None,
    batch: Annotated[int, typer.Option(help="Rows that decode together.")] = 1,
    kv_length: Annotated[int, typer.Option(help="Positions in the cache.")] = 256,
    steps: Annotated[int, typer.Option(help="Steps timed for each row of the table.")] = 50,
    compiled: Annotated[bool, typer.Option("--compile", help="Time torch.compile's dense step too.")] = False,
) -> None:
    """Time one decode step, dense beside a plan, and what it reads."""
    from was_search import api

    loaded, base = load_plan(plan)
    call.run(
        lambda context: api.bench(context, loaded, batch=batch, kv_length=kv_length, steps=steps, compiled=compiled),
        base,
    )


@command(_PLACE, STORAGE)
def profile(
    call: Call,
    *,
    rows: Annotated[int, typer.Option(help="Rows that decode together, at most 8.")] = 1,
    kv_length: Annotated[int, typer.Option(help="Positions in the cache.")] = 256,
    steps: Annotated[int, typer.Option(help="Steps timed for each point.")] = 20,
    rounds: Annotated[int, typer.Option(help="Rounds over all points, of which the medians count.")] = 3,
    check: Annotated[int, typer.Option(help="Random vectors to time and to compare with their predictions.")] = 0,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Time torch.compile's dense step too; on a GPU it is the default."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File to write the profile to, for --profile.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure even where the database has it.")] = False,
) -> None:
    """Measure how a decode step's time depends on sparsity on this device, to predict it for any vector."""
    from was_search import api

    call.run(
        lambda context: api.profile(
            context,
            rows=rows,
            kv_length=kv_length,
            steps=steps,
            rounds=rounds,
            check_vectors=check,
            compiled=compiled,
            output=output,
            again=again,
        )
    )
