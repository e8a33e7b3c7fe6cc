"""Several targets in one run: a study each on the same workers, warm-started in a row, and what they trade off."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from was_search.api.context import Context
from was_search.api.latency import check_target, profile_of
from was_search.api.run import STEP_COLUMNS, Row, RunResult, narrow, run, step_caption, step_cells
from was_search.api.search import model_label
from was_search.errors import ConfigError
from was_search.pareto import Point, dominated, pareto_figure
from was_search.protocol import content_hash, perplexity
from was_search.report import increase, interval_json
from was_search.study_names import folder_name


@dataclass(frozen=True)
class TargetRun:
    """One target's run; its rows are dense, uniform, further seeds and, last, the best.

    ``target`` is a sparsity, or with ``by_time`` a speed-up.
    """

    target: float
    result: RunResult
    by_time: bool = False

    @property
    def words(self) -> str:
        """The target for people."""
        return f"{self.target:g}x" if self.by_time else f"{100 * self.target:g} %"

    @property
    def study(self) -> str:
        return self.result.search.study

    @property
    def dense(self) -> Row:
        return self.result.rows[0]

    @property
    def uniform(self) -> Row:
        return self.result.rows[1]

    @property
    def best(self) -> Row:
        return self.result.rows[-1]


@dataclass(frozen=True)
class TargetsResult:
    """The targets that were run; ``drained`` says that the last one was interrupted and is not among them."""

    runs: list[TargetRun]
    pareto: Path | None
    drained: bool


def run_targets(context: Context) -> TargetsResult:
    """A study for each of the settings' targets or speed-ups, in rising order, each warm-started from the last one.

    Raises:
        ConfigError: no targets are set.
    """
    by_time = bool(context.settings.speedups)
    targets = context.settings.speedups or context.settings.budgets
    if not targets:
        raise ConfigError("targets: missing; give --targets with several budgets, or --target-speedups")
    for target in targets:
        check_target(context.at(target, by_time=by_time))  # what is out of reach is said before anything is run
    runs: list[TargetRun] = []
    for target in targets:
        words = f"{target:g}x" if by_time else f"{100 * target:g} %"
        context.reporter.note(f"\ntarget {words} ({len(runs) + 1} of {len(targets)})")
        done = run_at(context, target, runs[-1].study if runs else context.settings.warm_start, by_time=by_time)
        if done is None:
            return TargetsResult(runs, None, drained=True)
        runs.append(done)
    return TargetsResult(runs, report_targets(context, runs), drained=False)


def run_at(context: Context, target: float, warm_start: str, *, by_time: bool = False) -> TargetRun | None:
    """All steps for one of several targets, beside what the others have open; None if it was interrupted."""
    settings = context.settings
    label = f"{target:g}x" if by_time else f"{100 * target:g}"
    sibling = context.at(
        target,
        by_time=by_time,
        study=f"{settings.study}-{label}" if settings.study else "",
        warm_start=warm_start,
        plan=str(Path(settings.plan) / label) if settings.plan else "",
    )
    result = run(sibling)
    return None if result.search.drained else TargetRun(target, result, by_time)


def report_targets(context: Context, runs: list[TargetRun]) -> Path:
    """The Pareto table, and its plot as a file and on the page of each study; returns the file."""
    from was_storage.dashboard import annotate

    runs = sorted(runs, key=lambda run: run.target)
    points = [_point("best", run, run.best) for run in runs]
    points += [_point("uniform", run, run.uniform) for run in runs]
    lesser = dominated(points)[: len(runs)]
    protocol = context.tokens("test").protocol.describe()
    _show(context, runs, lesser, protocol)
    dense = perplexity(runs[0].dense.test.evaluation.loss_nats)
    figure = pareto_figure(points, dense, protocol)
    path = _folder(context, runs) / "pareto.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.write_html(path, include_plotlyjs=True)
    except OSError as error:
        raise ConfigError(f"plan: cannot write {path} ({error.strerror}); choose another folder") from error
    for each in runs:
        annotate(context.database.optuna_storage(), each.study, note=None, figures={"pareto": figure})
    context.reporter.note(f"plot: {path}")
    context.reporter.result(
        {
            "pareto": str(path),
            "protocol": context.tokens("test").protocol.to_json(),
            "targets": [_json(context, run, bad) for run, bad in zip(runs, lesser, strict=True)],
        }
    )
    return path


def increase_on_test(run: TargetRun) -> float:
    """Perplexity of the best over the dense model's on the test split, less 1."""
    return increase(run.best.test.evaluation.loss_nats, run.dense.test.evaluation.loss_nats)


def _point(method: str, run: TargetRun, row: Row) -> Point:
    loss = row.test.evaluation.loss_nats
    predicted_ms = None if row.step is None else row.step["predicted_ms"]
    return Point(method, run.target, row.test.achieved, perplexity(loss), run.words, predicted_ms)


def _folder(context: Context, runs: list[TargetRun]) -> Path:
    if context.settings.plan:
        return Path(context.settings.plan)
    if context.settings.study:
        return Path("was-runs") / folder_name(context.settings.study)
    return Path("was-runs") / f"{model_label(context)}-targets-{content_hash([run.study for run in runs])[:8]}"


def _show(context: Context, runs: list[TargetRun], lesser: list[bool], protocol: str) -> None:
    timed = all(each.best.step is not None for each in runs)
    profile = profile_of(context) if timed else None
    body = []
    for each, bad in zip(runs, lesser, strict=True):
        best = each.best
        achieved = (best.calibration_achieved, best.search.achieved, best.test.achieved)
        body.append(
            [
                each.words,
                f"{100 * best.nominal:.2f}",
                " ".join(f"{100 * v:.1f}" for v in achieved),
                f"{best.search.evaluation.loss_nats:.4f}",
                f"{best.test.evaluation.loss_nats:.4f}",
                f"{perplexity(best.test.evaluation.loss_nats):.3f}",
                f"{100 * increase_on_test(each):+.2f} %",
                f"{best.gap_nats:+.4f}",
                narrow(best.against_uniform),
                "yes" if bad else "no",
                *step_cells(best.step),
            ]
        )
    dense = runs[0].dense.test.evaluation.loss_nats
    context.reporter.table(
        "Best of each target",
        [
            "target",
            "nomi-\nnal %",
            "achieved %\nc/s/t",
            "search\nnats",
            "test\nnats",
            "test\nppl",
            "test ppl\nover dense",
            "gap",
            "test -\nuniform",
            "domi-\nnated",
            *(STEP_COLUMNS if timed else ()),
        ],
        body,
        caption="\n".join(
            [
                f"dense: {dense:.4f} nats per token on the test split, perplexity {perplexity(dense):.3f}",
                "dominated: another best or uniform drops as much on the test split (to 0.1 points) and is better",
                protocol,
                *([] if profile is None else [step_caption(profile)]),
            ]
        ),
    )


def _json(context: Context, run: TargetRun, bad: bool) -> dict[str, Any]:
    best = run.best
    return {
        "target": None if run.by_time else run.target,
        **({"target_speedup": run.target} if run.by_time else {}),
        **({} if best.step is None else {"step": best.step}),
        "study": run.study,
        "plan": str(run.result.plan),
        "nominal_sparsity": best.nominal,
        "achieved_on_calibration": best.calibration_achieved,
        "search": best.search.to_json(context),
        "test": best.test.to_json(context),
        "test_increase": increase_on_test(run),
        "gap_nats": best.gap_nats,
        "test_against_uniform": interval_json(best.against_uniform),
        "dominated": bad,
    }
