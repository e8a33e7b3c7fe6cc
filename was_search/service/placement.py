"""Where the model runs: device, GPUs of each worker and dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from was_search.errors import ResourceError
from was_search.service.settings import Settings

if TYPE_CHECKING:
    from was_search.checkpoints.load import ModelSource


@dataclass(frozen=True)
class Placement:
    """Where workers run: ``device`` cpu or cuda, GPUs of each worker, and the dtype."""

    device: str
    gpus_per_worker: float
    dtype: str


def placed_on_workers(settings: Settings, cluster_gpus: Callable[[], float]) -> Placement:
    """Device and dtype of the workers, decided before any is started.

    Args:
        settings: what is asked for.
        cluster_gpus: how many GPUs the cluster has; asked where Ray runs elsewhere.

    Raises:
        ResourceError: a GPU was asked for and there is none.
    """
    from was_search.checkpoints.load import pick_dtype
    from was_workers.cluster import resolve_address

    if settings.device == "cpu":
        if settings.gpus_per_worker > 0:
            raise ResourceError(f"gpus_per_worker: must be 0 with --device cpu, got {settings.gpus_per_worker:g}")
        gpus = 0
    elif resolve_address(settings.ray) == "local":
        import torch

        gpus = torch.cuda.device_count()
    else:
        gpus = int(cluster_gpus())
    wants_gpu = settings.device == "cuda" or settings.gpus_per_worker > 0
    if wants_gpu and not gpus:
        asked = "--device cuda" if settings.device == "cuda" else f"--gpus-per-worker {settings.gpus_per_worker:g}"
        raise ResourceError(
            f"{asked} was asked for and no GPU was found; 'was-search doctor' tells what this machine has, "
            "--device cpu runs without one"
        )
    device = "cuda" if wants_gpu or (settings.device == "auto" and gpus and settings.gpus_per_worker != 0) else "cpu"
    share = 0.0 if device == "cpu" else (1.0 if settings.gpus_per_worker <= 0 else settings.gpus_per_worker)
    return Placement(device, share, pick_dtype(settings.dtype, device))


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
