"""Which vectors to time, and how a profile's curves come from their times; a function given by the caller times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from was_search.decode_time.profile import LatencyProfile, LaunchCurve
from was_search.shape import N_PROJECTIONS, FloatArray, ModelShape

TimeAt = Callable[[FloatArray], tuple[float, FloatArray]]
"""Sparsities [L, 7] -> seconds of a step, and the sparsities [L, 7] that it really had."""

FUSED = ((0, 1, 2), (3,), (4, 5), (6,))
"""Launches of a fused block: q, k and v; o; gate and up; down."""

SINGLE = tuple((p,) for p in range(N_PROJECTIONS))

BASE = 0.5
"""Sparsity of all other launches while those of one kind are varied."""

KNOTS = (0.0, 0.15, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 0.98)
"""Sparsities at which launches are timed, besides BASE.

The last is below 1, as a launch that reads nothing would give the next one zeros to skip; from there on no more time is
taken to be saved.
"""

UNIFORM = (0.1, 0.3, 0.7, 0.85)
"""Sparsities of all projections at once, for the part of the time that does not add up."""


@dataclass(frozen=True)
class Kind:
    """Launches of the same projections and widths: ``projections`` in every one of ``blocks``."""

    projections: tuple[int, ...]
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Fit:
    """Curves and the rest of a profile; ``spread`` is the base vector's standard deviation over its mean."""

    curves: tuple[LaunchCurve, ...]
    rest_seconds: float
    spread: float = 0.0


def launch_kinds(shape: ModelShape, groups: tuple[tuple[int, ...], ...]) -> tuple[Kind, ...]:
    """The kinds of launches of a model whose blocks launch the projections of each group together."""
    found: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for b, group in ((b, group) for b in range(shape.n_blocks) for group in groups):
        widths = tuple((shape.in_features[b][p], shape.out_features[b][p]) for p in group)
        found.setdefault((group, *widths), []).append(b)
    return tuple(Kind(key[0], tuple(blocks)) for key, blocks in found.items())


def n_measurements(kinds: tuple[Kind, ...], rounds: int) -> int:
    """How often :func:`fit` calls the function that times steps."""
    return rounds * (len(kinds) * len(KNOTS) + len(UNIFORM) + _BASES)


_BASES = 3


def fit(time_at: TimeAt, shape: ModelShape, kinds: tuple[Kind, ...], *, rounds: int, seed: int = 0) -> Fit:
    """Time a step with the launches of one kind after another at every knot, all others at :data:`BASE`.

    Each round times all points in another order and compares with the base vector's time in the same round, so that
    a device that drifts (heat, neighbours) moves no single point; medians over rounds count. Curves are then made to
    fall by isotonic regression. The rest is the median of what curves leave over at the base and at :data:`UNIFORM`.
    """
    rng = np.random.default_rng(seed)
    base = np.full(shape.params.shape, BASE)
    points: list[tuple[int, float]] = [(k, knot) for k in range(len(kinds)) for knot in KNOTS]
    others = [(-1, level) for level in UNIFORM] + [(-2, BASE)] * _BASES
    drop: dict[tuple[int, float], list[tuple[float, float]]] = {point: [] for point in points}
    whole: list[tuple[float, FloatArray]] = []
    bases: list[float] = []
    for _ in range(rounds):
        order = [*points, *others]
        found: dict[tuple[int, float], list[tuple[float, FloatArray]]] = {}
        for i in rng.permutation(len(order)):
            k, level = order[i]
            found.setdefault((k, level), []).append(time_at(_vector(base, kinds, k, level)))
        bases += [seconds for seconds, _ in found[-2, BASE]]
        at_base = float(np.median([seconds for seconds, _ in found[-2, BASE]]))
        for point in points:
            (seconds, achieved) = found[point][0]
            drop[point].append((_mean(shape, kinds[point[0]], achieved), at_base - seconds))
        base_achieved = found[-2, BASE][0][1]
        whole.append((at_base, base_achieved))
        whole += [found[-1, level][0] for level in UNIFORM]
    curves = []
    for k, kind in enumerate(kinds):
        values = [drop[k, knot] for knot in KNOTS]
        at = [float(np.median([x for x, _ in each])) for each in values]
        saved = [float(np.median([y for _, y in each])) / len(kind.blocks) for each in values]
        curves.append(_curve(kind, [*at, _mean(shape, kind, base_achieved)], [*saved, 0.0]))
    loose = _profile(shape, tuple(curves), 1.0)
    rest = float(np.median([seconds - (loose.seconds(achieved) - 1.0) for seconds, achieved in whole]))
    return Fit(tuple(curves), max(rest, 1e-9), float(np.std(bases) / np.mean(bases)))


def falling(values: FloatArray) -> FloatArray:
    """The nearest sequence in the square norm that never rises (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] < mean:
            before, n = blocks.pop()
            mean, count = (before * n + mean * count) / (n + count), n + count
        blocks.append((mean, count))
    return np.concatenate([np.full(count, mean) for mean, count in blocks])


def random_vectors(shape: ModelShape, n: int, seed: int) -> FloatArray:
    """[n, L, 7] sparsities that share no projection's value: half around a mean of their own, half anywhere."""
    rng = np.random.default_rng(seed)
    means = rng.uniform(0.2, 0.8, (n, 1, 1))
    around = means + rng.uniform(-0.25, 0.25, (n, *shape.params.shape))
    anywhere = rng.uniform(0.0, 0.95, (n, *shape.params.shape))
    near = (np.arange(n) % 2 == 0)[:, None, None]
    return np.clip(np.where(near, around, anywhere), 0.0, 0.97)


def check(time_at: TimeAt, profile: LatencyProfile, n: int, seed: int = 1) -> list[dict[str, float]]:
    """Predicted and measured steps, in milliseconds, of ``n`` random vectors that took no part in the fit."""
    rows = []
    for vector in random_vectors(profile.shape, n, seed):
        seconds, achieved = time_at(vector)
        predicted = profile.seconds(np.clip(achieved, 0.0, 1.0))
        rows.append(
            {
                "sparsity": profile.shape.sparsity(achieved),
                "predicted_ms": 1e3 * predicted,
                "measured_ms": 1e3 * seconds,
                "error": predicted / seconds - 1.0,
            }
        )
    return rows


def check_summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """Summary of the rows of :func:`check`: their number, and the greatest and the mean absolute error."""
    errors = np.abs([row["error"] for row in rows])
    return {"vectors": len(rows), "max_error": float(errors.max()), "mean_error": float(errors.mean())}


def _vector(base: FloatArray, kinds: tuple[Kind, ...], k: int, level: float) -> FloatArray:
    """Sparsities with kind ``k`` at ``level`` and all others at the base; all at ``level`` where k is negative."""
    if k < 0:
        return np.full_like(base, level)
    vector = base.copy()
    vector[np.ix_(kinds[k].blocks, kinds[k].projections)] = level
    return vector


def _mean(shape: ModelShape, kind: Kind, achieved: FloatArray) -> float:
    weights = shape.params[np.ix_(kind.blocks, kind.projections)]
    return float((achieved[np.ix_(kind.blocks, kind.projections)] * weights).sum() / weights.sum())


def _curve(kind: Kind, at: list[float], saved: list[float]) -> LaunchCurve:
    """Seconds saved at sparsities ``at``, against the base, as a curve from 0 to 1."""
    order = np.argsort(at, kind="stable")
    knots, seconds = np.asarray(at)[order], -np.asarray(saved)[order]
    # Narrow projections have few sparsities: points that fall together are one.
    groups = np.concatenate([[True], np.diff(knots) > 1e-9]).cumsum() - 1
    knots = np.array([knots[groups == g].mean() for g in range(groups[-1] + 1)])
    seconds = falling(np.array([seconds[groups == g].mean() for g in range(groups[-1] + 1)]))
    knots[0] = 0.0
    if knots[-1] < 1.0:
        knots, seconds = np.append(knots, 1.0), np.append(seconds, seconds[-1])
    return LaunchCurve(kind.projections, kind.blocks, knots, seconds - seconds[-1])


def _profile(shape: ModelShape, curves: tuple[LaunchCurve, ...], rest: float) -> LatencyProfile:
    return LatencyProfile(shape, curves, rest, {"none": 1.0}, "", "", "", 1, 1)
