"""The masked model: a model with what every pass over it needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from was_search.checkpoints.structure import Structure, find_structure, weight_of
from was_search.compensation import Compensation
from was_search.masks.corrections import Corrections, LearnedCorrections, corrections
from was_search.masks.ops import PLAIN, Ops
from was_search.masks.score import column_norms, combined_norms
from was_search.shape import Masks, ModelShape, ScoreKind
from was_search.texts.protocol import TokenSet

if TYPE_CHECKING:
    from was_search.masks.pass_graphs import PassGraphs


@dataclass(frozen=True, eq=False)
class MaskedModel:
    """A causal LM, its blocks and the norms of its weights: what a worker holds and every pass takes.

    Attributes:
        model: on one device, or its blocks on several; its parameters may be frozen.
        structure: its blocks.
        norms: from :func:`structure_norms`.
        ops: the operations of the passes.
        recompute: whether backward passes keep the activations of one block at a time, at the cost of one more forward,
            where those of all blocks would take much of a GPU's memory.
        corrections: of outputs, wherever inputs are masked; None: there are none.
        graphs: replays backward passes; None: they are launched anew each time.
    """

    model: nn.Module
    structure: Structure
    norms: list[list[Tensor]]
    ops: Ops = PLAIN
    recompute: bool = False
    corrections: Corrections | None = None
    graphs: PassGraphs | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        score: ScoreKind,
        masks: Masks = "separate",
        *,
        ops: Ops = PLAIN,
        recompute: bool = False,
    ) -> MaskedModel:
        """``model`` with its structure found and its norms taken.

        Raises:
            ModelError: as :func:`was_search.checkpoints.structure.find_structure`.
        """
        structure = find_structure(model, masks)
        return cls(model, structure, structure_norms(structure, score), ops, recompute)

    @property
    def shape(self) -> ModelShape:
        return self.structure.shape

    @property
    def device(self) -> torch.device:
        """The device that tokens go to."""
        return next(self.model.parameters()).device

    @property
    def block_devices(self) -> list[torch.device]:
        """The device of each block; what is learnt of a block stays there."""
        return [row[0].device for row in self.norms]

    def batches(self, data: TokenSet, size: int | None = None) -> Iterator[Tensor]:
        """The sequences of ``data`` in their order, on the model's device: int64 [at most ``size``, length] each.

        ``size`` is the protocol's batch size if it is not given.
        """
        size = size or data.protocol.batch_size
        for start in range(0, len(data.tokens), size):
            yield torch.as_tensor(data.tokens[start : start + size], dtype=torch.long, device=self.device)

    def compensated(self, compensation: Compensation | None) -> MaskedModel:
        """The same model with outputs corrected by ``compensation`` wherever inputs are masked; None: by nothing."""
        found = None if compensation is None else corrections(self.structure, compensation, self.ops.correct)
        return replace(self, corrections=found)

    def learned_corrections(self) -> LearnedCorrections:
        """Corrections of all outputs, to be learned."""
        return LearnedCorrections(self.structure, self.ops.correct, self.ops.correction)

    def block(self, number: int) -> MaskedModel:
        """The same model with only one of its blocks to mask."""
        structure = Structure((self.structure.blocks[number],), self.structure.masks)
        return replace(self, structure=structure, norms=[self.norms[number]], graphs=None)


def structure_norms(structure: Structure, kind: ScoreKind) -> list[list[Tensor]]:
    """Column norms of every projection, L rows of seven [in_features] float32 tensors on the weights' devices.

    Projections that share a mask have one tensor: the norms of their weights stacked upon one another. Rounded weights
    count as rounded.
    """
    rows: list[list[Tensor]] = [[] for _ in structure.blocks]
    for masked in structure.inputs():
        norms = combined_norms([column_norms(weight_of(linear), kind) for linear in masked.linears], kind)
        rows[masked.block].extend([norms] * len(masked.members))
    return rows
