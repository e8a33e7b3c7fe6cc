"""Losses of a masked model: the reference Evaluator, one model on one device or spread over several."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from was_search.divergence import (
    DenseTop,
    bucket_log_probs,
    check_top_k,
    concatenate,
    divergence,
    top_log_probs,
)
from was_search.early_stop import StopRule
from was_search.histogram import Histograms
from was_search.masking import Masking
from was_search.protocol import Evaluation, TokenSet
from was_search.score import MaskOp, mask_input
from was_search.shape import FloatArray, IntArray
from was_search.structure import Structure

_LOGIT_ELEMENTS = 1 << 27
"""Logits converted to float32 at a time: 512 MB."""


def sequence_nats(model: nn.Module, tokens: Tensor, predicted: int) -> Tensor:
    """Nats of the last ``predicted`` tokens of each sequence, summed: float32 [batch].

    ``tokens`` is int64 [batch, sequence_length]; the loss of a token is the cross entropy of the logits at the
    position before it, in float32.
    """
    logits = _logits(model, tokens, predicted)
    targets = tokens[:, -predicted:].flatten().to(logits.device)
    parts = [
        nn.functional.cross_entropy(logits[rows].float(), targets[rows], reduction="none")
        for rows in _pieces(logits, _LOGIT_ELEMENTS)
    ]
    return torch.cat(parts).view(len(tokens), predicted).sum(dim=1)


def sequence_losses(model: nn.Module, tokens: Tensor, predicted: int, top: DenseTop) -> tuple[Tensor, Tensor]:
    """Divergence from the dense model, and NLL, of each sequence's last ``predicted`` tokens, from one forward.

    Both are summed over the tokens: nats, float32 [batch]. ``top`` is that of these sequences, [batch, predicted, k];
    usable with autograd. See :mod:`was_search.divergence`.
    """
    logits = _logits(model, tokens, predicted)
    targets = tokens[:, -predicted:].flatten().to(logits.device)
    indices, dense = top.rows(logits.device)

    def losses(x: Tensor, rows: slice) -> Tensor:
        log_probs, total = bucket_log_probs(x, indices[rows])
        nats = total - x.gather(1, targets[rows, None])
        return torch.cat([divergence(dense[rows], log_probs)[:, None], nats], 1)

    # Half of the elements: a copy without the top ones is made of each piece.
    parts = [losses(logits[rows].float(), rows) for rows in _pieces(logits, _LOGIT_ELEMENTS // 2)]
    sums = torch.cat(parts).view(len(tokens), predicted, 2).sum(dim=1)
    return sums[:, 0], sums[:, 1]


def dense_top(model: nn.Module, tokens: IntArray, k: int, *, predicted: int, batch_size: int) -> DenseTop:
    """The top ``k`` of what ``model`` predicts, as it stands, for the last ``predicted`` tokens of each sequence.

    ``tokens`` is int64 [n, sequence_length]; batches are those of an evaluation, so that the dense model's own
    divergence is 0.

    Raises:
        ConfigError: the vocabulary has fewer than ``k`` tokens.
    """
    device = next(model.parameters()).device
    found = []
    with torch.inference_mode():
        for start in range(0, len(tokens), batch_size):
            batch = torch.as_tensor(tokens[start : start + batch_size], dtype=torch.long, device=device)
            logits = _logits(model, batch, predicted)
            check_top_k(k, logits.shape[-1])
            parts = [top_log_probs(logits[rows].float(), k) for rows in _pieces(logits, _LOGIT_ELEMENTS // 2)]
            indices, log_probs = (
                torch.cat(part).view(len(batch), predicted, -1).cpu() for part in zip(*parts, strict=True)
            )
            found.append(DenseTop(indices.int().numpy(), log_probs.numpy()))
    return concatenate(found)


def _logits(model: nn.Module, tokens: Tensor, predicted: int) -> Tensor:
    """Logits that predict the last ``predicted`` tokens, in the model's dtype: [batch * predicted, vocabulary]."""
    logits: Tensor = model(input_ids=tokens, use_cache=False, logits_to_keep=predicted + 1).logits
    return logits[:, :-1].flatten(0, 1)


def _pieces(logits: Tensor, elements: int) -> list[slice]:
    """Runs of rows to convert to float32 at once: at most ``elements`` logits, and at least one row."""
    n = max(1, elements // logits.shape[-1])
    return [slice(i, i + n) for i in range(0, len(logits), n)]


def evaluate_thresholds(
    model: nn.Module,
    structure: Structure,
    norms: list[list[Tensor]],
    data: TokenSet,
    thresholds: npt.NDArray[np.float32] | None,
    *,
    mask_op: MaskOp = mask_input,
    rule: StopRule | None = None,
    before: FloatArray | None = None,
    until: int | None = None,
    top: DenseTop | None = None,
) -> Evaluation:
    """Evaluate ``model`` on ``data`` under ``thresholds`` [L, 7] (None: the dense model).

    The losses are the NLL, or with ``top`` the divergence from the dense model.

    Early stopping, if there is a rule, happens only between batches.

    Args:
        model: a causal LM.
        structure: its blocks.
        norms: from ``structure_norms``.
        data: the sequences, in their fixed order.
        thresholds: [L, 7], or None.
        mask_op: see :class:`Masking`.
        rule: whether to stop, asked after every batch.
        before: losses of the first sequences from an earlier call, a whole number of batches: the evaluation goes
            on behind them. They are part of the losses; tokens, seconds, achieved and nats are of this call alone.
        until: sequences at which to stop and report, rounded up to whole batches; None is all of them.
        top: the dense model's top of all sequences of ``data``; makes the divergence from it the loss.
    """
    protocol = data.protocol
    device = next(model.parameters()).device
    started = time.perf_counter()
    known = np.zeros(0) if before is None else before
    if len(known) % protocol.batch_size:
        raise ValueError(f"before: a whole number of batches of {protocol.batch_size} is needed, got {len(known)}")
    if top is not None and top.indices.shape[:2] != (len(data.tokens), protocol.predicted_per_sequence):
        raise ValueError(
            f"top: must be of {len(data.tokens)} x {protocol.predicted_per_sequence} tokens, "
            f"got {' x '.join(map(str, top.indices.shape[:2]))}"
        )
    end = len(data.tokens) if until is None else min(until, len(data.tokens))
    losses: list[Tensor] = [
        torch.as_tensor(known * protocol.predicted_per_sequence, dtype=torch.float64, device=device)
    ]
    nats: list[Tensor] = []
    stopped = False
    masking = Masking(structure, norms, thresholds, dense_prefix=protocol.dense_prefix, mask_op=mask_op, count=True)
    done = len(known)
    with torch.inference_mode(), masking:
        while done < end and not stopped:
            batch = torch.as_tensor(data.tokens[done : done + protocol.batch_size], dtype=torch.long, device=device)
            if top is None:
                losses.append(sequence_nats(model, batch, protocol.predicted_per_sequence).double().to(device))
            else:
                part = top[done : done + protocol.batch_size]
                loss, nll = sequence_losses(model, batch, protocol.predicted_per_sequence, part)
                losses.append(loss.double().to(device))
                nats.append(nll.double())
            done += len(batch)
            if rule is not None and done < len(data.tokens):
                stopped = rule.stops(torch.cat(losses).cpu().numpy() / protocol.predicted_per_sequence)
    per_sequence = torch.cat(losses).cpu().numpy() / protocol.predicted_per_sequence
    return Evaluation(
        losses=per_sequence,
        tokens=(done - len(known)) * protocol.predicted_per_sequence,
        seconds=time.perf_counter() - started,
        stopped_early=stopped,
        achieved=masking.achieved(),
        nats=torch.cat(nats).cpu().numpy() / protocol.predicted_per_sequence if nats else None,
    )


class ModelEvaluator:
    """The Evaluator of one loaded model: thresholds from shared histograms, per-sequence losses back.

    With ``top`` the losses are divergences from the dense model.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        norms: list[list[Tensor]],
        data: TokenSet,
        histograms: Histograms,
        *,
        mask_op: MaskOp = mask_input,
        top: DenseTop | None = None,
    ) -> None:
        self._model = model
        self._structure = structure
        self._norms = norms
        self._data = data
        self._histograms = histograms
        self._mask_op = mask_op
        self._top = top

    def evaluate(
        self,
        sparsities: FloatArray,
        rule: StopRule | None = None,
        *,
        before: FloatArray | None = None,
        until: int | None = None,
    ) -> Evaluation:
        """See :class:`was_search.protocol.Evaluator`."""
        return evaluate_thresholds(
            self._model,
            self._structure,
            self._norms,
            self._data,
            self._histograms.thresholds(sparsities),
            mask_op=self._mask_op,
            rule=rule,
            before=before,
            until=until,
            top=self._top,
        )
