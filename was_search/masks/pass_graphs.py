"""Backward passes of slopes on a GPU, replayed from recordings of what they launch.

A pass over a small model is thousands of launches of a few microseconds each, and Python between them takes several
times as long as the GPU does; in a large model it is a third of the time. What is recorded reads tokens, thresholds and
corrections where they lay when it was recorded, so they are copied there before each replay. The numbers are the same
to the bit either way.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from was_search.masks.attention import needs_no_mask
from was_search.masks.backward import TopRows, opened, recomputes
from was_search.masks.ops import RecordOp
from was_search.masks.slope_point import SlopePoint
from was_search.process.logs import event

if TYPE_CHECKING:
    from was_search.masks.masked_model import MaskedModel

_logger = logging.getLogger(__name__)

MOST_KEPT = 2
"""Recordings that are kept: of the whole batches of one text, and of its last."""


@dataclass(frozen=True)
class _Kind:
    """What a recording is of."""

    size: tuple[int, ...]
    predicted: int
    prefix: int
    width: float
    learned: bool
    top: tuple[int, ...]


@dataclass(frozen=True)
class _Recording:
    """A batch's pass, and what it reads and writes."""

    graph: Any
    tokens: Tensor
    top: TopRows | None
    point: SlopePoint

    def replay(self, tokens: Tensor, top: TopRows | None, at: SlopePoint) -> None:
        """Run it on a batch and add what it finds to ``at``."""
        self.tokens.copy_(tokens)
        for kept, given in zip(self.top or (), top or (), strict=True):
            kept.copy_(given)
        self.point.start_like(at)
        self.graph.replay()
        at.add(self.point)


class PassGraphs:
    """Replays the backward passes of one model on one GPU. Not thread-safe, like the model.

    The first batch of a kind is left to the caller: it readies libraries and kernels, which cannot be done while
    launches are recorded. So is every batch of a model that cannot be recorded.

    Args:
        record: as in :class:`was_search.masks.ops.Ops`.

    Attributes:
        refusal: why passes cannot be recorded, once that has failed; no more is tried then.
    """

    def __init__(self, record: RecordOp) -> None:
        self._record = record
        self._seen: set[_Kind] = set()
        self._kept: dict[_Kind, _Recording] = {}
        self.refusal: str | None = None

    def drop(self) -> None:
        """Give the memory of all recordings back."""
        self._kept.clear()
        self._seen.clear()

    def add_batches(
        self, model: MaskedModel, point: SlopePoint, batches: Sequence[tuple[Tensor, TopRows | None]]
    ) -> bool:
        """Add what the passes of ``batches`` find to ``point``; False, and nothing is added, where the caller has to.

        Args:
            model: the model.
            point: has been started.
            batches: tokens, and the dense model's top or None.
        """
        if (
            self.refusal is not None
            or (point.corrections is not None and point.learned is None)
            or not _can_be_recorded(model, point.protocol.sequence_length)
        ):
            return False
        kinds = [_kind(point, batch, top) for batch, top in batches]
        if not self._seen.issuperset(kinds):
            self._seen.update(kinds)
            return False
        for other in [kind for kind in self._kept if kind not in kinds]:
            if len(self._kept) + len(set(kinds) - self._kept.keys()) > MOST_KEPT:
                del self._kept[other]
        for kind, (batch, top) in zip(kinds, batches, strict=True):
            if kind not in self._kept and not self._keep(kind, model, point, batch, top):
                return False
        for kind, (batch, top) in zip(kinds, batches, strict=True):
            self._kept[kind].replay(batch, top, point)
        return True

    def _keep(self, kind: _Kind, model: MaskedModel, like: SlopePoint, batch: Tensor, top: TopRows | None) -> bool:
        """Record a kind; False where that is not possible."""
        point = like.another()
        tokens, rows = batch.clone(), None if top is None else (top[0].clone(), top[1].clone())

        recompute = recomputes(model, batch.numel())

        def launch() -> None:
            with opened(model, point.protocol, point.masked, point.corrections, recompute) as backward:
                point.nats.add_(backward(tokens, rows))

        try:
            graph, _ = self._record(launch, model.device)
        except RuntimeError as error:
            self.refusal = str(error).splitlines()[0]
            event(_logger, "backward passes are not recorded", reason=self.refusal)
            return False
        self._kept[kind] = _Recording(graph, tokens, rows, point)
        return True


def _kind(point: SlopePoint, batch: Tensor, top: TopRows | None) -> _Kind:
    protocol = point.protocol
    return _Kind(
        tuple(batch.shape),
        protocol.predicted_per_sequence,
        protocol.dense_prefix,
        point.width,
        point.learned is not None,
        () if top is None else tuple(top[0].shape),
    )


def _can_be_recorded(model: MaskedModel, length: int) -> bool:
    """Whether all is on one GPU, and attention to whole texts needs no mask of transformers'."""
    if model.device.type != "cuda" or {model.device} != set(model.block_devices):
        return False
    return needs_no_mask(model.model.config, length)
