from __future__ import annotations

import re
import time

import numpy as np
import pytest
import torch

from benchmarks.harness import runs
from benchmarks.harness.ledger import Ledger
from benchmarks.harness.methods import METHODS
from benchmarks.harness.problem import Problem
from benchmarks.harness.runs import jobs, pairs, results, run_job
from benchmarks.harness.standing import STANDING
from tests.benchmarks.bowl import SHAPE, TARGET, seeds
from was_search.errors import ConfigError, TransientError
from was_search.texts.protocol import EvaluationProtocol, TokenSet

PROBLEM = Problem(TARGET, SHAPE, seeds(), b"")


class Engine:
    """The bowl in place of a model; confirming adds the vector's distance to the best one."""

    def __init__(self, bowl) -> None:
        self.bowl = bowl
        protocol = EvaluationProtocol("x", "ab", "search", 10, 10, 16, False, "float32", 8, 1)
        self.data = {"search": TokenSet(protocol, np.zeros((16, 10), np.int64))}
        self.confirmed = 0
        self.fitnesses = set()

    def histograms_of(self, problem):
        return None  # the bowl has no thresholds

    def losses(self, problem, asked, fitness):
        self.fitnesses.add(fitness)
        return self.bowl.losses(asked)

    def confirm(self, problem, sparsities):
        self.confirmed += 1
        return {"test_nats": self.bowl.loss(sparsities) + 0.5, "achieved": {"test": SHAPE.sparsity(sparsities)}}


@pytest.fixture
def engine(bowl):
    return Engine(bowl)


def make(*names: str, targets=(TARGET,), n_seeds=2, checkpoints=(5.0, 10.0), identity=None):
    return jobs(pairs(list(names)), list(targets), n_seeds, 0.05, checkpoints, identity or {"model": "a"})


def test_a_name_without_a_space_stands_for_the_usual_ones():
    assert pairs(["cmaes"]) == [("cmaes", "levels"), ("cmaes", "additive"), ("cmaes", "full")]
    assert pairs(["evolution", "uniform"]) == [("evolution", "levels"), ("evolution", "full"), ("uniform", "-")]
    assert pairs(["cmaes:temperature", "cmaes:levels", "cmaes:levels"]) == [
        ("cmaes", "temperature"),
        ("cmaes", "levels"),
    ]


def test_refuses_unknown_methods_and_spaces():
    with pytest.raises(ConfigError, match=r"methods: must be of uniform, .*, got 'best'"):
        pairs(["best"])
    with pytest.raises(ConfigError, match="methods: evolution searches levels, full, got 'additive'"):
        pairs(["evolution:additive"])


def test_one_run_of_what_is_not_random_and_seed_by_seed_the_longest_first():
    found = make("uniform", "random:levels", "gp:full")
    assert [(job.method, job.seed) for job in found] == [
        ("gp", 0),
        ("random", 0),
        ("uniform", 0),
        ("gp", 1),
        ("random", 1),
    ]


def test_a_method_is_run_to_its_own_limit():
    assert {job.checkpoints for job in make("gp:levels", checkpoints=(50.0, 120.0, 250.0))} == {(50.0, 120.0)}
    assert {job.checkpoints for job in make("gp:levels", checkpoints=(200.0,))} == {(120.0,)}


def test_keys_tell_runs_apart_and_are_stable():
    base = make("cmaes:levels")
    assert [job.key for job in base] == [job.key for job in make("cmaes:levels")]
    others = [
        *make("cmaes:full"),
        *make("tpe:levels"),
        *make("cmaes:levels", targets=[0.7]),
        *make("cmaes:levels", checkpoints=(5.0, 20.0)),
        *make("cmaes:levels", identity={"model": "b"}),
    ]
    assert len({job.key for job in [*base, *others]}) == len(base) + len(others)


def test_a_row_holds_the_incumbent_at_every_checkpoint(engine, bowl):
    job = make("cmaes:levels", checkpoints=(2.0, 5.0, 20.0))[0]
    row = run_job(engine, PROBLEM, job)
    assert [c["evaluations"] for c in row["checkpoints"]] == [2.0, 5.0, 20.0]
    assert [c["tokens"] for c in row["checkpoints"]] == [320, 800, 3200]
    assert (row["tokens"], row["full_evaluations"]) == (3200, 20)
    assert row["nominal"] == pytest.approx(TARGET, abs=1e-12)
    for checkpoint in row["checkpoints"]:
        assert checkpoint["found_at_tokens"] <= checkpoint["tokens"]
        assert checkpoint["test_nats"] == pytest.approx(checkpoint["search_nats_shared_thresholds"] + 0.5, abs=1e-9)
    losses = [c["test_nats"] for c in row["checkpoints"]]
    assert losses == sorted(losses, reverse=True)
    np.testing.assert_allclose(bowl.loss(np.array(row["sparsities"])) + 0.5, losses[-1], atol=1e-4)


@pytest.mark.parametrize(("name", "fitness"), [("cmaes", "nll"), ("cmaes-kl", "kl")])
def test_a_ledger_takes_the_losses_of_its_methods_fitness(engine, name, fitness):
    row = run_job(engine, PROBLEM, make(f"{name}:levels", checkpoints=(6.0,))[0])
    assert engine.fitnesses == {fitness}
    assert row["full_evaluations"] == (6 if fitness == "nll" else 5)


def test_a_method_that_ends_early_keeps_its_vector(engine):
    row = run_job(engine, PROBLEM, make("uniform", checkpoints=(1.0, 5.0, 500.0))[0])
    assert [c["tokens"] for c in row["checkpoints"]] == [160, 160, 160]
    assert len({c["test_nats"] for c in row["checkpoints"]}) == 1


def test_a_checkpoint_before_the_first_full_evaluation_is_left_out(engine):
    row = run_job(engine, PROBLEM, make("uniform", checkpoints=(0.5, 1.0))[0])
    assert [c["evaluations"] for c in row["checkpoints"]] == [1.0]


def test_results_come_in_the_order_of_the_jobs(engine):
    todo = make("uniform", "fisher", "random:levels")
    found = list(results(engine, [PROBLEM], todo, 1, float("inf")))
    assert [job for job, _ in found] == todo


def test_the_deadline_drops_what_is_in_flight_and_hands_out_no_more(engine, monkeypatch):
    todo = make("random:levels", n_seeds=6)
    clock = {"now": 0.0}
    monkeypatch.setattr(runs.time, "time", lambda: clock["now"])
    ordinary = Ledger.evaluate

    def evaluate(*args, **options):
        clock["now"] += 1.0
        return ordinary(*args, **options)

    monkeypatch.setattr(Ledger, "evaluate", evaluate)
    # Ten evaluations and the call that is refused take 11 s, so two runs fit into 30 s; the third one is seen not to.
    found = list(results(engine, [PROBLEM], todo, 1, 30.0))
    assert [job.seed for job, _ in found] == [0, 1]
    assert clock["now"] == 22.0
    # Nothing known of the method yet: it is tried, and dropped.
    assert list(results(engine, [PROBLEM], todo, 1, 25.0)) == []
    assert clock["now"] > 25.0


def test_an_expired_deadline_hands_out_nothing(engine, bowl):
    assert list(results(engine, [PROBLEM], make("uniform"), 1, time.time() - 1)) == []
    assert bowl.calls == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of\nmemory"), TransientError("GPU out of memory")])
def test_a_process_without_memory_leaves_its_job(engine, monkeypatch, capsys, error):
    def full(*_):
        raise error

    (job,) = make("uniform")
    monkeypatch.setattr(runs, "_ENGINE", engine)
    monkeypatch.setitem(runs._PROBLEMS, TARGET, PROBLEM)
    monkeypatch.setattr(runs, "run_job", full)
    assert runs._work(job, float("inf")) is None
    assert re.fullmatch(rf"uniform at {TARGET:g}, seed 0 is left: .*out of memory\n", capsys.readouterr().err)


@pytest.mark.parametrize("problem", STANDING.values(), ids=list(STANDING))
def test_the_standing_problems_name_methods_that_there_are(problem):
    assert pairs(list(problem.methods or METHODS))
    assert max(problem.checkpoints, default=0.0) <= problem.evaluations


def test_every_method_has_a_space_that_is_run_by_default():
    for name in METHODS:
        assert pairs([name])
