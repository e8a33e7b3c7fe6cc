"""Time a decoding step at any sparsities, through the runtime that plans use: what profiles are made of.

The model runs a plan whose thresholds are all 1, and masks are set by writing the norms: a score is
``abs(x) * norm``, so a huge norm keeps a channel and one of zero drops it. The kernels score, list and skip as always,
and a CUDA graph that was captured once serves all vectors.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from was_kernels.runtime.sparse_linear import DENSE_ABOVE
from was_kernels.runtime.sparse_model import SparseModel, sparsify
from was_kernels.timing.step import DecodeStep, Times
from was_search.checkpoints.structure import find_structure
from was_search.masks.masked_model import structure_norms
from was_search.plan import Plan
from was_search.shape import FloatArray

KEPT = 1e30
"""A norm that puts any score above 1: float16's least number is 6e-8, and 65504 times this is still a float32."""

_QUANTILES = 129


class Masks(Protocol):
    """Sets the masks of a model that runs a :func:`profile_plan`."""

    def set(self, sparsities: FloatArray, step: DecodeStep) -> FloatArray:
        """Mask at ``sparsities`` [L, 7]; returns the sparsities [L, 7] that steps then have."""
        ...


class FixedMasks:
    """Random channels, the same at every token: exact, and enough for one row, whose time depends on their number only.

    At least one channel of each projection is kept: a launch that reads nothing hands on zeros, which the next one
    would skip.
    """

    def __init__(self, handle: SparseModel, seed: int = 0) -> None:
        self._handle = handle
        generator = torch.Generator().manual_seed(seed)
        self._ranks = [
            torch.randperm(projection.in_features, generator=generator).to(projection.weight.device)
            for projection in handle.projections
        ]

    def set(self, sparsities: FloatArray, step: DecodeStep) -> FloatArray:
        achieved = np.zeros(sparsities.size)
        for i, (projection, rank) in enumerate(zip(self._handle.projections, self._ranks, strict=True)):
            kept = max(1, round((1.0 - float(sparsities.flat[i])) * projection.in_features))
            projection.norms.copy_(torch.where(rank < kept, KEPT, 0.0))
            achieved[i] = 1.0 - kept / projection.in_features
        return achieved.reshape(sparsities.shape)


class ScoredMasks:
    """Masks by score, as a plan has them: several rows drop channels of their own, and a launch reads their union.

    Thresholds are quantiles of the dense model's scores on the prompt; under the masks of other projections they give
    other sparsities, so the sparsities of the steps are counted.
    """

    def __init__(self, handle: SparseModel, norms: list[Tensor], tokens: Tensor) -> None:
        self._handle = handle
        self._norms = norms
        self._quantiles: list[FloatArray] = []
        levels = torch.linspace(0.0, 1.0, _QUANTILES)
        found: list[Tensor] = [torch.empty(0)] * len(norms)

        def hook(i: int) -> Any:
            def observe(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                scores = (args[0].abs().float() * norms[i]).flatten().sort().values
                found[i] = scores[(levels.to(scores.device) * (len(scores) - 1)).long()]

            return observe

        _keep_all(handle)
        hooks = [projection.register_forward_pre_hook(hook(i)) for i, projection in enumerate(handle.projections)]
        try:
            with torch.inference_mode():
                model: Any = handle.model
                model(tokens, use_cache=False)
        finally:
            for each in hooks:
                each.remove()
        self._quantiles = [values.double().cpu().numpy() for values in found]

    def set(self, sparsities: FloatArray, step: DecodeStep) -> FloatArray:
        levels = np.linspace(0.0, 1.0, _QUANTILES)
        for i, projection in enumerate(self._handle.projections):
            level = float(sparsities.flat[i])
            threshold = float(np.interp(level, levels, self._quantiles[i])) if level > 0.0 else 0.0
            projection.norms.copy_(
                self._norms[i] / threshold if threshold > 0.0 else torch.full_like(self._norms[i], KEPT)
            )
        return step.counted(self._handle).sparsities


def profile_plan(model: nn.Module, *, dense_prefix: int = 1) -> Plan:
    """A plan whose thresholds are one and whose norms keep every channel."""
    structure = find_structure(model)
    return Plan(
        model="profile",
        revision="",
        fingerprint="0" * 64,
        shape=structure.shape,
        score="none",
        budget=0.5,
        dense_prefix=dense_prefix,
        sparsities=np.zeros(structure.shape.params.shape),
        thresholds=np.ones(structure.shape.params.shape, np.float32),
        norms=tuple(tuple(np.full(d, KEPT, np.float32) for d in row) for row in structure.shape.in_features),
        weights=structure.weights,
    )


class StepClock:
    """A model's sparse step, timed at sparsities; a context that gives the model its own projections back.

    A call sets masks in the way in which profiles are made: fixed ones for one row, by score for several.
    :meth:`by_score` sets them as plans do.

    Args:
        model: a transformers causal LM, dense.
        tokens: int64 [rows, more than kv_length], as :class:`DecodeStep` takes them.
        kv_length: positions in the cache.
        steps: number of steps timed for each vector.
        backend: as :func:`was_kernels.runtime.sparse_model.sparsify` takes it.
    """

    def __init__(
        self, model: nn.Module, tokens: Tensor, kv_length: int, *, steps: int = 20, backend: Any = "auto"
    ) -> None:
        structure = find_structure(model)
        norms = [norm.float() for row in structure_norms(structure, "l2") for norm in row]
        self._handle = sparsify(model, profile_plan(model), backend=backend)
        try:
            self._steps, self._on_gpu = steps, tokens.is_cuda
            self._step = DecodeStep(model, tokens, kv_length)
            self._scored = ScoredMasks(self._handle, norms, tokens[:, :kv_length])
            self._masks: Masks = FixedMasks(self._handle) if len(tokens) == 1 else self._scored
        except BaseException:
            self._handle.restore()
            raise
        # On a CPU each projection is read by itself, also in steps that run fused.
        whole = self._handle.backend == "cuda" and self._handle.fused == len(structure.blocks)
        self.fused = whole and len(tokens) <= DENSE_ABOVE
        self.backend = f"{self._handle.backend}{', fused' if self.fused else ''}"

    def __enter__(self) -> StepClock:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.restore()

    def __call__(self, sparsities: FloatArray) -> tuple[float, FloatArray]:
        """:func:`typical_seconds` of a step at ``sparsities`` [L, 7], and the sparsities [L, 7] that it had."""
        return self._timed(self._masks, sparsities)

    def by_score(self, sparsities: FloatArray) -> tuple[float, FloatArray]:
        """What a call gives, but with every token's masks made by its scores."""
        return self._timed(self._scored, sparsities)

    def _timed(self, masks: Masks, sparsities: FloatArray) -> tuple[float, FloatArray]:
        achieved = masks.set(sparsities, self._step)
        return typical_seconds(self._step.times(self._steps, again=True), self._on_gpu), achieved


def typical_seconds(times: Times, on_gpu: bool) -> float:
    """The median on a GPU; on a CPU the 20th percentile, as other processes only ever add time."""
    return 1e-3 * (times.p50 if on_gpu else times.p20)


def _keep_all(handle: SparseModel) -> None:
    for projection in handle.projections:
        projection.norms.fill_(KEPT)
