"""A slot as an Optuna trial: made RUNNING, told once; it carries the slot's number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.trial import TrialState
from sqlalchemy import Row

from was_search.shape import N_PROJECTIONS
from was_search.studies.slots import Slot, SlotState
from was_storage.server.plain import plain
from was_storage.studies.optuna_rows import EndedTrial, NewTrial

SLOT_ATTR = "slot"
"""User attribute holding the slot's number."""

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


def proposal_attrs(number: int, origin: str, levels: Iterable[float], attrs: Mapping[str, Any]) -> dict[str, Any]:
    """User attributes of the trial of a slot that has a vector, in JSON's types, as ``attrs`` are."""
    rounded = [round(float(level), _LEVEL_DECIMALS) for level in levels]
    return {"origin": origin, "levels": rounded, **attrs, SLOT_ATTR: number}


def new_trial(number: int, columns: Mapping[str, Any]) -> NewTrial:
    """The RUNNING trial of a slot with a vector: ``columns`` of the slot table by name."""
    attrs = proposal_attrs(number, columns["origin"], columns["levels"], columns["attrs"] or {})
    distributions = distributions_from_json(columns["distributions"])
    params = {name: distributions[name].to_internal_repr(value) for name, value in columns["params"].items()}
    return NewTrial(params, columns["distributions"], attrs)


def ended_trial(trial_id: int, slot: Slot, attrs: Mapping[str, Any]) -> EndedTrial:
    """The end of a finished slot's trial; ``attrs`` are further attributes of the trial, in JSON's types."""
    state, values, steps = outcome(slot)
    value = None if values is None else values[0]
    return EndedTrial(trial_id, state, value, steps, {**result_attrs(slot), **attrs})


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
    each element preceded by its length in bytes; big-endian. An empty array has no dimension.
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
