"""A compensation learned in a run: what the plan, the table and the cache hold, and what is resumed."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from tests.doubles.small_run import small_settings
from tests.doubles.workers_here import workers_here
from tests.was_search.test_compensation import same
from was_search.coordinator.model_calls import LearnCompensation
from was_search.errors import DataError, PlanError
from was_search.masks import slope
from was_search.masks.compensating import CompensationState
from was_search.plan import Plan
from was_search.service.context import Context
from was_search.service.reports.progress import Reporter
from was_search.service.reports.study_report import note_lines
from was_search.service.steps import compensation as step
from was_search.service.steps.compensation import STEPS_PER_CALL, learn_compensation, learning_options
from was_search.service.steps.dense import Dense
from was_search.service.steps.evaluation import evaluate
from was_search.service.steps.main_job import run
from was_search.service.steps.plan_compensation import compensate
from was_search.service.steps.question import Question
from was_search.shape import FloatArray
from was_storage.studies.store import StudyStore

pytestmark = [pytest.mark.postgres, pytest.mark.slow]

STEPS = 2 * STEPS_PER_CALL


class Notes(Reporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def made(postgres_url, tmp_path_factory):
    plan = str(tmp_path_factory.mktemp("run") / "plan")
    settings = small_settings(
        storage=postgres_url,
        trials=4,
        plan=plan,
        compensation="on",
        compensation_steps=STEPS,
        compensation_tokens=8 * 96,
    )
    notes = Notes()
    with workers_here(), Context(settings, notes) as context:
        result = run(context)
    return SimpleNamespace(settings=settings, result=result, plan=Plan.load(result.plan), notes=notes)


def test_the_plan_has_it_and_is_better_on_text_that_it_never_saw(made):
    assert made.plan.compensation is not None
    rows = {row.name.split(" (")[0]: row for row in made.result.rows}
    best, compensated = rows["best"], rows["compensated"]
    dense = rows["dense"].test.evaluation.loss_nats
    assert compensated.test.evaluation.loss_nats - dense < 0.9 * (best.test.evaluation.loss_nats - dense)
    assert compensated.calibration_achieved == pytest.approx(best.calibration_achieved, abs=2e-3)
    assert compensated.nominal == pytest.approx(0.6, abs=1e-6)
    assert not np.allclose(made.plan.sparsities, best_sparsities(made), atol=1e-3)


def best_sparsities(made) -> FloatArray:
    slots = {slot.number: slot for slot in made.result.search.slots}
    return slots[made.plan.provenance["slot"]].sparsities


def test_it_says_what_it_was_learned_from_and_judged_by(made):
    figures = made.plan.provenance["compensation"]
    assert figures["steps"] == STEPS
    assert figures["validation_kl_nats"]["with"] < figures["validation_kl_nats"]["without"]
    assert any("[search]" in words for words in figures["learned_from"])
    assert any("[calibration]" in words for words in figures["learned_from"])
    assert any(note.startswith("Compensation: divergence from the dense model ") for note in made.notes.said)


def test_the_studys_page_tells_of_it(made, database):
    report = StudyStore(database).get(made.result.search.study).report
    page = "\n".join(note_lines(report))
    assert ", with a compensation, thresholds re-taken" in page
    assert "Compensation: divergence from the dense model" in page


def test_evaluate_measures_the_plan_as_the_run_did(made):
    with Context(made.settings) as context:
        (found,) = evaluate(context, made.plan)
    assert found.sparse.loss_nats == pytest.approx(made.plan.metrics["test"]["loss_nats"], rel=1e-6)


def test_a_second_run_takes_it_from_the_cache(made, tmp_path, monkeypatch):
    monkeypatch.setattr(LearnCompensation, "run", None)
    settings = dataclasses.replace(made.settings, plan=str(tmp_path / "again"))
    with workers_here(), Context(settings) as context:
        again = Plan.load(run(context).plan)
    assert same(again.compensation, made.plan.compensation)
    np.testing.assert_array_equal(again.sparsities, made.plan.sparsities)
    np.testing.assert_array_equal(again.thresholds, made.plan.thresholds)


def test_a_killed_run_goes_on_where_it_was(made, monkeypatch):
    learn, done = LearnCompensation.run, []

    class KilledError(Exception):
        pass

    def run_until(n):
        def patched(call, model) -> CompensationState:
            if len(done) == n:
                raise KilledError
            done.append(call.state.done)
            return learn(call, model)

        monkeypatch.setattr(LearnCompensation, "run", patched)

    monkeypatch.setattr(step, "STEPS_PER_CALL", 3)
    settings = dataclasses.replace(made.settings, compensation_steps=6, workers=1)

    def compensated():
        with workers_here(), Context(settings) as context:
            question = Question.of(context)
            point = question.dense.point(best_sparsities(made), "the vector")
            options = learning_options(settings)
            return learn_compensation(
                question.dense, question.budget, options, best_sparsities(made), point, "the vector"
            )

    run_until(1)
    with pytest.raises(KilledError):
        compensated()
    run_until(2)
    compensated()
    assert done == [0, 3]


def test_more_workers_learn_the_same(made, monkeypatch):
    """Steps of a large model are divided among workers; here a part is a sequence."""
    monkeypatch.setattr(slope, "CPU_FLOP", 0.0)
    monkeypatch.setattr(step, "STEPS_PER_CALL", 3)
    hashed, found = step.content_hash, {}
    for workers in (1, 3):
        if workers > 1:
            monkeypatch.setattr(LearnCompensation, "run", None)
        monkeypatch.setattr(step, "content_hash", lambda *parts, n=workers: hashed(n, *parts))
        settings = dataclasses.replace(made.settings, compensation_steps=6, workers=workers)
        with workers_here(), Context(settings) as context:
            question = Question.of(context)
            point = question.dense.point(best_sparsities(made), "the vector")
            vector = best_sparsities(made)
            found[workers] = learn_compensation(
                question.dense, question.budget, learning_options(settings), vector, point, "the vector"
            )
    one, three = found.values()
    np.testing.assert_array_equal(one.sparsities, three.sparsities)
    np.testing.assert_array_equal(one.point.thresholds, three.point.thresholds)
    assert same(one.point.compensation, three.point.compensation)
    assert one.figures == three.figures


def test_a_plan_without_one_gets_one(made, tmp_path):
    settings = dataclasses.replace(made.settings, compensation="off", plan=str(tmp_path / "off"))
    plan = tmp_path / "off"
    with workers_here(), Context(settings) as context:
        run(context)
    with workers_here(), Context(dataclasses.replace(made.settings, compensation_steps=12)) as context:
        folder = compensate(context, Plan.load(plan), tmp_path / "new")
        other = dataclasses.replace(Plan.load(plan), fingerprint="0" * 64)
        with pytest.raises(PlanError, match="belongs to another model"):
            compensate(context, other, tmp_path / "never")
    found = Plan.load(folder)
    assert found.compensation is not None
    assert found.budget == pytest.approx(0.6, abs=1e-6)
    assert found.provenance["study"] == Plan.load(plan).provenance["study"]
    assert found.metrics["test"]["loss_nats"] < Plan.load(plan).metrics["test"]["loss_nats"]
    assert not (tmp_path / "never").exists()


def test_off_exports_the_vector_of_the_search(made, tmp_path):
    settings = dataclasses.replace(made.settings, compensation="off", plan=str(tmp_path / "off"))
    with workers_here(), Context(settings) as context:
        result = run(context)
    plan = Plan.load(result.plan)
    assert plan.compensation is None
    np.testing.assert_allclose(plan.sparsities, best_sparsities(made), atol=1e-9)
    assert "compensated" not in [row.name for row in result.rows]


def test_a_text_too_short_to_learn_from_is_an_error_of_the_command(made, tmp_path):
    """Before, the command ended well, and had written nothing; a run goes on without a compensation."""
    text = tmp_path / "few.txt"
    text.write_text("few words here\n" * 30)
    settings = dataclasses.replace(made.settings, data=str(text), compensation_steps=1)
    with workers_here(), Context(settings, notes := Notes()) as context:
        with pytest.raises(
            DataError, match="data: one sequence of the calibration split to learn from and one to judge"
        ):
            compensate(context, made.plan, tmp_path / "new")
        question = Question(settings, Dense(context))
        point = question.dense.point(made.plan.sparsities, "the plan")
        assert (
            learn_compensation(
                question.dense, question.budget, learning_options(settings), made.plan.sparsities, point, "x"
            )
            is None
        )
    assert [note for note in notes.said if note.startswith("no compensation: one sequence of the")]
    assert not (tmp_path / "new").exists()
