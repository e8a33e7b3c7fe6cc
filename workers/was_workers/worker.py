"""What a worker process does: hold one model and answer calls. A plain class, wrapped as a Ray actor by the pool."""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from was_search import __version__
from was_search.divergence import DenseTop
from was_search.early_stop import StopRule
from was_search.errors import DeviceLostError, InfeasibleError, ModelError, TransientError
from was_search.histogram import Histograms
from was_search.logs import bound, configure, event
from was_search.protocol import Evaluation, TokenSet
from was_search.score import ScoreKind
from was_search.shape import FloatArray, IntArray, Masks, ModelShape
from was_search.table import BlockTable
from was_search.weight_format import AS_STORED

if TYPE_CHECKING:
    from torch import Tensor, nn

    from was_kernels.ops import Ops
    from was_search.budget import Budget
    from was_search.descent import DescentOptions
    from was_search.structure import Structure


_logger = logging.getLogger(__name__)

Ids = Mapping[str, Any]


@dataclass(frozen=True)
class WorkerSpec:
    """How a worker loads its model.

    Attributes:
        model: local folder or hub id, the same on every node.
        revision: hub revision.
        dtype: of weights and activations.
        device: ``cpu`` or ``cuda``.
        score: kind of the column norms.
        masks: which projections share a mask.
        threads: CPU threads of torch; 0 leaves torch's own choice.
        log_format: of the worker's log, on its standard error, which Ray keeps in a file; "" for none.
        spread: over all GPUs that the process sees, whole blocks on each; by accelerate.
        weights: ``none``, or the format that the projections' weights are rounded to.
    """

    model: str
    revision: str
    dtype: str
    device: str
    score: ScoreKind
    threads: int = 0
    log_format: str = ""
    spread: bool = False
    weights: str = AS_STORED
    masks: Masks = "separate"


@dataclass(frozen=True)
class Place:
    """Where a worker's process is: ``node`` is Ray's id of it."""

    node: str
    host: str
    pid: int


@dataclass(frozen=True)
class WorkerInfo:
    """Who a worker is, once its model is loaded. ``peak_bytes`` is GPU memory, or the process's on CPU."""

    host: str
    pid: int
    device: str
    shape: ModelShape
    version: str
    load_seconds: float

    @property
    def name(self) -> str:
        return f"{self.host}:{self.pid}"


class Worker:
    """One model on one device. Calls are stateless but for the loaded model and a memory of shared data.

    ``about`` are a call's ids for the log, as of the study, the phase, the slot or the chain, and the attempt.

    The model is loaded at the first call and kept: a restarted process loads it again by itself, and an
    unreadable model is an ordinary error of that call instead of a failed start.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        configure(spec.log_format)
        self._spec = spec
        self._loaded: _Loaded | None = None
        self._histograms: tuple[str, Histograms] | None = None

    def place(self) -> Place:
        """Where this process is; loads nothing."""
        import ray

        return Place(ray.get_runtime_context().get_node_id(), socket.gethostname(), os.getpid())

    def set_threads(self, n: int) -> None:
        """Use ``n`` CPU threads of torch from the next call on."""
        import torch

        self._spec = dataclasses.replace(self._spec, threads=n)
        torch.set_num_threads(n)

    def prepare(self) -> WorkerInfo:
        """Load the model if that has not been done."""
        loaded = self._model()
        return WorkerInfo(
            socket.gethostname(),
            os.getpid(),
            loaded.device,
            loaded.structure.shape,
            __version__,
            loaded.seconds,
        )

    def norms(self) -> list[list[npt.NDArray[np.float32]]]:
        """Column norms, L rows of seven float32 [in_features]."""
        return [[norm.cpu().numpy() for norm in row] for row in self._model().norms]

    def histograms(
        self,
        tokens: IntArray,
        thresholds: npt.NDArray[np.float32] | None,
        batch_size: int,
        dense_prefix: int,
        *,
        about: Ids | None = None,
    ) -> tuple[Histograms, IntArray, IntArray]:
        """See :func:`was_search.calibration.histogram_pass`.

        Raises:
            ModelError: scores that are not finite.
        """
        from was_search.calibration import histogram_pass

        loaded = self._model()
        with _logged("calibration pass", about, tokens=tokens.size), _transient_memory():
            found = histogram_pass(
                loaded.model,
                loaded.structure,
                loaded.norms,
                tokens,
                thresholds,
                batch_size=batch_size,
                dense_prefix=dense_prefix,
                mask_op=loaded.ops.mask,
                count_op=loaded.ops.count,
            )
        if not found[0].finite:
            raise self._not_finite("calibration" if thresholds is None else "calibration under masks")
        return found

    def prices(
        self,
        tokens: IntArray,
        level_thresholds: npt.NDArray[np.float32],
        batch_size: int,
        dense_prefix: int,
        predicted: int,
        *,
        about: Ids | None = None,
    ) -> tuple[FloatArray, int]:
        """See :func:`was_search.pricing.price_sums`.

        Raises:
            ModelError: prices that are not finite.
        """
        from was_search.pricing import price_sums

        loaded = self._model()
        with _logged("pricing", about, tokens=tokens.size), _transient_memory():
            sums, n = price_sums(
                loaded.model,
                loaded.structure,
                loaded.norms,
                tokens,
                level_thresholds,
                batch_size=batch_size,
                dense_prefix=dense_prefix,
                predicted=predicted,
                recompute=self._recompute,
                op=loaded.ops.price,
            )
        self._require_finite(sums, "prices (the gradients of the dense model)")
        return sums, n

    def descend(
        self,
        tokens: IntArray,
        histograms: Histograms,
        start: FloatArray,
        budget: Budget,
        options: DescentOptions,
        per_round: int,
        batch_size: int,
        dense_prefix: int,
        predicted: int,
        seed: int,
        *,
        about: Ids | None = None,
    ) -> FloatArray:
        """One descent from ``start`` [L, 7], with slopes from ``per_round`` sequences of ``tokens`` a round.

        See :func:`was_search.descent.descend`; pure: the same arguments give the same result.
        """
        from was_search.descent import descend
        from was_search.slope import SlopeOracle

        loaded = self._model()
        slopes = SlopeOracle(
            loaded.model,
            loaded.structure,
            loaded.norms,
            tokens,
            histograms,
            per_call=per_round,
            batch_size=batch_size,
            dense_prefix=dense_prefix,
            predicted=predicted,
            seed=seed,
            recompute=self._recompute,
            mask_op=loaded.ops.mask,
            op=loaded.ops.slope,
        )
        with _logged("descent", about, rounds=options.rounds), _transient_memory():
            return descend(slopes, start, budget, options)

    def block_table(
        self,
        block: int,
        tokens: IntArray,
        dense: Histograms,
        batch_size: int,
        dense_prefix: int,
        step: float,
        *,
        about: Ids | None = None,
    ) -> BlockTable:
        """Greedy table of one block by block-output error on ``tokens``.

        Raises:
            ModelError: errors that are not finite.
        """
        from was_search.block_error import block_error, capture_inputs
        from was_search.greedy import block_path

        loaded = self._model()
        with _logged("greedy table", about, block=block), _transient_memory():
            inputs = capture_inputs(loaded.model, loaded.structure, block, tokens, batch_size)
            error = block_error(
                loaded.structure,
                loaded.norms,
                block,
                inputs,
                dense,
                dense_prefix=dense_prefix,
                mask_op=loaded.ops.mask,
            )
            shape = loaded.structure.shape
            try:
                return block_path(error, shape.params[block], step=step, groups=shape.groups)
            except InfeasibleError as cause:  # no level was asked for that could be infeasible
                raise self._not_finite(f"greedy table of block {block}") from cause

    def dense_top(
        self, tokens: IntArray, k: int, predicted: int, batch_size: int, *, about: Ids | None = None
    ) -> DenseTop:
        """See :func:`was_search.evaluation.dense_top`.

        Raises:
            ModelError: log-probabilities that are not finite.
        """
        from was_search.evaluation import dense_top

        with _logged("dense top", about, tokens=tokens.size), _transient_memory():
            top = dense_top(self._model().model, tokens, k, predicted=predicted, batch_size=batch_size)
        self._require_finite(top.log_probs[..., :-1], "predictions of the dense model")
        return top

    def evaluate(
        self,
        data: TokenSet,
        key: str,
        histograms: Histograms,
        sparsities: FloatArray,
        rule: StopRule | None,
        top: DenseTop | None = None,
        about: Ids | None = None,
    ) -> Evaluation:
        """Evaluate one vector; ``key`` names the histograms, so that their sums are formed once.

        The fitness is the NLL, or with ``top`` the divergence from the dense model.
        """
        from was_search.evaluation import ModelEvaluator

        loaded = self._model()
        if self._histograms is None or self._histograms[0] != key:
            self._histograms = (key, histograms)
        evaluator = ModelEvaluator(
            loaded.model,
            loaded.structure,
            loaded.norms,
            data,
            self._histograms[1],
            mask_op=loaded.ops.mask,
            top=top,
        )
        with _logged("evaluation", about) as figures, _transient_memory():
            found = evaluator.evaluate(sparsities, rule)
            figures.update(_figures(found))
            return found

    def evaluate_thresholds(
        self,
        data: TokenSet,
        thresholds: npt.NDArray[np.float32] | None,
        top: DenseTop | None = None,
        *,
        about: Ids | None = None,
    ) -> Evaluation:
        """Evaluate given thresholds, or the dense model for None; by divergence if there is a ``top``.

        Raises:
            ModelError: the dense model's loss is not finite.
        """
        from was_search.evaluation import evaluate_thresholds

        loaded = self._model()
        with _logged("plan evaluation", about) as figures, _transient_memory():
            found = evaluate_thresholds(
                loaded.model, loaded.structure, loaded.norms, data, thresholds, mask_op=loaded.ops.mask, top=top
            )
            figures.update(_figures(found))
        if thresholds is None:
            self._require_finite(found.losses, "loss of the dense model")
        return found

    def peak_bytes(self) -> int:
        """Greatest memory held since the last call: of torch on the GPU, of the process on CPU (since its start)."""
        import torch

        if self._spec.device == "cuda":
            devices = range(torch.cuda.device_count()) if self._spec.spread else [torch.cuda.current_device()]
            peak = sum(torch.cuda.max_memory_allocated(device) for device in devices)
            for device in devices:
                torch.cuda.reset_peak_memory_stats(device)
            return int(peak)
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @property
    def _recompute(self) -> bool:
        """Memory is scarce on a GPU; on a CPU the time of another forward is."""
        return self._spec.device == "cuda"

    def _require_finite(self, values: npt.ArrayLike, what: str) -> None:
        from was_search.finite import require_finite

        require_finite(values, what, self._model().model, self._spec.model, self._spec.dtype)

    def _not_finite(self, what: str) -> ModelError:
        from was_search.finite import not_finite

        return not_finite(what, self._model().model, self._spec.model, self._spec.dtype)

    def _model(self) -> _Loaded:
        if self._loaded is None:
            self._loaded = _load(self._spec)
        return self._loaded


@dataclass(frozen=True)
class _Loaded:
    model: nn.Module
    structure: Structure
    norms: list[list[Tensor]]
    ops: Ops
    device: str
    seconds: float


def _load(spec: WorkerSpec) -> _Loaded:
    import torch

    from was_kernels.ops import ops_for
    from was_search.masking import structure_norms
    from was_search.model import load_model, resolve_model
    from was_search.structure import find_structure

    started = time.perf_counter()
    if spec.threads:
        torch.set_num_threads(spec.threads)
    with _transient_memory():
        model = load_model(
            resolve_model(spec.model, spec.revision),
            dtype=spec.dtype,
            device=spec.device,
            device_map="balanced" if spec.spread else None,
            weights=spec.weights,
        )
        structure = find_structure(model, spec.masks)
        norms = structure_norms(structure, spec.score)
    n = f"{torch.cuda.device_count()} x " if spec.spread else ""
    device = n + torch.cuda.get_device_name() if spec.device == "cuda" else platform.processor() or "cpu"
    seconds = time.perf_counter() - started
    event(_logger, "model loaded", device=device, seconds=seconds, host=socket.gethostname(), pid=os.getpid())
    return _Loaded(model, structure, norms, ops_for(spec.device), device, seconds)


@contextmanager
def _logged(what: str, about: Ids | None, **figures: Any) -> Iterator[dict[str, Any]]:
    """Events for the begin of ``what`` and for its end or failure, with the ids ``about``; the end has ``figures``."""
    started = time.perf_counter()
    with bound(**(about or {})):
        event(_logger, f"{what} begun")
        try:
            yield figures
        except Exception as error:
            event(_logger, f"{what} failed", logging.WARNING, error=f"{type(error).__name__}: {error}")
            raise
        event(_logger, f"{what} ended", **{"seconds": time.perf_counter() - started, **figures})


def _figures(found: Evaluation) -> dict[str, Any]:
    return {
        "loss_nats": found.loss_nats,
        "tokens": found.tokens,
        "seconds": found.seconds,
        "stopped_early": found.stopped_early,
    }


_DEVICE_ERRORS = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS")


class _transient_memory:  # noqa: N801 - reads as a statement
    """Turns a GPU's errors into ours: out of memory may pass (another worker has it), a broken context does not."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            raise TransientError(
                f"GPU out of memory ({error}); use a smaller --batch-size, fewer workers a GPU, or more GPUs"
            ) from None
        if isinstance(error, RuntimeError) and any(word in str(error) for word in _DEVICE_ERRORS):
            raise DeviceLostError(f"the GPU failed ({str(error).splitlines()[0]})") from None
