"""NaN and infinity in what a model computes: found where they appear, and told with what to do about them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from was_search.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

_INSTEAD = {"float16": "--dtype bfloat16 or float32", "bfloat16": "--dtype float32"}
"""Types to try instead of one that is too small: of more range for float16, of more digits for bfloat16."""


class NotFiniteError(ArithmeticError):
    """``what`` gave NaN or infinite numbers; whoever knows the model's name turns this into :func:`not_finite`."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} gives NaN or infinite numbers")
        self.what = what


def check_finite(values: npt.ArrayLike, what: str) -> None:
    """Raise a NotFiniteError where ``values``, which ``what`` has given, are not all finite."""
    if not np.all(np.isfinite(values)):
        raise NotFiniteError(what)


def require_finite(values: npt.ArrayLike, what: str, model: nn.Module, name: str, dtype: str) -> None:
    """Refuse ``values`` that are not all finite.

    Args:
        values: what the phase has given.
        what: the phase, such as ``calibration``.
        model: the model that computed them; its weights are looked at if need be.
        name: the model's name, for the message.
        dtype: dtype of its weights and activations.

    Raises:
        ModelError: naming the phase, the model and the dtype, and what to do.
    """
    if not np.all(np.isfinite(values)):
        raise not_finite(what, model, name, dtype)


def not_finite(what: str, model: nn.Module, name: str, dtype: str) -> ModelError:
    """The error for a phase whose numbers are not finite."""
    bad = next((key for key, value in model.named_parameters() if not bool(value.isfinite().all())), None)
    words = f"{what}: {name} in {dtype} gives NaN or infinite numbers"
    if bad is not None:
        words += f", and so are some of its weights (the first: {bad})"
    instead = _INSTEAD.get(dtype)
    if bad is not None and dtype != "float16":  # the other types hold whatever a checkpoint stores
        return ModelError(f"{words}; the checkpoint is damaged: get it again")
    if instead is None:
        return ModelError(f"{words}; float32 has the widest range there is: check the checkpoint, and get it again")
    return ModelError(f"{words}; it needs more range or digits: use {instead}")
