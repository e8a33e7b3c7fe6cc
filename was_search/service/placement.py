"""Where the model runs: device, GPUs of each worker and dtype."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from was_search.errors import ResourceError
from was_search.service.settings import Settings

if TYPE_CHECKING:
    from was_search.checkpoints.load import ModelSource
    from was_workers.cluster import Cluster

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Where workers run: ``device`` cpu or cuda, GPUs of each worker, and the dtype."""

    device: str
    gpus_per_worker: float
    dtype: str


def placed_on_workers(settings: Settings, cluster: Callable[[], Cluster]) -> Placement:
    """Device and dtype of the workers, decided before any is started.

    Args:
        settings: what is asked for.
        cluster: what Ray offers; asked where it runs elsewhere.

    Raises:
        ResourceError: a GPU was asked for, there is none, and none may come.
    """
    from was_search.checkpoints.load import pick_dtype
    from was_workers.cluster import resolve_address

    wants_gpu = settings.device == "cuda" or settings.gpus_per_worker > 0
    if settings.device == "cpu":
        if settings.gpus_per_worker > 0:
            raise ResourceError(f"gpus_per_worker: must be 0 with --device cpu, got {settings.gpus_per_worker:g}")
        gpus = 0
    elif resolve_address(settings.ray) == "local":
        gpus = _gpus_here(settings, wants_gpu)
    else:
        gpus = _gpus_there(settings, cluster(), wants_gpu)
    device = "cuda" if wants_gpu or (settings.device == "auto" and gpus and settings.gpus_per_worker != 0) else "cpu"
    share = 0.0 if device == "cpu" else (1.0 if settings.gpus_per_worker <= 0 else settings.gpus_per_worker)
    return Placement(device, share, pick_dtype(settings.dtype, device))


def _gpus_here(settings: Settings, wants_gpu: bool) -> int:
    """GPUs of this machine."""
    import torch

    gpus = torch.cuda.device_count()
    if wants_gpu and not gpus:
        raise ResourceError(
            f"{_asked(settings)} was asked for and no GPU was found; 'was-search doctor' tells what this machine has, "
            "--device cpu runs without one"
        )
    return gpus


def _gpus_there(settings: Settings, cluster: Cluster, wants_gpu: bool) -> int:
    """GPUs that the cluster's nodes have now; those that its autoscaler adds are waited for if they are asked for."""
    from was_workers.autoscaler import may_grow

    gpus = int(cluster.gpus)
    if not gpus and wants_gpu and not may_grow():
        raise ResourceError(
            f"{_asked(settings)} was asked for and no node of the cluster at {cluster.address!r} has a GPU (it has "
            f"{cluster.cpus:g} CPU); start nodes that have some ('ray start --address=... --num-gpus=...'), or use "
            "--device cpu"
        )
    if not gpus and not wants_gpu and settings.gpus_per_worker != 0 and may_grow():
        _logger.warning(
            "the workers run without GPUs: no node of the cluster at %r has one now; --device cuda waits until its "
            "autoscaler adds some, --device cpu says that none is wanted",
            cluster.address,
        )
    return gpus


def _asked(settings: Settings) -> str:
    """The option that asks for a GPU."""
    return "--device cuda" if settings.device == "cuda" else f"--gpus-per-worker {settings.gpus_per_worker:g}"


def placed_here(settings: Settings, source: Callable[[], ModelSource]) -> Placement:
    """Device and dtype of the steps that run in this process, whatever a cluster has.

    Args:
        settings: what is asked for.
        source: the model's; asked where its files may decide the dtype.

    Raises:
        ResourceError: a GPU was asked for and there is none.
    """
    from was_search.checkpoints.load import pick_device, pick_dtype

    device, dtype = pick_device(settings.device), settings.dtype
    if dtype == "auto" and (columns := source().columns) is not None:
        return Placement(device, 0.0, columns.dtype)
    return Placement(device, 0.0, pick_dtype(dtype, device))
