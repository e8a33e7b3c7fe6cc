"""Several targets, warm starts, limits and interpolation on real workers and Postgres, in small."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.doubles.small_run import assert_each_finished_once, coarse_greedy, small_settings
from tests.doubles.workers_here import PoolHere, workers_here
from was_search.errors import StudyError
from was_search.plan import Plan
from was_search.service.context import Context
from was_search.service.reports.progress import Reporter
from was_search.service.reports.study_report import increase
from was_search.service.settings import Settings
from was_search.service.steps.calibration import calibrate
from was_search.service.steps.exporting import export
from was_search.service.steps.seeding import seed
from was_search.service.steps.study import search
from was_search.service.targets.interpolation import interpolate, may_interpolate
from was_search.service.targets.max_increase import run_max_increase
from was_search.service.targets.several import run_targets
from was_search.service.watching.control import change
from was_search.studies.control import Overrides
from was_search.studies.overview import overview
from was_search.texts.protocol import perplexity
from was_search.vectors.bracket import BracketEnd
from was_search.vectors.budget import SparsityBudget
from was_search.vectors.seeds import retarget
from was_storage.studies.control import ControlStore
from was_storage.studies.overview import read_snapshot
from was_storage.studies.store import StudyStore

pytestmark = [pytest.mark.postgres, pytest.mark.slow]

TRIALS = 6


class Lines(Reporter):
    """Notes and tables as text."""

    text = ""

    def note(self, text: str) -> None:
        self.text += text + "\n"

    def table(self, title: str, columns, rows, caption: str = "") -> None:
        self.text += caption + "\n"


TINY = {"trials": TRIALS, "sequence_length": 64, "search_sequences": 12, "test_sequences": 12, "greedy_sequences": 1}


@pytest.fixture(scope="module", autouse=True)
def cheap() -> Iterator[None]:
    with coarse_greedy(), workers_here():
        yield


@pytest.fixture(scope="module")
def made(postgres_url: str, tmp_path_factory: pytest.TempPathFactory):
    """Settings and result of a run at two targets, given in falling order, and how many pools it started."""
    folder = tmp_path_factory.mktemp("targets")
    settings = small_settings(storage=postgres_url, targets="0.6,0.5", plan=str(folder), **TINY)
    started = []
    original = PoolHere.__init__

    def counting(self, *args, **kwargs) -> None:
        started.append(self)
        original(self, *args, **kwargs)

    patch = pytest.MonkeyPatch()
    patch.setattr(PoolHere, "__init__", counting)
    try:
        with Context(settings) as context:
            return settings, run_targets(context), len(started)
    finally:
        patch.undo()


@pytest.fixture
def at(made):
    """Settings of one target in the module's database."""
    settings, _, _ = made
    return lambda target, **more: small_settings(storage=settings.storage, target=target, **{**TINY, **more})


def test_each_target_is_a_study_on_one_pool(made, database) -> None:
    _, result, n_pools = made
    assert n_pools == 1
    assert [run.target for run in result.runs] == [0.5, 0.6]
    assert not result.drained
    for run in result.runs:
        assert_each_finished_once(database, run.study, TRIALS)
        assert StudyStore(database).get(run.study).identity["target"] == run.target
        assert Plan.load(run.result.plan).budget == run.target


def test_the_second_study_starts_from_the_firsts_winner(made, database) -> None:
    _, result, _ = made
    first, second = result.runs
    store = StudyStore(database)
    assert store.get(first.study).identity["warm start"] is None
    assert store.get(second.study).identity["warm start"] == first.study
    (warm,) = (slot for slot in store.slots(second.study) if slot.origin == "seed:warm")
    plan = Plan.load(first.result.plan)
    expected = retarget(plan.sparsities, SparsityBudget(plan.shape, 0.6))
    np.testing.assert_allclose(warm.sparsities, expected, atol=1e-12)
    assert [row.name for row in second.result.rows[:5]] == [
        "dense",
        "uniform",
        "greedy-uniform",
        "warm seed",
        "fisher seed",
    ]


def test_the_pareto_plot_holds_the_runs_figures(made, database) -> None:
    _, result, _ = made
    page = result.pareto.read_text(encoding="utf-8")
    assert "plotly.js v" in page  # the library is inside: nothing is fetched
    for run in result.runs:
        assert f"{round(perplexity(run.best.test.evaluation.loss_nats), 5)}" in page
        study = StudyStore(database).get(run.study)
        attributes = database.optuna_storage().get_study_system_attrs(study.optuna_study_id)
        assert any("pareto" in str(value) or "pareto" in key for key, value in attributes.items())
        assert any(key.startswith("dashboard:note") and "Gap" in str(value) for key, value in attributes.items())


def test_the_report_holds_both_splits_the_gap_and_both_intervals(made, database) -> None:
    _, result, _ = made
    for run in result.runs:
        report = StudyStore(database).get(run.study).report
        row = report["comparison"][-1]
        dense = report["comparison"][0]
        gap = (row["search"]["loss_nats"] - dense["search"]["loss_nats"]) - (
            row["test"]["loss_nats"] - dense["test"]["loss_nats"]
        )
        assert row["gap_nats"] == pytest.approx(gap, abs=1e-12)
        assert report["gap_nats"] == pytest.approx(gap, abs=1e-12)
        difference = run.best.test.evaluation.losses - run.uniform.test.evaluation.losses
        assert row["test_against_uniform"]["mean"] == pytest.approx(difference.mean(), abs=1e-12)
        assert set(row["test_against_fisher_seed"]) == {"mean", "low", "high"}
        assert {"achieved_on_calibration", "search", "test"} <= set(row)
        assert dense["test_against_uniform"] is None


def test_a_warm_study_goes_on_with_its_seed_when_the_earlier_one_changes(made, at, monkeypatch) -> None:
    _, result, _ = made
    first, second = result.runs
    with Context(at(0.6, warm_start=first.study)) as context:
        shape = calibrate(context).shape
        before = [s.sparsities for s in seed(context) if s.name == "warm"]
    monkeypatch.setattr(
        "was_search.service.steps.warm_start.winner", lambda record, slots: None
    )  # as if it had none any more
    with Context(at(0.6, warm_start=first.study)) as context:
        assert search(context).study == second.study
        after = [s.sparsities for s in seed(context) if s.name == "warm"]
        assert "pool" not in vars(context)
    np.testing.assert_array_equal(before, after)
    assert shape.sparsity(after[0]) == pytest.approx(0.6, abs=1e-12)


def test_earlier_studies_that_cannot_give_a_seed(made, at, database) -> None:
    _, result, _ = made
    name, store = result.runs[0].study, StudyStore(database)
    with Context(at(0.6, warm_start="nothing")) as context, pytest.raises(StudyError, match="'nothing' does not exist"):
        seed(context)
    with (
        Context(at(0.6, warm_start=name, study=name)) as context,
        pytest.raises(StudyError, match=r"warm_start: study .* cannot start from itself; choose another --study"),
    ):
        seed(context)
    record = store.get(name)
    for key, value in (("model", "f" * 64), ("score", "l1")):
        other = f"other-{key}"
        store.open_or_create(other, identity={**record.identity, key: value}, config={}, shape=record.shape, n_slots=1)
        has = re.escape(f"study has {value}, asked for {record.identity[key]}")
        with (
            Context(at(0.6, warm_start=other)) as context,
            pytest.raises(StudyError, match=f"warm_start: study '{other}' is of another {key}: {has}"),
        ):
            seed(context)
    store.open_or_create("empty", identity=record.identity, config={}, shape=record.shape, n_slots=1)
    with (
        Context(at(0.6, warm_start="empty")) as context,
        pytest.raises(StudyError, match="warm_start: study 'empty' has no complete trial yet; run it first"),
    ):
        seed(context)
    for other in ("other-model", "other-score", "empty"):
        store.delete(other)


def test_a_plan_between_two_studies(made, at, tmp_path: Path) -> None:
    _, result, _ = made
    below, above = (Plan.load(run.result.plan) for run in result.runs)
    with Context(at(0.53, plan=str(tmp_path / "plan"))) as context:
        assert may_interpolate(context)
        plan = Plan.load(interpolate(context))
    line = 0.7 * below.sparsities + 0.3 * above.sparsities  # 0.53 lies 0.3 of the way from 0.5 to 0.6
    np.testing.assert_allclose(plan.sparsities, line, atol=1e-12)
    assert plan.shape.sparsity(plan.sparsities) == pytest.approx(0.53, abs=1e-12)
    assert plan.budget == 0.53
    # the re-calibration's tolerance is 0.05 points of sparsity, or six passes
    assert plan.achieved["calibration"] == pytest.approx(0.53, abs=0.005)
    assert below.metrics["search"]["loss_nats"] < plan.metrics["search"]["loss_nats"] + 0.05
    found = plan.provenance
    assert found["searched"] is False
    assert found["origin"] == "interpolated"
    assert found["interpolated"]["below"]["study"] == result.runs[0].study
    assert found["interpolated"]["above"]["study"] == result.runs[1].study
    assert found["interpolated"]["share_of_above"] == pytest.approx(0.3)


@pytest.mark.parametrize(("target", "missing"), [(0.45, "below"), (0.7, "above")])
def test_one_side_is_not_enough(made, at, target: float, missing: str) -> None:
    with Context(at(target)) as context:
        assert not may_interpolate(context)
        with pytest.raises(StudyError) as error:
            interpolate(context)
    assert f"no study of this model, data and score {missing} {100 * target:g} % has a complete trial" in str(
        error.value
    )
    assert f"run 'was-search run' with a --target {missing} {100 * target:g} %" in str(error.value)


def test_other_data_has_no_neighbours(made, at) -> None:
    with Context(at(0.55, search_sequences=11)) as context, pytest.raises(StudyError, match="there is none of any"):
        interpolate(context)


def test_a_study_of_the_target_is_not_passed_by_silently(made, at) -> None:
    _, result, _ = made
    with Context(at(0.6)) as context, pytest.raises(StudyError) as error:
        may_interpolate(context)
    assert f"{result.runs[1].study} (other: warm start)" in str(error.value)
    assert "--interpolate to pass them by" in str(error.value)
    with Context(at(0.5)) as context:
        assert not may_interpolate(context)  # it has a study of its own
    with Context(at(0.55, study="named")) as context:
        assert not may_interpolate(context)  # export says that it does not exist
        with pytest.raises(StudyError, match="'named' does not exist"):
            export(context)


def test_the_highest_target_within_a_limit(made, at, tmp_path: Path) -> None:
    settings = at(0.6, max_ppl_increase="40%", trials=4, plan=str(tmp_path))
    with Context(settings) as context:
        found = run_max_increase(context)
    assert found.bracket is not None
    assert len(found.runs) == len(found.bracket.probes) <= 6
    assert found.answer is not None
    for run, probe in zip(found.runs, found.bracket.probes, strict=True):
        plan = Plan.load(run.result.plan)
        dense = plan.metrics["dense"]["search"]["loss_nats"]
        # what decided is what the exported plan of that very target says, to the last digit
        assert probe.increase == increase(plan.metrics["search"]["loss_nats"], dense)
        assert plan.budget == probe.target
    answer = Plan.load(found.answer.result.plan)
    assert answer.budget == found.bracket.inside.target
    assert increase(answer.metrics["search"]["loss_nats"], answer.metrics["dense"]["search"]["loss_nats"]) <= 0.4
    for earlier, run in zip(found.runs, found.runs[1:], strict=False):
        nearest = min(found.runs[: found.runs.index(run)], key=lambda r: abs(r.target - run.target))
        assert Plan.load(run.result.plan).provenance["settings"]["warm_start"] == nearest.study
        assert earlier.study != run.study
    assert found.pareto == tmp_path / "pareto.html"


def finished(database, study: str) -> int:
    return sum(n for state, n in StudyStore(database).get(study).counts.items() if state.finished)


def test_a_limit_on_time_is_for_all_targets(made, at, database, tmp_path: Path) -> None:
    """Also where it is typed again: what other targets have spent counts, whichever is still to be searched."""
    several = {"target": 0.6, "study": "limited", "plan": str(tmp_path), "trials": 4, "greedy_sequences": 0}
    with Context(at(**several, targets="0.5,0.6")) as context:
        both = run_targets(context)
    assert [run.cut_short_by for run in both.runs] == ["", ""]
    spent = ControlStore(database).spent(["limited-50", "limited-60"])
    assert spent.seconds > 0

    # It is spent: what there is, is exported, and no study of the third target is begun.
    limited = {**several, "targets": "0.5,0.6,0.7", "max_seconds": spent.seconds}
    with Context(at(**limited)) as context:
        found = run_targets(context)
        assert "pool" not in vars(context), "all figures were there"
    assert found.unsearched == (0.7,)
    assert [run.cut_short_by for run in found.runs] == ["", ""]
    assert "limited-70" not in {record.name for record in StudyStore(database).list()}

    # More trials for both: the first has not spent the limit, but both have.
    with Context(at(**{**limited, "trials": 400})) as context:
        found = run_targets(context)
    for run in found.runs:
        assert run.cut_short_by == "max_seconds"
        assert "s of searching for all targets, the limit is" in run.result.search.ending.detail
        assert finished(database, run.study) == 4
        assert run.result.plan is not None

    # A little more time: it goes to the first, and the others have what is left of it, which is nothing.
    lines = Lines()
    with Context(at(**{**limited, "trials": 400, "max_seconds": spent.seconds + 1.0}), lines) as context:
        found = run_targets(context)
    assert finished(database, "limited-50") > 4
    assert finished(database, "limited-60") == 4
    assert [run.cut_short_by for run in found.runs] == ["max_seconds", "max_seconds"]
    assert found.unsearched == (0.7,)
    assert "cut short: 60 % by max_seconds: " in lines.text
    assert "396 of 400 trials were never begun" in lines.text
    assert "no plan, as no trial was complete when a limit ended the search: 70 %" in lines.text
    assert overview(read_snapshot(database, "limited-60")).limits.max_seconds == spent.seconds + 1.0
    assert read_snapshot(database, "limited-60").elsewhere.seconds > 0

    # One's own limit goes before, and counts that study alone.
    with Context(Settings(storage=made[0].storage)) as context:
        change(context, "limited-60", Overrides(max_seconds=3600.0, trials=6))
    with Context(at(**{**limited, "trials": 400, "max_seconds": spent.seconds + 1.0})) as context:
        found = run_targets(context)
    assert finished(database, "limited-60") == 6
    assert [run.cut_short_by for run in found.runs] == ["max_seconds", ""]


def test_a_limit_that_leaves_no_target_with_a_trial(at, tmp_path: Path) -> None:
    settings = at(0.6, study="no time", targets="0.5,0.6", plan=str(tmp_path), max_seconds=1e-6, greedy_sequences=0)
    with Context(settings) as context, pytest.raises(StudyError, match="no target has a complete trial yet: raise the"):
        run_targets(context)
    assert not (tmp_path / "pareto.html").exists()


def test_a_limit_on_time_ends_the_probing(at, tmp_path: Path) -> None:
    """The first probe's study is complete; the second one would have to be searched."""
    several = {"study": "probed", "plan": str(tmp_path), "trials": 4, "greedy_sequences": 0}
    with Context(at(0.6, **{**several, "study": "probed-60"})) as context:
        search(context)
    with Context(at(0.6, max_ppl_increase="40%", max_seconds=0.01, **several)) as context:
        found = run_max_increase(context)
    assert found.bracket is not None
    assert found.bracket.ending is BracketEnd.CUT
    assert [probe.target for probe in found.bracket.probes] == [0.6]
