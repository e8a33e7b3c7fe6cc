"""An ordinary checkpoint folder that carries its plan: what other programs load, dense or with the plan.

Weights, names and layout are the checkpoint's own files. ``config.json`` gains a ``quantization_config`` of the method
``was``, by which transformers and serving engines find the plan beside it; without our package they load the model
dense and say so. The folder comes from anywhere: what the configuration says of the plan is compared with the plan.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from was_search.checkpoints.appearing import appearing
from was_search.checkpoints.column_layout import COLUMNS_NAME
from was_search.checkpoints.files import ModelSource, read_config
from was_search.checkpoints.limits import PLAN_METHOD, is_plan
from was_search.errors import ConfigError, PlanError
from was_search.plan import JSON_NAME, Plan

KEY = "quantization_config"
_COPIED = ("generation_config.json", "chat_template.jinja")


def save_with_plan(source: ModelSource, plan: Plan, folder: Path) -> Path:
    """Copy the checkpoint ``source`` into ``folder`` and add ``plan``; weights stay as they are stored.

    ``config.json`` is written last: a folder without it is not taken for a whole one.

    Raises:
        PlanError: the plan is for rounded weights, or the folder cannot be written.
        ConfigError: the folder is the checkpoint's own, or the checkpoint's weights are in another format already.
    """
    if folder.exists() and folder.resolve() == source.folder.resolve():
        raise ConfigError(f"plan: {folder} is the checkpoint's own folder; choose another")
    config = read_config(source)
    if config.get(KEY) is not None and not is_plan_config(config):
        raise ConfigError(f"model: {source.folder} is quantised, whose weights cannot be exported with a plan")
    names = [*_COPIED, *(path.name for path in source.tokenizer_files())]
    entry = source.weights_entry()
    weights = [*source.weight_files(), *([entry] if entry is not None and entry.suffix == ".json" else [])]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder, {path.name for path in weights})
        plan.save(folder)
        for path in [*weights, *(source.folder / name for name in names)]:
            if path.is_file():
                with appearing(folder / path.name) as temporary:
                    shutil.copyfile(path, temporary)
        config.pop("configuration_files", None)  # this one is for every release of transformers
        with appearing(folder / "config.json") as temporary:
            temporary.write_text(json.dumps({**config, KEY: plan_config(folder, plan)}, indent=2) + "\n")
    except OSError as error:
        raise PlanError(f"plan: cannot write {folder} ({error.strerror}); choose another folder") from error
    return folder


def _clear(folder: Path, kept: set[str]) -> None:
    """Remove what an earlier export left that would be taken for this one's weights."""
    stale = [folder / "config.json", folder / COLUMNS_NAME]
    for pattern in ("columns-*.safetensors", "model*.safetensors", "model*.safetensors.index.json"):
        stale += [path for path in folder.glob(pattern) if path.name not in kept]
    for path in stale:
        path.unlink(missing_ok=True)


def plan_config(folder: Path, plan: Plan) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint with ``plan``, which lies in ``folder``."""
    return {
        "quant_method": PLAN_METHOD,
        "schema_version": plan.schema_version,
        "plan_sha256": hashlib.sha256((folder / JSON_NAME).read_bytes()).hexdigest(),
        "masks": plan.shape.masks,
        "sparsity": plan.budget,
    }


def is_plan_config(config: dict[str, Any]) -> bool:
    """Whether a checkpoint's configuration says that a plan lies beside it."""
    return is_plan(config.get(KEY))


def plan_beside(folder: Path, quantization: dict[str, Any]) -> Plan:
    """The plan in ``folder``, which a configuration's ``quantization`` entry speaks of.

    Raises:
        PlanError: it is missing or damaged, or another one than the configuration says.
    """
    plan = Plan.load(folder)
    said = {name: quantization.get(name) for name in ("schema_version", "plan_sha256", "masks")}
    there = {name: value for name, value in plan_config(folder, plan).items() if name in said}
    wrong = [name for name in said if said[name] != there[name]]
    if wrong:
        raise PlanError(
            f"{folder}: config.json speaks of another plan than the one that lies there ({', '.join(wrong)}); "
            "export the plan with its weights again"
        )
    return plan
