"""The gradient of a masked model's loss in the scales and constants of its outputs: one backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from was_search.compensation import Compensation, Vector
from was_search.masks.backward import backward_pass
from was_search.masks.corrections import Learned, corrections, flat_gradient
from was_search.masks.divergence import DenseTop
from was_search.masks.masked_model import MaskedModel
from was_search.masks.slope import BOUNDARY_WIDTH, through_mask
from was_search.texts.protocol import TokenSet


@dataclass(frozen=True, eq=False)
class CompensationGradient:
    """What one pass found; parts of a step's sequences add up.

    Attributes:
        loss: summed divergence from the dense model, nats.
        gradient: of that sum in the compensation's flat values, float32.
        predicted: predicted tokens.
    """

    loss: float
    gradient: Vector
    predicted: int


def compensation_gradient(
    model: MaskedModel,
    data: TokenSet,
    thresholds: npt.NDArray[np.float32],
    compensation: Compensation,
    top: DenseTop | None,
    *,
    width: float = BOUNDARY_WIDTH,
) -> CompensationGradient:
    """The gradient on ``data`` under ``thresholds`` [L, 7] and ``compensation``.

    The gradient passes hard masks as in :mod:`was_search.masks.slope`.

    Args:
        model: its parameters may be frozen.
        data: the sequences.
        thresholds: [L, 7].
        compensation: the point.
        top: the dense model's top on the same sequences; None: the loss is the NLL.
        width: half width of the band, :data:`was_search.masks.slope.BOUNDARY_WIDTH`.
    """
    learned = [Learned.of(one) for one in corrections(model.structure, compensation)]
    function = through_mask(model, thresholds, data.protocol.dense_prefix, width)
    loss = backward_pass(model, data, function, corrections=learned, top=top)
    predicted = len(data.tokens) * data.protocol.predicted_per_sequence
    return CompensationGradient(loss, flat_gradient(model.structure, learned), predicted)
