"""Load a model and its tokenizer from a checkpoint. Remote code is never run."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from was_search.checkpoints.column_layout import column_state
from was_search.checkpoints.empty_model import empty_model, model_config, stored_shapes
from was_search.checkpoints.files import ModelSource, resolve_model
from was_search.checkpoints.generation import own_generation
from was_search.checkpoints.ordinary_tensors import ordinary_tensors
from was_search.checkpoints.plan_checkpoint import KEY, is_plan_config
from was_search.checkpoints.quiet_loading import quiet_loading
from was_search.errors import ConfigError, ModelError, ResourceError, reason
from was_search.process.collector import collector_at_rest
from was_search.weight_format import AS_STORED, WeightFormat

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "DTYPES",
    "ModelSource",
    "load_model",
    "load_tokenizer",
    "pick_device",
    "pick_dtype",
    "resolve_model",
]

_IN_A_BLOCK = re.compile(r"(.*?\.)\d+\..*\.(?:weight|bias)$")
"""A weight in a list of modules, and the list's name."""

DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes that weights and activations may have."""


def load_tokenizer(source: ModelSource | str, revision: str = "") -> Any:
    """The tokenizer of a checkpoint, given as a source, a folder or a hub id.

    Raises:
        ModelError: the checkpoint is not there or has no tokenizer that can be read.
    """
    with collector_at_rest():
        from transformers import AutoTokenizer

    if isinstance(source, str):
        source = resolve_model(source, revision)
    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:
        model_config(source)  # which transformers reads too, and may be what it stumbles over
        raise ModelError(f"model: {source.folder} has no tokenizer that can be read ({reason(error)})") from error


@ordinary_tensors()
def load_model(
    source: ModelSource | str,
    *,
    revision: str = "",
    dtype: str = "bfloat16",
    device: str = "cpu",
    device_map: str | dict[str, Any] | None = None,
    weights: str = AS_STORED,
    gpus: int = 1,
) -> nn.Module:
    """A causal language model in evaluation mode with frozen weights.

    Its ``generate`` is greedy unless it is told otherwise: of the checkpoint's ``generation_config.json`` only the ids
    that begin, end and pad a text are read.

    Args:
        source: as :func:`resolve_model` returns it, or a name for it.
        revision: the hub's, where ``source`` is a hub id.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` as in :func:`pick_dtype`.
        device: ``cpu``, ``cuda``, ``cuda:1``, ..., or ``auto``.
        device_map: spreads the blocks over several devices, as transformers takes it; then ``device`` is not used.
        weights: ``int8`` or ``int4``, with a group as in ``int4:64``: the projections' weights are rounded, one after
            another. They pass by way of main memory, so that the device never holds more than one unrounded.
        gpus: if above 1, spread the blocks over the first ``gpus`` GPUs; ``device`` must be ``cuda`` or ``auto`` then.

    Raises:
        ModelError: unreadable or incomplete weights, a model that needs code of its own, or one that is not a
            causal language model.
        ResourceError: no GPU for ``cuda``, accelerate is missing for ``device_map``, or the devices are too small: what
            lies on a disk, or in main memory beside GPUs, would be moved for every forward.
        ConfigError: an unknown dtype, device or format of weights, or no number of GPUs that fits the device.
        torch.OutOfMemoryError: the GPU is too full.
    """
    with collector_at_rest():
        import torch
        import transformers.modeling_utils  # noqa: F401 - and with it most of what models of all families import
        from transformers import AutoModelForCausalLM

    from was_search.checkpoints.quantised import quantise_projections
    from was_search.checkpoints.structure import find_structure

    device = pick_device(device)
    memory = None
    if gpus != 1:
        device_map, memory = "balanced", gpu_memory(gpus, device)
    dtype = pick_dtype(dtype, device)
    if isinstance(source, str):
        source = resolve_model(source, revision)
    if device_map is not None and not _has_accelerate():
        raise ResourceError(
            "a model over several GPUs needs the package accelerate, which is not installed in "
            f"{sys.executable}; pip install 'accelerate>=1.1'"
        )
    form = WeightFormat.parse(weights)
    empty = empty_model(source)  # refuses what must not be loaded
    placement = device_map
    if placement is None and device != "cpu" and form is None and _has_accelerate():
        placement = {"": device}  # straight to the GPU, not by way of main memory
    options: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "device_map": placement,
        "output_loading_info": True,
        "generation_config": own_generation(source),
    }
    if memory is not None:
        options["max_memory"] = memory
    try:
        with quiet_loading():
            loaded: Any
            if source.columns is not None:
                loaded = _from_columns(source, options)
            else:
                options["config"] = _config_with_entry(source)
                loaded = AutoModelForCausalLM.from_pretrained(
                    source.folder, use_safetensors=True, trust_remote_code=False, **options
                )
    except (torch.OutOfMemoryError, ModelError):
        raise
    except Exception as error:
        why = _other_shape(source, empty) or reason(error)
        raise ModelError(f"model: {source.folder} cannot be loaded as a causal language model ({why})") from error
    model, info = loaded
    for config in (model.config, model.config.get_text_config()):
        config.__dict__.pop("transformers_weights", None)  # it would be saved with the model
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would go on with random weights
        raise ModelError(
            f"model: {source.folder} lacks {len(missing)} weights of a {type(model).__name__}, such as {missing[0]}; "
            "not a whole causal language model"
        )
    if left_out := _left_out(model, info["unexpected_keys"]):  # transformers would go on without them
        raise ModelError(
            f"model: {source.folder}: its configuration has no place for {len(left_out)} weights of its blocks, such "
            f"as {left_out[0]}; config.json is another model's, or was changed"
        )
    if device_map is not None:
        _require_no_offload(getattr(model, "hf_device_map", {}))
    model.requires_grad_(False)
    if form is not None:
        quantise_projections(find_structure(model, "shared"), form, torch.device(device) if placement is None else None)
    if placement is None:
        model.to(device)
    frozen: nn.Module = model.eval()
    return frozen


def _other_shape(source: ModelSource, empty: nn.Module) -> str:
    """Which stored weight has another shape than the configuration says; "" where none has."""
    described = {name: tuple(weight.shape) for name, weight in empty.named_parameters()}
    for name, shape in () if source.columns is not None else stored_shapes(source):
        if described.get(name, shape) != shape:
            return f"config.json describes {name} as {described[name]}, the files hold {shape}"
    return ""


def _left_out(model: nn.Module, unexpected: Iterable[str]) -> list[str]:
    """Stored weights of the decoder's blocks that the model has no place for; without them it is another model."""
    lists = {found[1] for name, _ in model.named_parameters() if (found := _IN_A_BLOCK.match(name))}
    return sorted(name for name in unexpected if (found := _IN_A_BLOCK.match(name)) and found[1] in lists)


def _config_with_entry(source: ModelSource) -> Any:
    """The configuration, which leaves transformers no choice: the files that were checked and hashed are loaded."""
    config: Any = model_config(source)
    entry = source.weights_entry()
    further = [name for name in getattr(type(config), "extra_files", ()) if (source.folder / name).exists()]
    if entry is None or further:
        raise ModelError(f"model: {source.folder}: weights in {', '.join(further) or 'other files'} are not read")
    for each in (config, config.get_text_config()):
        each.transformers_weights = entry.name
    if is_plan_config({KEY: getattr(config, KEY, None)}):
        delattr(config, KEY)  # whoever wants the plan applies it; transformers would by itself, or warn
    return config


def _from_columns(source: ModelSource, options: dict[str, Any]) -> Any:
    """The model as from_pretrained gives it, with the folder's tensors as they lie: transformers keeps strides."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = model_config(source)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return kind.from_pretrained(None, config=config, state_dict=column_state(source), **options)


def _require_no_offload(placed: dict[str, Any]) -> None:
    """Refuse modules that have no place on the devices that compute."""
    places = {str(place) for place in placed.values()}
    if "disk" in places or ("cpu" in places and len(places) > 1):
        left = sorted(name for name, place in placed.items() if str(place) in ("cpu", "disk"))
        raise ResourceError(
            f"the model does not fit its GPUs: {len(left)} part(s) are left over, as {left[0]}; give it more of them "
            "(--gpus-per-worker, or --gpus), or a smaller --dtype"
        )


def gpu_memory(gpus: int, device: str) -> dict[int, int]:
    """Bytes of each of the first ``gpus`` GPUs that weights may take, where a model is spread over them.

    A tenth of what is free is left for activations and the cache.

    Raises:
        ConfigError: ``gpus`` is below 1, or ``device`` is not ``cuda``: a spread model lies on no single device.
        ResourceError: there are fewer GPUs.
    """
    import torch

    if gpus < 1:
        raise ConfigError(f"gpus: must be at least 1, got {gpus}")
    if device != "cuda":
        raise ConfigError(f"gpus: must be 1 with --device {device}, got {gpus}")
    if gpus > torch.cuda.device_count():
        raise ResourceError(f"gpus: {gpus} were asked for and this process sees {torch.cuda.device_count()}")
    return {gpu: int(0.9 * torch.cuda.mem_get_info(gpu)[0]) for gpu in range(gpus)}


def pick_device(asked: str) -> str:
    """``asked`` itself, or for ``auto`` ``cuda`` where there is a GPU and else ``cpu``.

    Raises:
        ConfigError: not ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        ResourceError: there is no such GPU.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "auto":
        return "cuda" if count else "cpu"
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", asked)
    if found is None:
        raise ConfigError(f"device: must be auto, cpu, cuda or cuda:N, got {asked!r}")
    if asked != "cpu" and int(found[1] or 0) >= count:
        there = f"only {count} found" if count else "no GPU was found"
        raise ResourceError(f"device: {asked} was asked for and {there}; use --device cpu")
    return asked


def pick_dtype(asked: str, device: str) -> str:
    """``asked`` itself, or for ``auto`` ``bfloat16`` on a GPU and ``float32`` on CPU.

    Raises:
        ConfigError: neither ``auto`` nor one of :data:`DTYPES`.
    """
    if asked == "auto":
        return "float32" if device == "cpu" else "bfloat16"
    if asked not in DTYPES:
        raise ConfigError(f"dtype: must be one of auto, {', '.join(DTYPES)}, got {asked!r}")
    return asked


def _has_accelerate() -> bool:
    return find_spec("accelerate") is not None
