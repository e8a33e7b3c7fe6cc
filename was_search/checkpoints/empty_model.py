"""The model that a checkpoint's configuration describes, without weights: the one way to build a model before loading.

A configuration comes from anywhere, and building what it describes takes time and memory for each layer. So all
that is known of the checkpoint is compared with it first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from was_search.checkpoints.described_model import described_model, require_causal
from was_search.checkpoints.files import ModelSource, read_config, require_whole_index
from was_search.checkpoints.generation import special_ids
from was_search.checkpoints.limits import check_values
from was_search.errors import ModelError, reason
from was_search.process.collector import collector_at_rest

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


def empty_model(source: ModelSource) -> nn.Module:
    """The causal language model of a checkpoint, on torch's device ``meta``; no weight is read and no code fetched.

    Raises:
        ModelError: an architecture that transformers does not hold or that is no causal language model, values that
            :func:`check_values` refuses, special ids that are none, or more layers or weights than the checkpoint's
            files hold.
    """
    require_whole_index(source)
    config = model_config(source)
    special_ids(source)
    return described_model(config, source.folder, *_stored(source))


def model_config(source: ModelSource) -> PretrainedConfig:
    """The checked configuration of a checkpoint, as transformers reads it.

    Raises:
        ModelError: as :func:`empty_model`, for what the configuration alone says.
    """
    values = read_config(source)
    check_values(source.folder, values)
    with collector_at_rest():
        import transformers
        from transformers import AutoConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        if "auto_map" in values:
            raise ModelError(
                f"model: {source.folder} (model_type {kind!r}) needs code of its own, which is never run; "
                "use a model whose architecture transformers holds"
            )
        raise ModelError(
            f"model: transformers {transformers.__version__} knows no model_type {kind!r} ({source.folder}); "
            "a newer transformers may"
        )
    if CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"model: {source.folder} is a {kind} model, not a causal language model")
    try:
        config: Any = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"model: {source.folder / 'config.json'} is not valid ({reason(error)})") from error
    require_causal(config, source.folder)
    found: PretrainedConfig = config
    return found


def _stored(source: ModelSource) -> tuple[int, int]:
    """How many tensors the checkpoint's files hold, and how many elements in all."""
    sizes = [math.prod(shape) for _, shape in stored_shapes(source)]
    return len(sizes), sum(sizes)


def stored_shapes(source: ModelSource) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor in the checkpoint's files, of which only headers are read."""
    from safetensors import safe_open

    for path in source.weight_files():
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, tuple(file.get_slice(name).get_shape())
