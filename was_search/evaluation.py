"""Perplexity of a masked model: the reference Evaluator, one model on one device."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from was_search.early_stop import is_worse
from was_search.histogram import Histograms
from was_search.masking import Masking
from was_search.protocol import Evaluation, TokenSet
from was_search.score import MaskOp, masked
from was_search.shape import FloatArray
from was_search.structure import Structure

_LOGIT_ELEMENTS = 1 << 27
"""Logits converted to float32 at a time: 512 MB."""


def sequence_nats(model: nn.Module, tokens: Tensor, predicted: int) -> Tensor:
    """Nats of the last ``predicted`` tokens of each sequence, summed: float32 [batch].

    ``tokens`` is int64 [batch, sequence_length]; the loss of a token is the cross entropy of the logits at the
    position before it, in float32.
    """
    logits: Tensor = model(input_ids=tokens, use_cache=False, logits_to_keep=predicted + 1).logits[:, :-1]
    targets = tokens[:, -predicted:]
    rows = max(1, _LOGIT_ELEMENTS // logits.shape[-1])
    flat, wanted = logits.flatten(0, 1), targets.flatten()
    parts = [
        nn.functional.cross_entropy(flat[i : i + rows].float(), wanted[i : i + rows], reduction="none")
        for i in range(0, len(flat), rows)
    ]
    return torch.cat(parts).view_as(targets).sum(dim=1)


def evaluate_thresholds(
    model: nn.Module,
    structure: Structure,
    norms: list[list[Tensor]],
    data: TokenSet,
    thresholds: npt.NDArray[np.float32] | None,
    *,
    mask_op: MaskOp = masked,
    incumbent_losses: FloatArray | None = None,
    significance: float = 0.01,
    before: FloatArray | None = None,
    until: int | None = None,
) -> Evaluation:
    """Evaluate ``model`` on ``data`` under ``thresholds`` [L, 7] (None: the dense model).

    Early stopping, if there are incumbent losses, happens only between batches.

    Args:
        model: a causal LM.
        structure: its blocks.
        norms: from ``structure_norms``.
        data: the sequences, in their fixed order.
        thresholds: [L, 7], or None.
        mask_op: see :class:`Masking`.
        incumbent_losses: per-sequence losses to stop against, [n].
        significance: of that test.
        before: losses of the first sequences from an earlier call, a whole number of batches: the evaluation goes
            on behind them. They are part of the result; tokens, seconds and achieved are of this call alone.
        until: sequences at which to stop and report, rounded up to whole batches; None is all of them.
    """
    protocol = data.protocol
    device = next(model.parameters()).device
    started = time.perf_counter()
    known = np.zeros(0) if before is None else before
    if len(known) % protocol.batch_size:
        raise ValueError(f"before: a whole number of batches of {protocol.batch_size} is needed, got {len(known)}")
    end = len(data.tokens) if until is None else min(until, len(data.tokens))
    losses: list[Tensor] = [
        torch.as_tensor(known * protocol.predicted_per_sequence, dtype=torch.float64, device=device)
    ]
    stopped = False
    masking = Masking(structure, norms, thresholds, dense_prefix=protocol.dense_prefix, mask_op=mask_op, count=True)
    done = len(known)
    with torch.inference_mode(), masking:
        while done < end and not stopped:
            batch = torch.as_tensor(data.tokens[done : done + protocol.batch_size], dtype=torch.long, device=device)
            losses.append(sequence_nats(model, batch, protocol.predicted_per_sequence).double())
            done += len(batch)
            if incumbent_losses is not None and done < len(data.tokens):
                so_far = torch.cat(losses).cpu().numpy() / protocol.predicted_per_sequence
                stopped = is_worse(so_far, incumbent_losses, significance)
    per_sequence = torch.cat(losses).cpu().numpy() / protocol.predicted_per_sequence
    return Evaluation(
        losses=per_sequence,
        tokens=(done - len(known)) * protocol.predicted_per_sequence,
        seconds=time.perf_counter() - started,
        stopped_early=stopped,
        achieved=masking.achieved(),
    )


class ModelEvaluator:
    """The Evaluator of one loaded model: thresholds from shared histograms, per-sequence losses back."""

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        norms: list[list[Tensor]],
        data: TokenSet,
        histograms: Histograms,
        *,
        mask_op: MaskOp = masked,
        significance: float = 0.01,
    ) -> None:
        self._model = model
        self._structure = structure
        self._norms = norms
        self._data = data
        self._histograms = histograms
        self._mask_op = mask_op
        self._significance = significance

    def evaluate(
        self,
        sparsities: FloatArray,
        incumbent_losses: FloatArray | None = None,
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
            incumbent_losses=incumbent_losses,
            significance=self._significance,
            before=before,
            until=until,
        )
