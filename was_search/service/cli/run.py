"""Commands of the main job: its steps one by one, all of them, and the demo."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.markup import escape

from was_search.errors import ConfigError
from was_search.service.cli.command import EXIT_DRAINED, EXIT_ERROR, Commands, Invocation, stderr
from was_search.service.options import Group

commands = Commands("Find a plan")

_CALIBRATE = (Group.MODEL, Group.TEXT, Group.CALIBRATION, Group.CLUSTER, Group.STORAGE)
_SEED = (*_CALIBRATE, Group.TARGET, Group.SEEDS)
_SEARCH = (*_SEED, Group.SEARCH, Group.DESCENTS, Group.LIMITS, Group.FAILURES)


@commands.command(*_SEARCH, Group.TARGETS, Group.COMPENSATION, Group.PLAN)
def run(invocation: Invocation) -> None:
    """Calibrate, seed, search, export and compare, skipping what is cached; for one target or several."""
    from was_search.service.steps import main_job
    from was_search.service.targets import max_increase, several

    def step(context: Any) -> bool:
        if context.settings.budgets or context.settings.speedups:
            return bool(several.run_targets(context).drained)
        if context.settings.increase_limit is not None:
            best = max_increase.run_max_increase(context)
            if not best.drained and best.answer is None:
                raise typer.Exit(EXIT_ERROR)  # no target is within the limit; the report has said so
            if best.answer is not None:
                context.reporter.note(f"plan: {best.answer.result.plan}")
            return bool(best.drained)
        found = main_job.run(context)
        if found.plan is not None:
            context.reporter.note(f"plan: {found.plan}")
        return bool(found.search.drained)

    _end(invocation.run(step))


@commands.command(*_CALIBRATE)
def calibrate(invocation: Invocation) -> None:
    """Take score histograms of the dense model on the calibration split."""
    from was_search.service.steps import calibration

    def step(context: Any) -> None:
        found = calibration.calibrate(context)
        shape = found.shape
        context.reporter.note(
            f"{shape.n_blocks} blocks, {shape.params.sum() / 1e6:,.1f} M weights in the seven projections"
        )
        context.reporter.result({"key": found.key, "shape": shape.to_json()})

    invocation.run(step)


@commands.command(*_SEED)
def seed(invocation: Invocation) -> None:
    """Make the seed vectors and show what each projection costs."""
    from was_search.service.reports.seeds import show_seeds
    from was_search.service.steps import seeding
    from was_search.service.steps.question import Question

    def step(context: Any) -> None:
        question = Question.of(context)
        seeds = seeding.seed(context, question)
        show_seeds(context.reporter, seeds, seeding.sensitivity(question), question.budget.flat)

    invocation.run(step)


@commands.command(*_SEARCH)
def search(invocation: Invocation) -> None:
    """Create or resume a study and run it to its last trial."""
    from was_search.service.steps import study
    from was_search.studies.fitness import fitness_words

    def step(context: Any) -> bool:
        found = study.search(context)
        fitness = context.settings.fitness
        best = found.best
        if best is not None and best.loss_nats is not None:
            words = fitness_words(fitness, best.loss_nats, best.nll_nats)
            protocol = found.question.tokens.search.protocol.describe()
            context.reporter.note(f"best: slot {best.number} ({best.origin}), {words}, on {protocol}")
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

    _end(invocation.run(step))


@commands.command(*_SEARCH, Group.COMPENSATION, Group.PLAN)
def export(
    invocation: Invocation,
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
            help="Add the model's weights, configuration and tokenizer: a checkpoint that other programs load too.",
        ),
    ] = False,
    layout: Annotated[
        str,
        typer.Option(
            help="With --with-weights: checkpoint, or columns, which only was-search reads and which starts fastest."
        ),
    ] = "checkpoint",
) -> None:
    """Re-calibrate the best vector of a study and write the plan.

    Where the target has no study and studies below and above have, the plan lies between theirs.
    """
    from was_search.service.steps import exporting
    from was_search.service.steps.question import Question
    from was_search.service.targets import interpolation

    if layout not in get_args(exporting.Layout):
        raise ConfigError(f"layout: must be {' or '.join(get_args(exporting.Layout))}, got {layout!r}")

    def step(context: Any) -> None:
        question = Question.of(context)
        interpolated = interpolate or interpolation.may_interpolate(context, question)
        folder = interpolation.interpolate(context, question) if interpolated else exporting.export(context)
        if with_weights:
            exporting.add_weights(context, folder, layout)  # type: ignore[arg-type]  # looked at above
        context.reporter.note(f"plan: {folder}")
        context.reporter.result({"plan": str(folder)})

    invocation.run(step)


@commands.command(*_CALIBRATE, Group.COMPENSATION, "search_sequences", "slope_sequences", "kl_top_k")
def compensate(
    invocation: Invocation,
    *,
    plan: Annotated[Path, typer.Option("--plan", help="Folder of the plan; its settings are the defaults.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the compensated plan; if not given, the plan's and -compensated."),
    ] = None,
) -> None:
    """Learn a compensation for a plan, on its own text or on another, and write the compensated plan."""
    from was_search.service.cli.plan import OF_A_COMPENSATION, load_plan
    from was_search.service.steps import plan_compensation

    loaded, base = load_plan(plan, OF_A_COMPENSATION)
    folder = output or plan.with_name(f"{plan.absolute().name}-compensated")

    def step(context: Any) -> None:
        if context.settings.compensation == "off":
            raise ConfigError("compensation: off leaves nothing to do here; leave it out")
        assert loaded is not None
        written = plan_compensation.compensate(context, loaded, folder)
        if written is not None:
            context.reporter.note(f"plan: {written}")
        context.reporter.result({"plan": None if written is None else str(written)})

    invocation.run(step, base)


@commands.command(Group.STORAGE, "trials", "workers", "target", "compensation", Group.PLAN)
def demo(invocation: Invocation) -> None:
    """Run the whole main job on the packaged demo checkpoint, on CPU."""
    from was_search.service.steps import demonstration

    found = invocation.run(demonstration.demo, demonstration.demo_settings())
    _end(found.search.drained)


def _end(drained: bool) -> None:
    if drained:
        stderr().print(
            "interrupted: what has finished is saved, the rest waits; resume with\n"
            f"  was-search {escape(shlex.join(sys.argv[1:]))}",
            soft_wrap=True,
        )
        raise typer.Exit(EXIT_DRAINED)
