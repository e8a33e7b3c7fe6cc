"""A proposed vector, checked and in the form the slot table keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.trial import TrialState, create_trial

from was_search.errors import StudyError
from was_search.shape import N_PROJECTIONS
from was_search.studies.hand_outs import Proposal
from was_storage.server.plain import plain
from was_storage.studies import trials


def vector_columns(number: int, proposal: Proposal) -> dict[str, Any]:
    """Values for the columns of slot ``number``.

    Raises:
        StudyError: params outside their distributions; arrays whose shapes differ or that are not finite.
    """
    values = {
        "origin": proposal.origin,
        "params": plain(dict(proposal.params)),
        "distributions": trials.distributions_to_json(proposal.distributions),
        "attrs": plain(dict(proposal.attrs)),
        "levels": _finite("levels", proposal.levels),
        "sparsities": _finite("sparsities", proposal.sparsities),
    }
    n_blocks = len(values["levels"])
    if len(values["sparsities"]) != n_blocks * N_PROJECTIONS:
        got = np.shape(proposal.sparsities)
        raise StudyError(f"sparsities: {n_blocks} levels need shape [{n_blocks}, {N_PROJECTIONS}], got {got}")
    try:
        create_trial(state=TrialState.RUNNING, params=values["params"], distributions=dict(proposal.distributions))
    except ValueError as error:
        raise StudyError(f"slot {number}: {error}") from error
    return values


def _finite(name: str, values: npt.ArrayLike) -> list[float]:
    array = np.asarray(values, np.float64).ravel()
    if not np.isfinite(array).all():
        raise StudyError(f"{name}: must be finite numbers, got {array[~np.isfinite(array)][:3].tolist()}")
    found: list[float] = array.tolist()
    return found
