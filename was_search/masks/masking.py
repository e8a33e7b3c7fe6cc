"""Mask the inputs of the seven projections with forward hooks, correct their outputs, and count what was dropped.

The one way to mask in calibration, pricing and evaluation. No transformers code is copied: hooks sit on the
linear modules found by :mod:`was_search.checkpoints.structure`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from was_search.masks.corrections import corrected_outputs
from was_search.masks.inputs import hook_inputs
from was_search.masks.masked_model import MaskedModel
from was_search.masks.score import scores
from was_search.shape import N_PROJECTIONS, FloatArray, IntArray

Observer = Callable[[int, int, Tensor], None]
"""(block, projection, scores [batch, positions, d] float32) -> None; sees only tokens outside the dense prefix.

It sees only the first of the projections that share a mask.
"""


class Masking:
    """Context manager: while open, every projection sees only the channels whose score reaches its threshold.

    Outputs are corrected by the model's compensation, if it has one and there are thresholds.

    Owned by one thread; inputs must be [batch, positions, d] and start at a sequence's first token (no cache).

    Args:
        model: what is masked.
        thresholds: [L, 7], or None to mask nothing (to observe only).
        dense_prefix: positions at a sequence's start left unmasked.
        count: count dropped channels, read with :meth:`achieved`.
        observer: called with the scores of the inputs before masking.
    """

    def __init__(
        self,
        model: MaskedModel,
        thresholds: npt.NDArray[np.float32] | None,
        *,
        dense_prefix: int = 1,
        count: bool = False,
        observer: Observer | None = None,
    ) -> None:
        self._structure = model.structure
        self._norms = model.norms
        self._thresholds = thresholds
        self._prefix = dense_prefix
        self._mask_op = model.ops.mask
        self._observer = observer
        self._counting = count
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._seen = np.zeros((len(model.structure.blocks), N_PROJECTIONS), np.int64)
        self._corrections = None if thresholds is None else model.corrections
        self._handles: list[RemovableHandle] = []
        self._corrected = ExitStack()

    def __enter__(self) -> Masking:
        self._handles.extend(hook_inputs(self._structure, self._masked))
        self._corrected.enter_context(corrected_outputs(self._structure, self._corrections, self._prefix))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._corrected.close()

    def achieved(self) -> FloatArray:
        """Share of channels dropped outside the dense prefix since the start, [L, 7]; needs ``count=True``."""
        seen, kept = self.counts()
        return np.where(seen > 0, 1.0 - kept / np.maximum(seen, 1), 0.0)

    def counts(self) -> tuple[IntArray, IntArray]:
        """Channels outside the dense prefix since the start, and those of them kept: int64 [L, 7] each."""
        kept = np.zeros_like(self._seen)
        for at, count in self._kept.items():
            kept[at] = int(count)
        copied = self._structure.shape.copied
        return copied(self._seen), copied(kept)

    def _masked(self, b: int, p: int, x: Tensor) -> Tensor:
        threshold = 0.0 if self._thresholds is None else float(self._thresholds[b, p])
        norms = self._norms[b][p]
        body = x[:, self._prefix :]
        if self._observer is not None:
            self._observer(b, p, scores(body, norms))
        if threshold <= 0.0:
            if self._counting:
                self._add(b, p, body.numel(), body.new_full((), body.numel(), dtype=torch.int64))
            return x
        y, kept = self._mask_op(x, norms, threshold, self._prefix)
        if self._counting:
            self._add(b, p, body.numel(), kept)
        return y

    def _add(self, b: int, p: int, seen: int, kept: Tensor) -> None:
        self._seen[b, p] += seen
        self._kept[b, p] = self._kept[b, p] + kept if (b, p) in self._kept else kept
