"""The runs of a comparison: which there are, how one goes, and how several processes share them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import benchmarks.harness.racing  # noqa: F401 - its methods are registered by importing it
from benchmarks.harness.ledger import Ledger, OutOfTime
from benchmarks.harness.methods import METHODS, Task, run_method
from benchmarks.harness.problem import Engine, Problem, Setup
from was_search.errors import ConfigError, TransientError
from was_search.texts.protocol import content_hash
from was_search.vectors.space import SPACES

SPACES_BY_DEFAULT = ("levels", "additive", "full")


@dataclass(frozen=True)
class Job:
    """One run of one method.

    Attributes:
        key: key of its row; the same for the same model, data, method, options and seed.
        method: the method's name.
        space: the space's name, or "-".
        target: target sparsity.
        seed: decides all random numbers.
        radius: radius of the space.
        checkpoints: numbers of full evaluations, rising; the last one is the budget.
    """

    key: str
    method: str
    space: str
    target: float
    seed: int
    radius: float
    checkpoints: tuple[float, ...]

    @property
    def expected_seconds(self) -> float:
        """A rough duration, to start a seed's long runs first: a method's time grows with the number of parameters."""
        dimensions = {"full": 3.0, "-": 0.3}.get(self.space, 1.0)
        method = METHODS[self.method]
        return self.checkpoints[-1] * (0.01 * method.random + method.seconds * dimensions)

    @property
    def name(self) -> str:
        return f"{self.method}{'' if self.space == '-' else ':' + self.space} at {self.target:g}, seed {self.seed}"


def pairs(names: list[str]) -> list[tuple[str, str]]:
    """(method, space) of ``METHOD`` or ``METHOD:SPACE``; the former stands for all its spaces but temperature.

    Raises:
        ConfigError: an unknown method, or a space that it cannot search.
    """
    found: list[tuple[str, str]] = []
    for name in names:
        wanted, _, space = name.partition(":")
        if wanted not in METHODS:
            raise ConfigError(f"methods: must be of {', '.join(METHODS)}, got {wanted!r}")
        method = METHODS[wanted]
        if space and space not in method.spaces:
            raise ConfigError(f"methods: {wanted} searches {', '.join(method.spaces)}, got {space!r}")
        default = [s for s in method.spaces if s in SPACES_BY_DEFAULT or s not in SPACES]
        found += [(wanted, s) for s in ([space] if space else default)]
    return list(dict.fromkeys(found))


def jobs(
    chosen: list[tuple[str, str]],
    targets: list[float],
    seeds: int,
    radius: float,
    checkpoints: tuple[float, ...],
    identity: dict[str, Any],
) -> list[Job]:
    """All runs, seed by seed, each seed's longest first.

    ``identity`` is the model, the data and how the problem is prepared.
    """
    found = []
    for name, space in chosen:
        method = METHODS[name]
        own = tuple(c for c in checkpoints if c <= method.most_evaluations) or (method.most_evaluations,)
        for target in targets:
            for seed in range(seeds if method.random else 1):
                key = content_hash(1, identity, method.name, method.settings, space, target, seed, radius, own)[:16]
                found.append(Job(key, method.name, space, target, seed, radius, own))
    return sorted(found, key=lambda job: (job.seed, -job.expected_seconds))


def run_job(engine: Engine, problem: Problem, job: Job, deadline: float = float("inf")) -> dict[str, Any]:
    """Run a method and confirm its vector at every checkpoint; returns what a row says of the run.

    Raises:
        OutOfTime: the deadline (``time.time()``) passed before its end.
    """
    method, data = METHODS[job.method], engine.data["search"].protocol
    ledger = Ledger(
        lambda asked: engine.losses(problem, asked, method.fitness),
        problem.shape,
        problem.target,
        n_sequences=data.n_sequences,
        tokens_per_sequence=data.sequence_length,
        evaluations=job.checkpoints[-1],
        deadline=deadline,
    )
    histograms = engine.histograms_of(problem)
    task = Task(problem.shape, problem.target, problem.seeds, job.space, job.radius, job.seed, engine, histograms)
    started = time.perf_counter()
    run_method(method, task, ledger)
    searched = time.perf_counter()
    checkpoints = []
    for evaluations in job.checkpoints:
        tokens = round(evaluations * ledger.tokens_per_evaluation)
        incumbent = ledger.at(tokens)
        if incumbent is None:
            continue
        if time.time() > deadline:
            raise OutOfTime
        checkpoints.append(
            {
                "evaluations": evaluations,
                "tokens": min(tokens, ledger.spent),
                "found_at_tokens": incumbent.tokens,
                "search_nats_shared_thresholds": incumbent.loss_nats,
                **engine.confirm(problem, incumbent.sparsities),
            }
        )
    last, extra = ledger.at(ledger.budget), 0
    if method.compensation is not None and last is not None:
        if time.time() > deadline:
            raise OutOfTime
        moved, compensation, extra = engine.compensate(problem, last.sparsities, method.compensation, job.seed)
        checkpoints[-1] |= {
            "tokens": ledger.spent + extra,
            **engine.confirm_compensated(problem, moved, compensation),
        }
    return {
        "checkpoints": checkpoints,
        "tokens": ledger.spent + extra,
        "full_evaluations": ledger.n_full,
        "nominal": None if last is None else problem.shape.sparsity(last.sparsities),
        "sparsities": None if last is None else np.round(last.sparsities, 5).tolist(),
        "seconds": {
            "search": round(searched - started, 2),
            "confirm": round(time.perf_counter() - searched, 2),
        },
    }


_ENGINE: Engine | None = None
_PROBLEMS: dict[float, Problem] = {}


def _gpus() -> list[str]:
    """What each of this process's GPUs is called in ``CUDA_VISIBLE_DEVICES``."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(number) for number in range(torch.cuda.device_count())] if seen is None else seen.split(",")


def _begin(setup: Setup, data: dict[str, Any], problems: list[Problem], gpus: list[str], begun: Any) -> None:
    """Set a worker process up. Each takes the next one of the ``gpus``; only their parent handles ctrl-C."""
    global _ENGINE
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    with begun.get_lock():
        number, begun.value = begun.value, begun.value + 1
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    _ENGINE = Engine(setup, data)
    _PROBLEMS.update({problem.target: problem for problem in problems})


def _work(job: Job, deadline: float) -> dict[str, Any] | None:
    assert _ENGINE is not None
    try:
        return run_job(_ENGINE, _PROBLEMS[job.target], job, deadline)
    except OutOfTime:
        return None
    except (torch.OutOfMemoryError, TransientError) as error:
        torch.cuda.empty_cache()
        print(f"{job.name} is left: {' '.join(str(error).split())[:200]}", file=sys.stderr, flush=True)
        return None


def results(
    engine: Engine, problems: list[Problem], todo: list[Job], processes: int, deadline: float
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Finished jobs as they come, in this process (1) or in ``processes`` spawned ones.

    A job is not handed out if one like it took longer than the time that is left; one that is in flight when the
    deadline passes is dropped. So is, of several processes, one for which the device's memory does not suffice.
    """
    by_target = {problem.target: problem for problem in problems}
    took: dict[tuple[str, str], float] = {}

    def fits(job: Job) -> bool:
        return time.time() + took.get((job.method, job.space), 0.0) < deadline

    waiting = list(todo)
    if processes == 1:
        for job in waiting:
            if not fits(job):
                continue
            started = time.time()
            try:
                found = run_job(engine, by_target[job.target], job, deadline)
            except OutOfTime:
                continue
            took[job.method, job.space] = time.time() - started
            yield job, found
        return
    flying: dict[Future[dict[str, Any] | None], tuple[Job, float]] = {}
    torch.cuda.empty_cache()  # what was prepared with is needed by the others; without a GPU it does nothing
    spawn = multiprocessing.get_context("spawn")
    shared = (engine.setup, engine.data, problems, _gpus(), spawn.Value("i", 0))
    pool = ProcessPoolExecutor(min(processes, len(waiting)), spawn, _begin, shared)
    try:
        while True:
            while len(flying) < processes and (job := next(filter(fits, waiting), None)):
                waiting.remove(job)
                flying[pool.submit(_work, job, deadline)] = (job, time.time())
            if not flying:
                return
            done, _ = wait(flying, return_when=FIRST_COMPLETED)
            for future in done:
                job, started = flying.pop(future)
                row = future.result()
                if row is not None:
                    took[job.method, job.space] = time.time() - started
                    yield job, row
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
