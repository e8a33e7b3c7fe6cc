"""A slot as an Optuna trial: created RUNNING, told once, found again by the slot's number it carries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import Row

from was_search.errors import StudyError
from was_search.shape import N_PROJECTIONS
from was_search.slots import Slot, SlotState
from was_storage.plain import plain

SLOT_ATTR = "slot"
"""User attribute holding the slot's number: the link that survives a crash between creating and linking."""

_TOLD_AS = {
    SlotState.COMPLETE: TrialState.COMPLETE,
    SlotState.STOPPED: TrialState.PRUNED,
    SlotState.FAILED: TrialState.FAIL,
}
_LEVEL_DECIMALS = 4
Distributions = Mapping[str, BaseDistribution]


def slot_from_row(row: Row[Any]) -> Slot:
    """The slot of a row of the slot table."""
    return Slot(
        number=row.number,
        state=SlotState(row.state),
        attempt=row.attempt,
        origin=row.origin,
        params=row.params,
        levels=_floats(row.levels),
        sparsities=None if row.sparsities is None else _floats(row.sparsities).reshape(-1, N_PROJECTIONS),
        losses=_floats(row.losses),
        loss_nats=row.loss_nats,
        nll_nats=row.nll_nats,
        tokens=row.tokens,
        seconds=row.seconds,
        achieved=row.achieved,
        worker=row.worker,
        trial_id=row.trial_id,
        error=row.error,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )


def distributions_to_json(distributions: Distributions) -> dict[str, str]:
    return {name: _distribution_json(value) for name, value in distributions.items()}


def distributions_from_json(value: Mapping[str, str] | None) -> dict[str, BaseDistribution]:
    return {name: _distribution(text) for name, text in (value or {}).items()}


def running_template(slot: Slot, distributions: Distributions, attrs: Mapping[str, Any]) -> FrozenTrial:
    """The RUNNING trial to be created for a slot that has a vector.

    Raises:
        StudyError: parameters and distributions do not fit; the message says which.
    """
    assert slot.params is not None and slot.levels is not None
    user_attrs = proposal_attrs(slot.number, slot.origin, slot.levels, plain(dict(attrs)))
    try:
        return create_trial(
            state=TrialState.RUNNING,
            params=dict(slot.params),
            distributions=dict(distributions),
            user_attrs=user_attrs,
        )
    except ValueError as error:
        raise StudyError(f"slot {slot.number}: {error}") from error


def proposal_attrs(number: int, origin: str, levels: Iterable[float], attrs: Mapping[str, Any]) -> dict[str, Any]:
    """The user attributes of a slot that has a vector, in JSON's types as ``attrs`` is."""
    rounded = [round(float(level), _LEVEL_DECIMALS) for level in levels]
    return {"origin": origin, "levels": rounded, **attrs, SLOT_ATTR: number}


def finished_trial(slot: Slot, distributions: Distributions) -> FrozenTrial:
    """The finished trial of a finished slot, for an in-memory study; its number is the slot's."""
    state, values, intermediate = outcome(slot)
    started = slot.started_at or slot.finished_at or datetime.now()
    return FrozenTrial(
        number=slot.number,
        state=state,
        value=None,
        values=values,
        datetime_start=_naive(started),
        datetime_complete=_naive(slot.finished_at or started),
        params=dict(slot.params or {}),
        distributions=dict(distributions),
        user_attrs={SLOT_ATTR: slot.number, "origin": slot.origin},
        system_attrs={},
        intermediate_values=intermediate,
        trial_id=slot.number,
    )


def outcome(slot: Slot) -> tuple[TrialState, list[float] | None, dict[int, float]]:
    """What Optuna is told of a finished slot: state, values, intermediate values.

    A stopped slot is PRUNED without a value (Optuna refuses one); its running mean is the intermediate
    value at step = sequences seen.
    """
    state = _TOLD_AS[slot.state]
    if slot.state is SlotState.COMPLETE:
        assert slot.loss_nats is not None
        return state, [slot.loss_nats], {}
    if slot.state is SlotState.STOPPED and slot.loss_nats is not None and slot.losses is not None:
        return state, None, {len(slot.losses): slot.loss_nats}
    return state, None, {}


def create(storage: BaseStorage, optuna_study_id: int, row: Row[Any]) -> int:
    """Create the RUNNING trial of a row that has a vector; returns its id, to be linked.

    Raises:
        StudyError: Optuna refuses its parameters (the study has others of the same name).
    """
    template = running_template(slot_from_row(row), distributions_from_json(row.distributions), row.attrs or {})
    try:
        return storage.create_new_trial(optuna_study_id, template_trial=template)
    except ValueError as error:
        raise StudyError(f"slot {row.number}: {error}") from error


def unfinished(storage: BaseStorage, optuna_study_id: int) -> list[FrozenTrial]:
    """Trials that were not told yet, oldest first."""
    states = (TrialState.RUNNING, TrialState.WAITING)
    found = storage.get_all_trials(optuna_study_id, deepcopy=False, states=states)
    return sorted(found, key=lambda trial: trial._trial_id)


def tell(storage: BaseStorage, slot: Slot, attrs: Mapping[str, Any]) -> bool:
    """Tell Optuna a finished slot's result, attributes first; False where it was told before.

    Idempotent: a crash in between is mended by calling it again.
    """
    assert slot.trial_id is not None
    state, values, intermediate = outcome(slot)
    try:
        for step, value in intermediate.items():
            storage.set_trial_intermediate_value(slot.trial_id, step, value)
        for key, item in {**result_attrs(slot), **plain(dict(attrs))}.items():
            storage.set_trial_user_attr(slot.trial_id, key, item)
        return storage.set_trial_state_values(slot.trial_id, state, values)
    except UpdateFinishedTrialError:
        return False


def fail_surplus(storage: BaseStorage, trial_id: int, reason: str) -> None:
    """Tell Optuna that a trial without a slot of its own has failed."""
    try:
        storage.set_trial_user_attr(trial_id, "error", reason)
        storage.set_trial_state_values(trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return


def result_attrs(slot: Slot) -> dict[str, Any]:
    """The user attributes of a finished slot, in JSON's types."""
    found: dict[str, Any] = {
        "attempt": slot.attempt,
        "worker": slot.worker,
        "seconds": round(slot.seconds, 3),
        "tokens": slot.tokens,
        "stopped_early": slot.state is SlotState.STOPPED,
    }
    if slot.achieved is not None:
        found["achieved_sparsity"] = slot.achieved
    if slot.losses is not None and len(slot.losses):
        finite = np.isfinite(slot.losses)
        losses = slot.losses[finite]
        found["losses"] = {
            "n": len(slot.losses),
            "not_finite": int((~finite).sum()),
            "mean_nats": float(losses.mean()) if len(losses) else None,
            "std_nats": float(losses.std(ddof=1)) if len(losses) > 1 else None,
        }
    if slot.error:
        found["error"] = slot.error
    result: dict[str, Any] = plain(found)
    return result


def refuse_not_finite(slot: Slot) -> Slot:
    """``slot`` with its mean loss; failed where that is not a finite number, or missing in a complete one."""
    if slot.state not in (SlotState.COMPLETE, SlotState.STOPPED):
        return slot
    losses = np.asarray([] if slot.losses is None else slot.losses, np.float64)
    loss = slot.loss_nats
    if loss is None and len(losses):
        loss = float(losses.mean())
    broken = int((~np.isfinite(losses)).sum())
    if broken or (loss is not None and not math.isfinite(loss)):
        words = f"{broken} of {len(losses)} losses are not finite" if broken else f"the loss is {loss}"
        return replace(slot, state=SlotState.FAILED, loss_nats=None, nll_nats=None, error=slot.error or words)
    if loss is None and slot.state is SlotState.COMPLETE:
        return replace(slot, state=SlotState.FAILED, error=slot.error or "no loss was reported")
    return replace(slot, loss_nats=loss)


_HEADER_BYTES = 20
_ELEMENT = np.dtype([("n_bytes", ">i4"), ("value", ">f8")])


def _floats(value: Any) -> Any:
    """A column of doubles as float64 [n], None for none: from a list, or from Postgres' binary form of an array.

    That form is number of dimensions, flags and element type, then length and lower bound of the dimension, then
    each element behind its length in bytes; big-endian. An empty array has no dimension.
    """
    if value is None or isinstance(value, list):
        return None if value is None else np.asarray(value, np.float64)
    return np.frombuffer(bytes(value)[_HEADER_BYTES:], _ELEMENT)["value"].astype(np.float64)


@lru_cache(maxsize=4096)
def _distribution(text: str) -> BaseDistribution:
    return json_to_distribution(text)


@lru_cache(maxsize=4096)
def _distribution_json(distribution: BaseDistribution) -> str:
    return str(distribution_to_json(distribution))


def _naive(moment: datetime) -> datetime:
    return moment.astimezone().replace(tzinfo=None)
