"""Start a sparse model from a folder that holds its plan and its weights as the runtime reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from was_kernels.runtime.sparse_model import Backend, SparseModel, sparsify
from was_search.checkpoints.files import read_config
from was_search.checkpoints.fingerprint import fingerprint
from was_search.checkpoints.generation import stored_generation
from was_search.checkpoints.load import load_model, resolve_model
from was_search.checkpoints.plan_checkpoint import KEY, is_plan_config, plan_beside
from was_search.errors import ModelError
from was_search.plan import Plan


def load_sparse(
    folder: Path | str, *, device: str = "auto", dtype: str = "auto", backend: Backend = "auto"
) -> SparseModel:
    """The model of a folder that ``was-search export --with-weights`` has written, running its plan.

    Of a folder with ``columns.json`` weights are mapped from the files column-major as they are needed: on CPU nothing
    is copied or transposed, on a GPU each is copied once. The handle's ``restore()`` gives a dense model with row-major
    weights. The model's ``generate`` follows the checkpoint's ``generation_config.json``, as any model of transformers
    does.

    Args:
        folder: with weights, plan, configuration and tokenizer.
        device: as :func:`was_search.checkpoints.load.load_model` takes it.
        dtype: ``auto`` is the stored one.
        backend: as :func:`sparsify` takes it.

    Raises:
        ModelError: not such a folder, or one that is not whole.
        PlanError: the plan cannot be read, or is of another model than the weights.
        ResourceError: the device or backend is not there.
    """
    source = resolve_model(str(folder))
    config = read_config(source)
    if source.columns is None and not is_plan_config(config):
        raise ModelError(
            f"model: {source.folder} holds no plan with its weights; write both with 'was-search export --with-weights'"
        )
    if source.columns is None:
        plan, own = plan_beside(source.folder, config[KEY]), fingerprint(source, user_cache_path("was-search"))
        stored = str(config.get("dtype", config.get("torch_dtype", "bfloat16")))
    else:
        plan, own, stored = Plan.load(source.folder), source.columns.fingerprint, source.columns.dtype
    plan.require_model(own, plan.shape)
    model: Any = load_model(source, device=device, dtype=stored if dtype == "auto" else dtype)
    model.generation_config = stored_generation(source)
    return sparsify(model, plan, backend=backend, fingerprint=own)
