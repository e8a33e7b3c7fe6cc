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
from typing import TYPE_CHECKING, Any, TypeVar

from was_search import __version__
from was_search.coordinator.calls import Call
from was_search.errors import DeviceLostError, TransientError
from was_search.masks.finite import NotFiniteError, not_finite
from was_search.process.logs import bound, configure, event
from was_search.shape import Masks, ModelShape, ScoreKind
from was_search.weight_format import AS_STORED
from was_workers.shared import SharedMemory

if TYPE_CHECKING:
    from was_search.masks.masked_model import MaskedModel

T = TypeVar("T")

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
    """Who a worker is, once its model is loaded."""

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
    """One model on one device; between calls it keeps only the model and the shared values of the last call.

    The model is loaded at the first call and kept: a new process loads it again by itself, and an
    unreadable model is an ordinary error of that call instead of a failed start.

    Args:
        spec: what it loads.
        number: its number in the pool, for its log.
    """

    def __init__(self, spec: WorkerSpec, number: int = 0) -> None:
        configure(spec.log_format)
        self._spec = spec
        self._number = number
        self._loaded: _Loaded | None = None
        self._shared = SharedMemory()

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
        loaded = self._ready()
        host, shape = socket.gethostname(), loaded.model.shape
        return WorkerInfo(host, os.getpid(), loaded.device, shape, __version__, loaded.seconds)

    @property
    def model(self) -> MaskedModel:
        """The model, loaded if that has not been done."""
        return self._ready().model

    def run(self, call: Call[T], about: Ids | None = None) -> T:
        """The call's result.

        Args:
            call: its shared values are fetched, unless the call before had them too.
            about: ids for the log, such as the study, the phase, the slot or the chain, and the attempt.

        Raises:
            ModelError: the model cannot be loaded, or gives NaN or infinite numbers.
            TransientError: the GPU is out of memory, or a shared value cannot be fetched.
            DeviceLostError: the GPU failed.
        """
        model = self.model
        with _logged(call.name, about) as figures, _room(model), _transient_memory():
            try:
                found = self._shared.resolved(call).run(model)
            except NotFiniteError as error:
                raise not_finite(error.what, model.model, self._spec.model, self._spec.dtype) from error
            figures.update(call.figures(found))
        return found

    def _ready(self) -> _Loaded:
        if self._loaded is None:
            with bound(worker=f"worker-{self._number}"):
                self._loaded = _load(self._spec)
        return self._loaded


@dataclass(frozen=True)
class _Loaded:
    model: MaskedModel
    device: str
    seconds: float


def _load(spec: WorkerSpec) -> _Loaded:
    import torch

    from was_kernels.pass_ops import ops_for
    from was_search.checkpoints.load import load_model, resolve_model
    from was_search.masks.masked_model import MaskedModel
    from was_search.masks.pass_graphs import PassGraphs

    started = time.perf_counter()
    if spec.threads:
        torch.set_num_threads(spec.threads)
    with _transient_memory():
        loaded = load_model(
            resolve_model(spec.model, spec.revision),
            dtype=spec.dtype,
            device=spec.device,
            device_map="balanced" if spec.spread else None,
            weights=spec.weights,
        )
        # Memory is scarce on a GPU; on a CPU the time of another forward is.
        recompute = spec.device == "cuda"
        ops = ops_for(spec.device)
        model = MaskedModel.of(loaded, spec.score, spec.masks, ops=ops, recompute=recompute)
        if ops.record is not None:
            model = dataclasses.replace(model, graphs=PassGraphs(ops.record))
    n = f"{torch.cuda.device_count()} x " if spec.spread else ""
    device = n + torch.cuda.get_device_name() if spec.device == "cuda" else platform.processor() or "cpu"
    seconds = time.perf_counter() - started
    event(_logger, "model loaded", device=device, seconds=seconds, host=socket.gethostname(), pid=os.getpid())
    return _Loaded(model, device, seconds)


@contextmanager
def _logged(what: str, about: Ids | None, **figures: Any) -> Iterator[dict[str, Any]]:
    """Log the beginning of ``what`` and its end or failure, with the ids ``about``; the end has ``figures``."""
    started = time.perf_counter()
    with bound(**(about or {})):
        event(_logger, f"{what} begun")
        try:
            yield figures
        except Exception as error:
            event(_logger, f"{what} failed", logging.WARNING, error=f"{type(error).__name__}: {error}")
            raise
        event(_logger, f"{what} ended", **{"seconds": time.perf_counter() - started, **figures})


@contextmanager
def _room(model: MaskedModel) -> Iterator[None]:
    """Give the memory of recorded passes back where a call lacks some: it may be had when the call is repeated."""
    try:
        yield
    except TransientError:
        if model.graphs is not None:
            model.graphs.drop()
        raise


_DEVICE_ERRORS = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS")


_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory")


class _transient_memory:  # noqa: N801 - reads as a statement
    """Turns errors of memory and of a GPU into ours.

    Out of memory may pass (another worker has it), a broken context does not.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            raise TransientError(
                f"GPU out of memory ({error}); use a smaller --batch-size, fewer workers a GPU, or more GPUs"
            ) from None
        if isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError | OSError) and any(word in str(error) for word in _NO_MEMORY)
        ):
            raise TransientError(
                f"out of main memory ({(str(error).splitlines() or ['MemoryError'])[0]}); use fewer --workers or a "
                "smaller --batch-size, or a machine with more memory (a limit may be set: 'ulimit -v', a container's)"
            ) from None
        if isinstance(error, RuntimeError) and any(word in str(error) for word in _DEVICE_ERRORS):
            raise DeviceLostError(f"the GPU failed ({str(error).splitlines()[0]})") from None
