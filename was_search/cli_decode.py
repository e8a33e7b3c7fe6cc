"""Commands that decode with a plan: text, and how fast."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from was_search.cli_command import MODEL, Call, Gpus, PlanIn, command, load_plan

_PLACE = {name: MODEL[name] for name in ("model", "revision", "device", "dtype", "weights")}
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


@command(_PLACE, _TEXT)
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
