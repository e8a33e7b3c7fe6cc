"""Masked models beside the dense one on the same batches: losses, and how far predictions are from the dense model's.

With p the dense model's distribution of a next token and q the masked one's,

    a flip: argmax p is not argmax q, so that greedy decoding takes another token,
    TV(p, q) = 1/2 sum over the vocabulary of |p_i - q_i|,

the total variation distance, in [0, 1] (Levin and Peres, Markov Chains and Mixing Times, 4.1): the largest difference
that the two distributions can make to the probability of any event.

Nobody stores a distribution: each batch is run densely, then under each mask, and two batches of logits are held.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from was_search.masks.evaluation import predicted_logits, row_pieces, token_nats
from was_search.masks.masked_model import MaskedModel
from was_search.masks.masking import Masking
from was_search.shape import N_PROJECTIONS, FloatArray, IntArray
from was_search.texts.protocol import Distance, Evaluation, TokenSet


@dataclass(frozen=True)
class Part:
    """What was found of some sequences of a split under one mask, or none; :func:`joined` adds parts up.

    Attributes:
        losses: mean NLL per predicted token of each sequence, nats, float64 [n].
        distance: from the dense model; None for itself.
        tokens: predicted tokens.
        seconds: time spent.
        seen: channels of inputs outside the dense prefix, int64 [L, 7].
        kept: those of them that were not dropped, int64 [L, 7].
    """

    losses: FloatArray
    distance: Distance | None
    tokens: int
    seconds: float
    seen: IntArray
    kept: IntArray


def joined(parts: Sequence[Part]) -> Evaluation:
    """The evaluation of consecutive runs of sequences; counts are added, so the cuts leave no trace in any figure."""
    seen, kept = sum(part.seen for part in parts), sum(part.kept for part in parts)
    distances = [part.distance for part in parts if part.distance is not None]
    return Evaluation(
        losses=np.concatenate([part.losses for part in parts]),
        tokens=sum(part.tokens for part in parts),
        seconds=sum(part.seconds for part in parts),
        stopped_early=False,
        achieved=np.where(seen > 0, 1.0 - kept / np.maximum(seen, 1), 0.0),
        distance=Distance.concatenated(distances) if distances else None,
    )


def distance(dense: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Flips, bool [rows], and total variation distances, float32 [rows], of logits [rows, vocabulary] of any dtype."""
    variation = [
        (dense[rows].softmax(1, dtype=torch.float32) - logits[rows].softmax(1, dtype=torch.float32)).abs_().sum(1) / 2
        for rows in row_pieces(logits)
    ]
    return dense.argmax(1) != logits.argmax(1), torch.cat(variation)


def evaluate_beside_dense(
    model: MaskedModel, data: TokenSet, maskings: Sequence[Masking], *, advance: Callable[[], None] = lambda: None
) -> list[Part]:
    """The dense model on ``data``, then the model under each of ``maskings``, which must count; batch by batch.

    Losses are those of :func:`was_search.masks.evaluation.evaluate_thresholds`, bit for bit.

    Args:
        model: the dense model; its norms do not matter.
        data: the sequences, in their fixed order.
        maskings: of this model.
        advance: called after each batch.
    """
    predicted, started = data.protocol.predicted_per_sequence, time.perf_counter()
    found = [_Found() for _ in range(1 + len(maskings))]
    with torch.inference_mode():
        for batch in model.batches(data):
            _take(model, batch, predicted, maskings, found)
            advance()
    nothing = np.zeros((model.shape.n_blocks, N_PROJECTIONS), np.int64)
    counts = [(nothing, nothing), *(masking.counts() for masking in maskings)]
    tokens, seconds = len(data.tokens) * predicted, (time.perf_counter() - started) / len(found)
    return [
        Part(_array(one.nats) / predicted, one.distance(), tokens, seconds, *counted)
        for one, counted in zip(found, counts, strict=True)
    ]


@dataclass(frozen=True)
class _Found:
    """Of each batch, [sequences] each."""

    nats: list[Tensor] = field(default_factory=list)
    flips: list[Tensor] = field(default_factory=list)
    variation: list[Tensor] = field(default_factory=list)

    def distance(self) -> Distance | None:
        return Distance(_array(self.flips), _array(self.variation)) if self.flips else None


def _take(
    model: MaskedModel, batch: Tensor, predicted: int, maskings: Sequence[Masking], found: Sequence[_Found]
) -> None:
    """Add what a batch gives. Logits are let go before the next are made: they may be most of the memory."""
    dense = predicted_logits(model.model, batch, predicted)
    found[0].nats.append(token_nats(dense, batch, predicted))
    for masking, one in zip(maskings, found[1:], strict=True):
        with masking:
            logits = predicted_logits(model.model, batch, predicted)
        one.nats.append(token_nats(logits, batch, predicted))
        flips, variation = (x.view(len(batch), -1).double().mean(1) for x in distance(dense, logits))
        one.flips.append(flips)
        one.variation.append(variation)
        del logits


def _array(parts: list[Tensor]) -> FloatArray:
    found: FloatArray = torch.cat([part.double() for part in parts]).cpu().numpy()
    return found
