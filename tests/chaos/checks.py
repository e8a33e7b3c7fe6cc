"""What must hold at the end: every slot once, Optuna in agreement, no evaluation too many, the same losses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import optuna
from optuna.trial import TrialState

from tests.chaos.cluster import STUDY, UNDISTURBED, Cluster, Exit
from tests.chaos.counted_worker import EvaluationLog, vector_name
from tests.chaos.faults import Hit
from was_search.studies.slots import Slot, SlotState
from was_storage.server.database import Database
from was_storage.studies.store import StudyStore

_ENDS = {
    "another coordinator is running it": "refused",
    "another coordinator has taken over": "replaced",
    "cannot connect to": "database down",
    "is restarting": "database down",
    "the connection was lost": "database down",
}
_TOLD_AS = {
    SlotState.COMPLETE: TrialState.COMPLETE,
    SlotState.STOPPED: TrialState.PRUNED,
    SlotState.FAILED: TrialState.FAIL,
}


@dataclass
class Witness:
    """Results as they were first seen: a finished slot never changes again, and none goes missing."""

    seen: dict[int, tuple[str, str, float | None]] = field(default_factory=dict)

    def look(self, cluster: Cluster) -> None:
        rows = cluster.postgres.query(
            "SELECT number, state, finished_at, loss_nats FROM was.slot s JOIN was.study t ON t.id = s.study_id "
            "WHERE t.name = :study AND finished_at IS NOT NULL",
            study=STUDY,
        )
        for row in rows:
            now = (row.state, str(row.finished_at), row.loss_nats)
            assert self.seen.setdefault(row.number, now) == now, f"slot {row.number} finished twice"


@dataclass(frozen=True)
class Summary:
    """Figures of a run that passed.

    ``attempts`` are hand-outs, ``late`` the replies taken although they came after the deadline, ``ends`` how the
    coordinators ended.
    """

    slots: int
    attempts: int
    evaluations: int
    late: int
    compared_vectors: int
    compared_losses: int
    ends: dict[str, int]


def check(cluster: Cluster, hits: list[Hit], witness: Witness) -> Summary:
    """Raise AssertionError for the first rule that is broken."""
    witness.look(cluster)
    with Database.open(cluster.postgres.url) as database:
        store = StudyStore(database)
        slots, undisturbed = store.slots(STUDY), store.slots(UNDISTURBED)
        trials = optuna.load_study(study_name=STUDY, storage=database.optuna_storage()).trials
    check_slots(slots, cluster.plan.trials, witness)
    check_trials(slots, trials)
    cluster.log.read()
    late = check_lost(slots, hits, cluster.log, cluster.plan.trial_timeout)
    evaluations = check_evaluations(cluster, slots, undisturbed)
    vectors, losses = check_losses(slots, undisturbed)
    ends = Counter(how_it_ended(end) for end in cluster.exits)
    return Summary(len(slots), sum(slot.attempt for slot in slots), evaluations, late, vectors, losses, dict(ends))


def check_slots(slots: list[Slot], n: int, witness: Witness) -> None:
    """n slots, each finished with a result, every result as it was first seen."""
    numbers = [slot.number for slot in slots]
    assert numbers == list(range(n)), f"slots should be 0 to {n - 1}, there are {numbers}"
    unfinished = {slot.number: slot.state for slot in slots if not slot.state.finished}
    assert not unfinished, f"slots left unfinished: {unfinished}"
    failed = {slot.number: slot.error for slot in slots if slot.state is SlotState.FAILED}
    assert not failed, f"slots lost to faults: {failed}"
    assert set(witness.seen) == set(range(n))


def check_trials(slots: list[Slot], trials: list[optuna.trial.FrozenTrial]) -> None:
    """One trial a slot with the same parameters and outcome; none is left RUNNING, none is without a slot."""
    running = [trial.number for trial in trials if not trial.state.is_finished()]
    assert not running, f"trials left unfinished: {running}"
    by_id = {trial._trial_id: trial for trial in trials}
    assert sorted(by_id) == sorted(slot.trial_id for slot in slots), "trials and slots differ"
    for slot in slots:
        trial = by_id[slot.trial_id]
        assert trial.user_attrs["slot"] == slot.number
        assert trial.params == slot.params
        assert trial.state is _TOLD_AS[slot.state]
        told = trial.value if slot.state is SlotState.COMPLETE else trial.intermediate_values[len(slot.losses)]
        assert told == slot.loss_nats


def check_lost(slots: list[Slot], hits: Iterable[Hit], log: EvaluationLog, deadline_seconds: float) -> int:
    """Every evaluation that a fault ended was handed out again: so the fault did strike work in flight.

    One that a fault delayed beyond its deadline may instead have been taken, if the coordinator, which waited for the
    database, had not looked for it since; returns how many were.
    """
    late = 0
    for hit in hits:
        for number, attempt in hit.lost:
            if slots[number].attempt > attempt:
                continue
            taken = hit.fault == "delay a reply" and log.late_unseen(STUDY, number, attempt, deadline_seconds)
            assert taken, f"{hit.fault} ({hit.what}): slot {number} was not handed out again"
            late += 1
    return late


def check_evaluations(cluster: Cluster, slots: list[Slot], undisturbed: list[Slot]) -> int:
    """No vector was evaluated more often than it was handed out; returns the study's evaluations.

    The undisturbed run's hand-outs of the same vectors are allowed for.
    """
    attempts: Counter[str] = Counter()
    for slot in [*slots, *undisturbed]:
        attempts[vector_name(slot.sparsities)] += slot.attempt
    begun, ended = cluster.log.begun, cluster.log.ended
    beyond = {vector: (n, attempts[vector]) for vector, n in begun.items() if n > attempts[vector]}
    assert not beyond, f"evaluations begun beyond the hand-outs (vector: begun, handed out): {beyond}"
    assert all(ended.get(vector_name(slot.sparsities), 0) >= 1 for slot in slots), "a result without an evaluation"
    return sum(begun.values()) - sum(slot.attempt for slot in undisturbed)


def check_losses(slots: list[Slot], undisturbed: list[Slot]) -> tuple[int, int]:
    """The same vector has the same losses as in the undisturbed run, bit for bit, on the sequences that both saw.

    Returns the numbers of vectors and of losses compared.
    """
    reference = {vector_name(slot.sparsities): slot for slot in undisturbed}
    n_vectors = n_losses = 0
    for slot in slots:
        other = reference.get(vector_name(slot.sparsities))
        if other is None:
            continue
        n = min(len(slot.losses), len(other.losses))
        np.testing.assert_array_equal(slot.losses[:n], other.losses[:n], err_msg=f"slot {slot.number}")
        n_vectors, n_losses = n_vectors + 1, n_losses + n
    assert n_vectors == len(slots), f"only {n_vectors} of {len(slots)} vectors are those of the undisturbed run"
    return n_vectors, n_losses


def how_it_ended(end: Exit) -> str:
    """A coordinator ends killed, finished, or with one line for people that says why; anything else is an error."""
    if end.words == "killed":
        return "killed"
    if end.code == 0:
        return "finished"
    assert "Traceback" not in end.words, f"coordinator {end.number} ended with a traceback:\n{end.words}"
    line = " ".join(end.words.split())
    reason = next((name for words, name in _ENDS.items() if words in line), None)
    assert reason is not None, f"coordinator {end.number} ended with code {end.code}:\n{end.words}"
    return reason
