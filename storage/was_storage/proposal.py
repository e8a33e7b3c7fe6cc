"""A proposed vector, checked and in the form the slot table keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.distributions import BaseDistribution

from was_search.errors import StudyError
from was_search.shape import N_PROJECTIONS
from was_search.slots import Slot, SlotState
from was_storage import trials
from was_storage.plain import plain


def vector_columns(
    number: int,
    origin: str,
    params: Mapping[str, float],
    distributions: Mapping[str, BaseDistribution],
    levels: npt.ArrayLike,
    sparsities: npt.ArrayLike,
    attrs: Mapping[str, Any],
) -> dict[str, Any]:
    """Values for the slot's columns; see :meth:`was_storage.session.CoordinatorSession.propose`.

    Raises:
        StudyError: params outside their distributions; arrays whose shapes differ or that are not finite.
    """
    values = {
        "origin": origin,
        "params": plain(dict(params)),
        "distributions": trials.distributions_to_json(distributions),
        "attrs": plain(dict(attrs)),
        "levels": _finite("levels", levels),
        "sparsities": _finite("sparsities", sparsities),
    }
    n_blocks = len(values["levels"])
    if len(values["sparsities"]) != n_blocks * N_PROJECTIONS:
        raise StudyError(
            f"sparsities: {n_blocks} levels need shape [{n_blocks}, {N_PROJECTIONS}], got {np.shape(sparsities)}"
        )
    vector = Slot(number, SlotState.WAITING, params=values["params"], levels=np.asarray(values["levels"]))
    trials.running_template(vector, distributions, {})
    return values


def _finite(name: str, values: npt.ArrayLike) -> list[float]:
    array = np.asarray(values, np.float64).ravel()
    if not np.isfinite(array).all():
        raise StudyError(f"{name}: must be finite numbers, got {array[~np.isfinite(array)][:3].tolist()}")
    found: list[float] = array.tolist()
    return found
