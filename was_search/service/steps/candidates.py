"""Evaluations of candidates, each at its own operating point on a split; cached.

On the test split candidates run beside the dense model, whose predictions theirs are compared with.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from was_search.compensation import Compensation
from was_search.coordinator import phases
from was_search.coordinator.calls import Call, Shared
from was_search.coordinator.contracts import WorkerPool
from was_search.coordinator.model_calls import EvaluateBesideDense, EvaluateThresholds
from was_search.masks.beside_dense import joined
from was_search.process.plain_json import finite
from was_search.service.arrays import pack_array, unpack_array
from was_search.service.settings import Settings
from was_search.service.steps.calibration import OperatingPoint
from was_search.service.steps.dense import Dense
from was_search.service.steps.dense_predictions import dense_top_key
from was_search.service.token_sets import TokenSets
from was_search.shape import N_PROJECTIONS
from was_search.texts.protocol import Distance, Evaluation, content_hash, perplexity

if TYPE_CHECKING:
    from was_storage.studies.cache import Artifact


COMPENSATED = "compensated"
"""The plan's name in tables where it has a compensation."""


@dataclass(frozen=True)
class Figures:
    """One evaluation of one candidate on one split, with what was counted."""

    evaluation: Evaluation
    split: str
    achieved: float

    def to_json(self, tokens: TokenSets) -> dict[str, Any]:
        nll = self.evaluation.nll_nats()
        by_divergence = {} if self.evaluation.nats is None else {"kl_nats": self.evaluation.loss_nats}
        figures: dict[str, Any] = finite(
            {
                **by_divergence,
                "loss_nats": nll,
                "perplexity": perplexity(nll),
                **({} if self.evaluation.distance is None else self.evaluation.distance.to_json()),
                "achieved_sparsity": self.achieved,
                "tokens": self.evaluation.tokens,
                "protocol": tokens.of(self.split).protocol.to_json(),
            }
        )
        return figures


@dataclass(frozen=True)
class Request:
    """One evaluation: a candidate (None: the dense model) at its own operating point on a split.

    The loss is the NLL, or with ``by_fitness`` the study's fitness, on the search split only.
    """

    name: str
    split: str
    point: OperatingPoint | None
    by_fitness: bool = False

    @property
    def beside_dense(self) -> bool:
        return self.split == "test" and self.point is not None


def measure(dense: Dense, requests: list[Request]) -> list[Figures]:
    """Figures of the ``requests``, in their order; those not cached are evaluated side by side on the workers."""
    started = time.perf_counter()
    context = dense.context
    found = [_cached(dense, request) for request in requests]
    missing = [i for i, evaluation in enumerate(found) if evaluation is None]
    if missing:
        evaluations = _evaluate(dense, [requests[i] for i in missing])
        for i, evaluation in zip(missing, evaluations, strict=True):
            found[i] = evaluation
            _remember(dense, requests[i], evaluation)
    else:
        context.reporter.cached("evaluate", f"{len(requests)} evaluations", time.perf_counter() - started)
    return [
        Figures(evaluation, request.split, dense.calibration.shape.sparsity(evaluation.achieved))
        for evaluation, request in zip(found, requests, strict=True)
        if evaluation is not None
    ]


def _evaluate(dense: Dense, requests: list[Request]) -> list[Evaluation]:
    """Evaluations of the ``requests``: those beside the dense model in shards of the test split, others a call each.

    The dense model is run once a shard for all candidates, and its own evaluation comes with theirs.
    """
    context, pool = dense.context, dense.context.pool
    beside = [i for i, request in enumerate(requests) if request.beside_dense]
    with_them = [i for i, r in enumerate(requests) if beside and r.split == "test" and r.point is None]
    alone = [i for i in range(len(requests)) if i not in (*beside, *with_them)]
    calls: list[Call[Any]] = [
        EvaluateThresholds(
            dense.tokens.of(requests[i].split),
            _thresholds(requests[i]),
            dense.shared_top if _by_divergence(context.settings, requests[i]) else None,
            shared_compensation(pool, requests[i].point),
        )
        for i in alone
    ]
    if beside:
        thresholds = tuple(point.thresholds for i in beside if (point := requests[i].point) is not None)
        by = tuple(shared_compensation(pool, requests[i].point) for i in beside)
        calls += [EvaluateBesideDense(part, thresholds, by) for part in phases.fine_shards(pool, dense.tokens.test)]
    names = ", ".join(dict.fromkeys(request.name for request in requests))
    with context.phase(f"evaluate {names}", len(calls)) as advance:
        results = pool.map(calls, phase="evaluate", done=advance)
    found: dict[int, Evaluation] = dict(zip(alone, results, strict=False))
    if beside:
        at_dense, *at_points = (joined(parts) for parts in zip(*results[len(alone) :], strict=True))
        found |= dict(zip(beside, at_points, strict=True)) | dict.fromkeys(with_them, at_dense)
    return [found[i] for i in range(len(requests))]


def _thresholds(request: Request) -> npt.NDArray[np.float32] | None:
    return None if request.point is None else request.point.thresholds


def shared_compensation(pool: WorkerPool, point: OperatingPoint | None) -> Shared[Compensation] | None:
    """The point's compensation where the workers find it; None where it has none."""
    return None if point is None or point.compensation is None else pool.share(point.compensation)


def _by_divergence(settings: Settings, request: Request) -> bool:
    return request.by_fitness and settings.fitness == "kl"


def _key(dense: Dense, request: Request) -> str:
    context, protocol = dense.context, dense.tokens.of(request.split).protocol
    settings, device = context.settings, context.placement.device
    parts = ["evaluation", 2, context.model.key, settings.scoring, protocol, device, _thresholds(request)]
    if _by_divergence(settings, request):
        parts.append(dense_top_key(context, dense.tokens.search))
    if request.beside_dense:
        parts.append("beside dense")
    if request.point is not None and request.point.compensation is not None:
        parts.append(request.point.compensation.flat())
    return content_hash(*parts)


def _cached(dense: Dense, request: Request) -> Evaluation | None:
    n = len(dense.tokens.of(request.split).tokens)
    by_divergence = _by_divergence(dense.context.settings, request)
    shape = (2, n) if by_divergence else (3, n) if request.beside_dense else (n,)

    def read(found: Artifact) -> Evaluation:
        losses, *more = np.atleast_2d(unpack_array(found.payload, shape, np.float64))
        achieved = np.asarray(found.meta["achieved"], np.float64)
        if achieved.ndim != 2 or achieved.shape[1] != N_PROJECTIONS:
            raise ValueError(f"achieved: [L, {N_PROJECTIONS}] is wanted, got {achieved.shape}")
        tokens, seconds = int(found.meta["tokens"]), float(found.meta["seconds"])
        of_dense = Distance(*more) if request.beside_dense else None
        return Evaluation(losses, tokens, seconds, False, achieved, more[0] if by_divergence else None, of_dense)

    return dense.context.cache.get("evaluation", _key(dense, request), read)


def _remember(dense: Dense, request: Request, evaluation: Evaluation) -> None:
    meta = {
        "tokens": evaluation.tokens,
        "seconds": evaluation.seconds,
        "achieved": evaluation.achieved.tolist(),
    }
    losses = evaluation.losses
    if evaluation.distance is not None:
        losses = np.stack([losses, evaluation.distance.flips, evaluation.distance.variation])
    if evaluation.nats is not None:
        losses = np.stack([losses, evaluation.nats])
        _remember(dense, dataclasses.replace(request, by_fitness=False), evaluation.as_nll())
    dense.context.cache.put("evaluation", _key(dense, request), pack_array(losses), meta)
