"""The command line: one command a step. Options come from defaults, ``--config FILE`` and flags; flags win."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from was_search import __version__, cli_control, cli_decode, cli_submit
from was_search.cli_command import EXIT_DRAINED, EXIT_ERROR, MODEL, STORAGE, Call, Gpus, PlanIn, app, load_plan, stderr
from was_search.cli_command import command as _command
from was_search.cli_command import option as _option
from was_search.cli_db import db
from was_search.errors import ConfigError, WasError
from was_search.redaction import hide_arguments, redacted
from was_search.termination import Terminated, terminable

__all__ = ["app", "cli_control", "cli_decode", "cli_submit", "main"]

CLUSTER: dict[str, Any] = {
    "workers": _option(
        str | None,
        "Ray workers, each with the model: a number, or as many from 2 to 64 as the cluster has places for: 2:64.",
        rich_help_panel="Cluster",
    ),
    "gpus_per_worker": _option(
        float | None,
        "GPUs of one worker: a fraction shares one, 2 and more spread the model over them.",
        rich_help_panel="Cluster",
    ),
    "ray": _option(str | None, "auto, local, or a cluster's address.", rich_help_panel="Cluster"),
}
CALIBRATE: dict[str, Any] = {
    "score": _option(str | None, "Norm in the score: l1, l2 or none."),
    "masks": _option(str | None, "separate, or shared: one for q, k, v and one for gate, up."),
    "calibration_sequences": _option(int | None, "At most so many sequences for histograms."),
    "dense_prefix": _option(int | None, "Tokens at a sequence's start that are never masked."),
}
SEED: dict[str, Any] = {
    "target": _option(float | None, "Budget: share of the projections' weights to skip, in (0, 0.95)."),
    "target_speedup": _option(
        float | None, "Budget of time instead: how many times as fast as the dense model a decoding step is to be."
    ),
    "profile": _option(str | None, "File of 'was-search profile', which predicts a step's time."),
    "pricing_sequences": _option(int | None, "At most so many of the calibration sequences for Fisher prices."),
    "slope_sequences": _option(int | None, "At most so many sequences of the calibration split for slopes."),
    "seed_rounds": _option(int | None, "Rounds of the descent behind the Fisher prices."),
    "greedy_sequences": _option(
        int | None, "At most so many sequences for the greedy table, a baseline; 0 leaves it out."
    ),
}
SEARCH: dict[str, Any] = {
    "trials": _option(int | None, "Trials of the study; more than it has extends it.", rich_help_panel="Search"),
    "study": _option(
        str | None,
        "Name of the study; made from model, target and options if not given.",
        rich_help_panel="Search",
    ),
    "sampler": _option(str | None, "tpe, cmaes, gp, qmc, random or was-monotone.", rich_help_panel="Search"),
    "space": _option(str | None, "What is sampled: levels, temperature, additive or full.", rich_help_panel="Search"),
    "radius": _option(float | None, "How far levels may lie from the seed's.", rich_help_panel="Search"),
    "search_sequences": _option(int | None, "At most so many sequences for the fitness.", rich_help_panel="Search"),
    "descent_epochs": _option(
        int | None, "Times that the search descends from its best vector before it samples.", rich_help_panel="Search"
    ),
    "descent_chains": _option(int | None, "Descents side by side in an epoch.", rich_help_panel="Search"),
    "descent_rounds": _option(int | None, "Steps of one descent.", rich_help_panel="Search"),
    "descent_sequences": _option(int | None, "Sequences whose slopes make one step.", rich_help_panel="Search"),
    "fitness": _option(str | None, "nll, or kl: the divergence from the dense model.", rich_help_panel="Search"),
    "kl_top_k": _option(
        int | None, "Tokens that kl tells apart, the dense model's likeliest.", rich_help_panel="Search"
    ),
    "early_stopping": _option(
        bool | None,
        "Stop trials that are not promising.",
        "--early-stopping/--no-early-stopping",
        rich_help_panel="Search",
    ),
    "significance": _option(float | None, "Of the test that a trial is worse than the best.", rich_help_panel="Search"),
    "rung_keep": _option(
        float | None, "Share of trials that go on at each rung of sequences; 1: all.", rich_help_panel="Search"
    ),
    "trial_timeout": _option(
        float | None,
        "Seconds until an evaluation is taken for lost; 0, the default: by measure, 20 times the slowest so far, "
        "five minutes at least.",
        rich_help_panel="Search",
    ),
    "max_attempts": _option(int | None, "Workers that lose a vector before its slot fails.", rich_help_panel="Search"),
    "metrics": _option(
        str | None, "HOST:PORT or PORT where figures are served for Prometheus.", rich_help_panel="Search"
    ),
    "quarantine_slowdown": _option(
        float | None,
        "Give a worker no trials while it takes so many times its peers' time a token; 0: never.",
        rich_help_panel="Cluster",
    ),
    "quarantine_failures": _option(
        int | None, "Or once it has failed so many times in a row; 0: never.", rich_help_panel="Cluster"
    ),
    "quarantine_seconds": _option(
        float | None, "How long for the first time; twice as long each further time.", rich_help_panel="Cluster"
    ),
    "max_seconds": _option(
        float | None,
        "Stop after so many seconds of searching, all runs and all targets together.",
        rich_help_panel="Limits",
    ),
    "max_gpu_seconds": _option(
        float | None, "Stop after so many seconds of GPUs held, likewise.", rich_help_panel="Limits"
    ),
    "max_failures": _option(int | None, "Stop a study once so many trials have failed.", rich_help_panel="Limits"),
    "patience": _option(
        int | None, "Stop a study after so many finished trials without a better loss.", rich_help_panel="Limits"
    ),
    "notify": _option(
        str | None,
        "URL that gets a small JSON at the end of a run.",
        envvar="WAS_SEARCH_NOTIFY",
        rich_help_panel="Search",
    ),
    "warm_start": _option(
        str | None, "An earlier study whose best vector is one more seed of this one.", rich_help_panel="Search"
    ),
}
SEVERAL: dict[str, Any] = {
    "targets": _option(str | None, "Several budgets, such as 0.4,0.5,0.6: a study each, and what they trade off."),
    "target_speedups": _option(str | None, "Likewise several speed-ups, such as 1.5,1.8,2."),
    "max_ppl_increase": _option(
        str | None, "Such as 5%: find the highest target whose perplexity stays within this over dense."
    ),
}
PLAN_OUT: dict[str, Any] = {
    "plan": _option(str | None, "Folder for the exported plan."),
    "prefill": _option(str | None, "What the plan does with prompts: masked or dense."),
}


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        sys.stdout.write(f"was-search {__version__}\n")
        raise typer.Exit


@_command(MODEL, CALIBRATE, CLUSTER, STORAGE)
def calibrate(call: Call) -> None:
    """Take score histograms of the dense model on the calibration split."""
    from was_search import api

    def step(context: Any) -> None:
        found = api.calibrate(context)
        shape = found.shape
        context.reporter.note(
            f"{shape.n_blocks} blocks, {shape.params.sum() / 1e6:,.1f} M weights in the seven projections"
        )
        context.reporter.result({"key": found.key, "shape": shape.to_json()})

    call.run(step)


@_command(MODEL, CALIBRATE, SEED, CLUSTER, STORAGE)
def seed(call: Call) -> None:
    """Make the seed vectors and show what each projection costs."""
    from was_search import api
    from was_search.api.latency import flat_target
    from was_search.shape import PROJECTIONS

    def step(context: Any) -> None:
        seeds = api.seed(context)
        rows = [[seed.name, *(f"{100 * level:.0f}" for level in seed.levels)] for seed in seeds]
        columns = ["seed", *(str(b) for b in range(len(seeds[0].levels)))]
        context.reporter.table("Levels by block, %", columns, rows)
        costs = api.sensitivity(context, api.calibrate(context))
        share = round(flat_target(context, api.calibrate(context).shape), 4)
        context.reporter.table(
            f"Price of dropping {100 * share:g} % of a projection's inputs, and what the seed drops",
            ["block", *PROJECTIONS],
            [
                [str(b), *(f"{1e3 * c:.3g} ({100 * s:.0f} %)" for c, s in zip(cost, row, strict=True))]
                for b, (cost, row) in enumerate(zip(costs, seeds[-1].sparsities, strict=True))
            ],
            caption="Fisher price, millinats per token for 1 % of all projections' weights; in brackets the seed's",
        )
        found: dict[str, Any] = {
            seed.name: {"levels": seed.levels.tolist(), "sparsities": seed.sparsities.tolist()} for seed in seeds
        }
        context.reporter.result({**found, "sensitivity": costs.tolist()})

    call.run(step)


@_command(MODEL, CALIBRATE, SEED, SEARCH, CLUSTER, STORAGE)
def search(call: Call) -> None:
    """Create or resume a study and run it to its last trial."""
    from was_search import api
    from was_search.fitness import fitness_words

    def step(context: Any) -> bool:
        found = api.search(context)
        fitness = context.settings.fitness
        best = found.best
        if best is not None and best.loss_nats is not None:
            words = fitness_words(fitness, best.loss_nats, best.nll_nats)
            context.reporter.note(
                f"best: slot {best.number} ({best.origin}), {words}, on {context.tokens('search').protocol.describe()}"
            )
        context.reporter.result(
            {
                "study": found.study,
                "best_slot": best.number if best else None,
                "fitness": fitness,
                "best_loss_nats": best.loss_nats if best else None,
                "best_nll_nats": best.nll_nats if best else None,
                "drained": found.drained,
                "ending": str(found.ending),
            }
        )
        return bool(found.drained)

    _end(call.run(step))


@_command(MODEL, CALIBRATE, SEED, SEARCH, PLAN_OUT, CLUSTER, STORAGE)
def export(
    call: Call,
    *,
    interpolate: Annotated[
        bool,
        typer.Option(
            "--interpolate",
            help="Do not look for a study of the target: write the vector between the nearest studies below and above.",
        ),
    ] = False,
    with_weights: Annotated[
        bool,
        typer.Option(
            "--with-weights",
            help="Add the model's weights, laid out for decoding, its configuration and tokenizer: a folder to serve.",
        ),
    ] = False,
) -> None:
    """Re-calibrate the best vector of a study and write the plan.

    Where the target has no study and studies below and above have, the plan lies between theirs.
    """
    from was_search import api

    def step(context: Any) -> None:
        interpolated = interpolate or api.may_interpolate(context)
        folder = api.interpolate(context) if interpolated else api.export(context)
        if with_weights:
            api.add_weights(context, folder)
        context.reporter.note(f"plan: {folder}")
        context.reporter.result({"plan": str(folder)})

    call.run(step)


@_command(MODEL, CALIBRATE, SEED, SEVERAL, SEARCH, PLAN_OUT, CLUSTER, STORAGE)
def run(call: Call) -> None:
    """Calibrate, seed, search, export and compare, skipping what is cached; for one target or several."""
    from was_search import api

    def step(context: Any) -> bool:
        if context.settings.budgets or context.settings.speedups:
            return bool(api.run_targets(context).drained)
        if context.settings.increase_limit is not None:
            best = api.run_max_increase(context)
            if not best.drained and best.answer is None:
                raise typer.Exit(EXIT_ERROR)  # what was asked for does not exist, and was said
            if best.answer is not None:
                context.reporter.note(f"plan: {best.answer.result.plan}")
            return bool(best.drained)
        found = api.run(context)
        if found.plan is not None:
            context.reporter.note(f"plan: {found.plan}")
        return bool(found.search.drained)

    _end(call.run(step))


@_command(MODEL, CALIBRATE)
def evaluate(
    call: Call,
    *,
    plan: PlanIn = None,
    split: Annotated[str, typer.Option(help="calibration, search or test.")] = "test",
    tasks: Annotated[str, typer.Option(help="Comma-separated lm-eval tasks instead of perplexity.")] = "",
    limit: Annotated[int | None, typer.Option(help="First items of each task only.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with your own lm-eval task files.")] = None,
    calibration_sequences: Annotated[
        int | None, typer.Option(help="At most so many sequences of the calibration split.")
    ] = None,
    search_sequences: Annotated[int | None, typer.Option(help="At most so many sequences of the search split.")] = None,
    weights: Annotated[
        str,
        typer.Option(
            help="Formats to compare, such as none,int8,int4; without it the plan's, and none beside it. "
            "Tasks take one."
        ),
    ] = "",
    gpus: Gpus = 1,
) -> None:
    """Perplexity or tasks of a plan and of the dense model."""
    from was_search import api
    from was_search.protocol import SPLITS

    if split not in SPLITS:
        raise ConfigError(f"split: must be one of {', '.join(SPLITS)}, got {split!r}")
    loaded, base = load_plan(plan)
    call.flags.update(calibration_sequences=calibration_sequences, search_sequences=search_sequences)
    formats = [form.strip() for form in weights.split(",") if form.strip()]
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if len(formats) == 1:
        call.flags.update(weights=formats[0])

    def step(context: Any) -> Any:
        if not names:
            return api.evaluate(context, loaded, split, formats, gpus=gpus)
        if len(formats) > 1:
            raise ConfigError(f"weights: tasks take one format, got {weights!r}")
        return api.evaluate_on_tasks(context, loaded, names, limit=limit, include_path=include_path, gpus=gpus)

    call.run(step, base)


@_command(STORAGE)
def studies(call: Call) -> None:
    """List the studies of a database."""
    from was_search import api

    call.run(api.studies)


@_command(STORAGE)
def dashboard(
    call: Call,
    *,
    study: Annotated[str, typer.Option(help="Study to point to.")] = "",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8080,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Name under which a proxy, or DNS, makes the page known; may be given again."),
    ] = None,
    allow_edits: Annotated[
        bool, typer.Option("--allow-edits", help="Let the page change and delete studies; it has no login.")
    ] = False,
) -> None:
    """Serve optuna-dashboard on the studies; the page can only look."""
    from was_search import api

    names = allow_host or []
    call.run(
        lambda context: api.dashboard(
            context, study=study, host=host, port=port, allow_hosts=names, allow_edits=allow_edits
        )
    )


@_command(STORAGE, {"trials": SEARCH["trials"], "workers": CLUSTER["workers"], "target": SEED["target"]}, PLAN_OUT)
def demo(call: Call) -> None:
    """Run the whole main job on the packaged demo checkpoint, on CPU."""
    from was_search import api

    found = call.run(api.demo, api.demo_settings())
    _end(found.search.drained)


@_command(STORAGE, {"ray": CLUSTER["ray"]})
def doctor(
    call: Call,
    *,
    services: Annotated[bool, typer.Option("--services/--no-services", help="Also start Postgres and Ray.")] = True,
) -> None:
    """Tell what this machine has and what to do about what is missing."""
    from was_search import api

    checks = call.run(lambda context: api.doctor(context, start_services=services))
    if any(check.good is False for check in checks):
        raise typer.Exit(EXIT_ERROR)


app.add_typer(db, name="db")


def _end(drained: bool) -> None:
    if drained:
        stderr().print(
            "interrupted: what has finished is saved, the rest waits; resume with\n"
            f"  was-search {escape(shlex.join(sys.argv[1:]))}",
            soft_wrap=True,
        )
        raise typer.Exit(EXIT_DRAINED)


def main() -> None:
    """Entry point: errors that a user can mend are one line, never a traceback, and no password is shown."""
    hide_arguments()
    try:
        with terminable():
            app()
    except Terminated as ending:
        with suppress(OSError):  # its terminal may have gone
            stderr().print(str(ending))
        sys.exit(ending.code)
    except WasError as error:
        message = redacted(str(error))
        if "--json" in sys.argv:
            sys.stdout.write(json.dumps({"event": "error", "kind": type(error).__name__, "message": message}) + "\n")
        stderr().print(f"[red]error:[/] {escape(message)}", soft_wrap=True)
        sys.exit(EXIT_ERROR)
    except MemoryError as error:
        stderr().print(f"[red]error:[/] out of memory; use a smaller --batch-size ({escape(str(error))})")
        sys.exit(EXIT_ERROR)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not worth importing torch for
            raise
        stderr().print(
            f"[red]error:[/] GPU out of memory; use a smaller --batch-size or --sequence-length ({escape(str(error))})",
            soft_wrap=True,
        )
        sys.exit(EXIT_ERROR)


if __name__ == "__main__":
    main()
