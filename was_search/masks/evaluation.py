"""Losses of a masked model, on one device or spread over several: the reference for every faster way."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from was_search.masks.divergence import DenseTop, bucket_log_probs, check_top_k, concatenate, divergence, top_log_probs
from was_search.masks.early_stop import StopRule
from was_search.masks.masked_model import MaskedModel
from was_search.masks.masking import Masking
from was_search.texts.protocol import Evaluation, TokenSet

_LOGIT_ELEMENTS = 1 << 27
"""Number of logits that are converted to float32 at a time: 512 MB."""


def sequence_nats(model: nn.Module, tokens: Tensor, predicted: int) -> Tensor:
    """Nats of the last ``predicted`` tokens of each sequence, summed: float32 [batch].

    ``tokens`` is int64 [batch, sequence_length]; the loss of a token is the cross entropy of the logits at the
    position before it, in float32.
    """
    return token_nats(predicted_logits(model, tokens, predicted), tokens, predicted)


def token_nats(logits: Tensor, tokens: Tensor, predicted: int) -> Tensor:
    """The same of the :func:`predicted_logits` of ``tokens``."""
    targets = tokens[:, -predicted:].flatten().to(logits.device)
    parts = [
        nn.functional.cross_entropy(logits[rows].float(), targets[rows], reduction="none")
        for rows in _pieces(logits, _LOGIT_ELEMENTS)
    ]
    return torch.cat(parts).view(len(tokens), predicted).sum(dim=1)


def sequence_losses(model: nn.Module, tokens: Tensor, predicted: int, top: DenseTop) -> tuple[Tensor, Tensor]:
    """Divergence from the dense model, and NLL, of each sequence's last ``predicted`` tokens, from one forward.

    Both are summed over the tokens: nats, float32 [batch]. ``top`` is the dense model's top on the same sequences,
    [batch, predicted, k]; :mod:`was_search.masks.divergence` defines the divergence. Usable with autograd.
    """
    return top_losses(model, tokens, predicted, *top.rows(tokens.device))


def top_losses(
    model: nn.Module, tokens: Tensor, predicted: int, indices: Tensor, log_probs: Tensor
) -> tuple[Tensor, Tensor]:
    """What :func:`sequence_losses` gives, the dense model's top as :meth:`DenseTop.rows`; asks the host for nothing."""
    logits = predicted_logits(model, tokens, predicted)
    targets, indices, dense = (x.to(logits.device) for x in (tokens[:, -predicted:].flatten(), indices, log_probs))

    def losses(x: Tensor, rows: slice) -> Tensor:
        found, total = bucket_log_probs(x, indices[rows])
        nats = total - x.gather(1, targets[rows, None])
        return torch.cat([divergence(dense[rows], found)[:, None], nats], 1)

    parts = [losses(logits[rows].float(), rows) for rows in row_pieces(logits)]
    sums = torch.cat(parts).view(len(tokens), predicted, 2).sum(dim=1)
    return sums[:, 0], sums[:, 1]


def dense_top(model: MaskedModel, data: TokenSet, k: int) -> DenseTop:
    """The top ``k`` of what the model predicts without masks, for the predicted tokens of each sequence.

    Batches are those of an evaluation, so that the dense model's own divergence is 0.

    Raises:
        ConfigError: the vocabulary has fewer than ``k`` tokens.
    """
    predicted, found = data.protocol.predicted_per_sequence, []
    with torch.inference_mode():
        for batch in model.batches(data):
            logits = predicted_logits(model.model, batch, predicted)
            check_top_k(k, logits.shape[-1])
            parts = [top_log_probs(logits[rows].float(), k) for rows in row_pieces(logits)]
            indices, log_probs = (
                torch.cat(part).view(len(batch), predicted, -1).cpu() for part in zip(*parts, strict=True)
            )
            found.append(DenseTop(indices.int().numpy(), log_probs.numpy()))
    return concatenate(found)


def predicted_logits(model: nn.Module, tokens: Tensor, predicted: int) -> Tensor:
    """Logits that predict the last ``predicted`` tokens, in the model's dtype: [batch * predicted, vocabulary]."""
    logits: Tensor = model(input_ids=tokens, use_cache=False, logits_to_keep=predicted + 1).logits
    return logits[:, :-1].flatten(0, 1)


def row_pieces(logits: Tensor) -> list[slice]:
    """Runs of rows to work on at once where a second float32 copy is made of each."""
    return _pieces(logits, _LOGIT_ELEMENTS // 2)


def _pieces(logits: Tensor, elements: int) -> list[slice]:
    """Runs of rows to convert to float32 at once: at most ``elements`` logits, and at least one row."""
    n = max(1, elements // logits.shape[-1])
    return [slice(i, i + n) for i in range(0, len(logits), n)]


def evaluate_thresholds(
    model: MaskedModel,
    data: TokenSet,
    thresholds: npt.NDArray[np.float32] | None,
    *,
    rule: StopRule | None = None,
    top: DenseTop | None = None,
) -> Evaluation:
    """Evaluate ``model`` on ``data`` under ``thresholds`` [L, 7] (None: the dense model).

    The losses are the NLL, or with ``top`` the divergence from the dense model. The same arguments give the same
    losses on the same device and dtype, whatever else runs: batches are fixed, and early stopping, if there is a
    rule, happens only between them.

    Args:
        model: with norms that belong to the thresholds.
        data: the sequences, in their fixed order.
        thresholds: [L, 7], or None.
        rule: whether to stop, asked after every batch.
        top: the dense model's top of all sequences of ``data``; makes the divergence from it the loss.
    """
    protocol, predicted = data.protocol, data.protocol.predicted_per_sequence
    started = time.perf_counter()
    if top is not None and top.indices.shape[:2] != (len(data.tokens), predicted):
        raise ValueError(
            f"top: must be of {len(data.tokens)} x {predicted} tokens, "
            f"got {' x '.join(map(str, top.indices.shape[:2]))}"
        )
    losses: list[Tensor] = []
    nats: list[Tensor] = []
    done, stopped = 0, False
    masking = Masking(model, thresholds, dense_prefix=protocol.dense_prefix, count=True)
    with torch.inference_mode(), masking:
        for batch in model.batches(data):
            if top is None:
                losses.append(sequence_nats(model.model, batch, predicted).double().to(model.device))
            else:
                part = top[done : done + protocol.batch_size]
                loss, nll = sequence_losses(model.model, batch, predicted, part)
                losses.append(loss.double().to(model.device))
                nats.append(nll.double())
            done += len(batch)
            if rule is not None and done < len(data.tokens):
                stopped = rule.stops(torch.cat(losses).cpu().numpy() / predicted)
            if stopped:
                break
    return Evaluation(
        losses=torch.cat(losses).cpu().numpy() / predicted,
        tokens=done * predicted,
        seconds=time.perf_counter() - started,
        stopped_early=stopped,
        achieved=masking.achieved(),
        nats=torch.cat(nats).cpu().numpy() / predicted if nats else None,
    )
