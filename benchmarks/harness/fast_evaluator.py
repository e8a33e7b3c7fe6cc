"""Evaluate many vectors on one small model: thresholds on the device, forwards replayed from CUDA graphs.

The results are those of :func:`was_search.masks.evaluation.evaluate_thresholds`, which it is tested against. Nothing in
the forward may ask the host: thresholds are a tensor that the hooks read, and attention has no mask. transformers would
compare position ids on the host before it decides to need none, and build one while a graph is captured, where it
cannot compare.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.harness.fast_mask import masks
from benchmarks.harness.replays import Replays, chunks
from was_search.masks.attention import attend_whole_texts, needs_no_mask
from was_search.masks.divergence import DenseTop, bucket_log_probs, divergence
from was_search.masks.evaluation import sequence_nats
from was_search.masks.masked_model import MaskedModel
from was_search.shape import FloatArray, IntArray
from was_search.texts.protocol import TokenSet


class FastEvaluator:
    """Losses of sequences under thresholds. Not thread-safe; owns one stream's graphs.

    Changes the model's attention implementation, unless a sliding window binds; then there are no graphs either.

    Args:
        model: in evaluation mode.
        data: the sequences.
        top: the dense model's top on ``data``; makes the divergence from it the loss instead of the NLL.
        graphs: capture CUDA graphs; None: on a GPU.
        pool: the graphs' memory, as of :class:`benchmarks.harness.replays.Replays`.
    """

    def __init__(
        self,
        model: MaskedModel,
        data: TokenSet,
        *,
        top: DenseTop | None = None,
        graphs: bool | None = None,
        pool: Any = None,
    ) -> None:
        device = model.device
        self._model = model
        self._protocol = data.protocol
        self._tokens = torch.as_tensor(data.tokens, device=device)
        self._top: tuple[Tensor, Tensor] | None = None
        if top is not None:
            self._top = (torch.tensor(top.indices, device=device).long(), torch.tensor(top.log_probs, device=device))
        captured = use_causal_attention(model.model, data.protocol, graphs)
        self._replays = Replays(self._forward, graphs=captured, pool=pool)

    @property
    def graphs(self) -> bool:
        """Whether evaluations are replayed from graphs."""
        return self._replays.graphs

    def losses(self, thresholds: npt.NDArray[np.float32], sequences: IntArray | None = None) -> FloatArray:
        """Mean nats per predicted token of ``sequences`` (indices [n]; None: all), float64 [n].

        ``thresholds`` are [L, 7], or [n, L, 7] for sequences under thresholds of their own. A sequence's loss may
        depend in the last digits on the chunk that it is evaluated in.
        """
        return self.evaluate(thresholds, sequences)[0]

    @torch.no_grad()
    def evaluate(
        self, thresholds: npt.NDArray[np.float32], sequences: IntArray | None = None
    ) -> tuple[FloatArray, IntArray]:
        """What :meth:`losses` gives, and the channels dropped outside the dense prefix, int64 [n, L, 7]."""
        wanted = np.arange(len(self._tokens)) if sequences is None else np.asarray(sequences, np.int64)
        limits = np.ascontiguousarray(thresholds, np.float32)
        limits = np.broadcast_to(limits, (len(wanted), *limits.shape[-2:]))
        if len(wanted) == 0:
            return np.zeros(0), np.zeros(limits.shape, np.int64)
        order, sizes = _chunks(len(wanted), chunks(self._protocol.sequence_length))
        index = torch.as_tensor(wanted[order], device=self._tokens.device)
        rows = torch.as_tensor(limits[order], device=self._tokens.device)
        found = [self._replays(i, t) for i, t in zip(index.split(sizes), rows.split(sizes), strict=True)]
        nats, dropped = (torch.cat(part)[: len(wanted)].cpu().numpy() for part in zip(*found, strict=True))
        return nats.astype(np.float64) / self._protocol.predicted_per_sequence, dropped.astype(np.int64)

    def _forward(self, index: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss of each sequence, float32 [n], and the channels dropped, int32 [n, L, 7]."""
        tokens, predicted = self._tokens[index], self._protocol.predicted_per_sequence
        dropped = torch.zeros(thresholds.shape, dtype=torch.int32, device=tokens.device)
        with masks(self._model, thresholds, dropped, self._protocol.dense_prefix):
            if self._top is None:
                return sequence_nats(self._model.model, tokens, predicted), dropped
            model: Any = self._model.model
            logits = model(input_ids=tokens, use_cache=False, logits_to_keep=predicted + 1).logits
        indices, dense = (tensor[index].flatten(0, 1) for tensor in self._top)
        log_probs, _ = bucket_log_probs(logits[:, :-1].flatten(0, 1).float(), indices)
        return divergence(dense, log_probs).view(len(index), predicted).sum(dim=1), dropped


def _chunks(n: int, whole: tuple[int, ...]) -> tuple[IntArray, list[int]]:
    """``0 .. n - 1`` filled up with repeats to chunks of the sizes ``whole``, and the chunks' sizes, largest first."""
    sizes, left = [], n
    for size in whole:
        sizes += [size] * (left // size)
        left %= size
    if left:
        sizes.append(whole[-1])
    return np.resize(np.arange(n), sum(sizes)), sizes


def use_causal_attention(model: Any, protocol: Any, graphs: bool | None = None) -> bool:
    """Let ``model`` attend without a mask, unless a sliding window binds; returns whether to capture graphs.

    ``graphs`` is what was asked for; None: on a GPU.
    """
    if not needs_no_mask(model.config, protocol.sequence_length):
        return False
    attend_whole_texts(model)
    return next(model.parameters()).is_cuda if graphs is None else graphs
