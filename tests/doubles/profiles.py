"""Synthetic profiles: made up, not measured."""

from __future__ import annotations

import numpy as np

from was_search.decode_time.profile import LatencyProfile, LaunchCurve
from was_search.shape import FloatArray, ModelShape

FUSED = ((0, 1, 2), (3,), (4, 5), (6,))
SINGLE = tuple((p,) for p in range(7))

KNOTS = np.array([0.0, 0.25, 0.5, 0.6, 0.75, 0.9, 1.0])


def synthetic_profile(
    shape: ModelShape,
    *,
    groups: tuple[tuple[int, ...], ...] = FUSED,
    per_weight: tuple[float, ...] = (1.0, 3.0, 0.6, 1.5),
    bend: float = 0.35,
    rest_share: float = 0.3,
    dense_seconds: float | None = None,
    knots: FloatArray = KNOTS,
) -> LatencyProfile:
    """A profile in which a weight of each kind of launch has a price of its own, and savings shrink with sparsity.

    Args:
        per_weight: nanoseconds of 1,000 weights, by group.
        rest_share: what no sparsity saves, as a share of the step with nothing skipped.
        bend: 0 for time linear in sparsity, towards 1 for a curve that saturates.
        dense_seconds: of the dense step; None: as fast as the runtime with nothing skipped.
    """
    curves = []
    for group, cost in zip(groups, per_weight, strict=True):
        kinds: dict[tuple, list[int]] = {}
        for b in range(shape.n_blocks):
            kinds.setdefault(tuple((shape.in_features[b][p], shape.out_features[b][p]) for p in group), []).append(b)
        for blocks in kinds.values():
            whole = 1e-12 * cost * float(shape.params[blocks[0], list(group)].sum())
            left = 1.0 - knots
            curves.append(LaunchCurve(group, tuple(blocks), knots, whole * left * (1.0 - bend + bend * left)))
    saved = sum(len(curve.blocks) * float(curve.seconds[0]) for curve in curves)
    made = LatencyProfile(
        shape=shape,
        curves=tuple(curves),
        rest_seconds=rest_share / (1.0 - rest_share) * saved if saved else 1e-6,
        dense={"eager": 1.0},
        device="made up",
        dtype="float16",
        backend="cuda, fused",
        rows=1,
        kv_length=256,
        source="synthetic",
    )
    dense = made.seconds(np.zeros((shape.n_blocks, 7))) if dense_seconds is None else dense_seconds
    return LatencyProfile(**{**vars_of(made), "dense": {"eager": dense}})


def vars_of(profile: LatencyProfile) -> dict:
    """The fields, without what was computed from them."""
    return {name: getattr(profile, name) for name in profile.__dataclass_fields__}
