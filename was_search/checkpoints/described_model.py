"""The model that a configuration describes, on torch's device ``meta``, compared with what is stored of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from was_search.errors import ModelError, reason

if TYPE_CHECKING:
    from torch import nn

_SLACK = 1.5
"""How many weights may be described for each one that is stored; tied ones are stored once or twice."""


def require_causal(config: Any, where: Path) -> None:
    """Refuse a configuration of transformers that is not a causal language model's.

    Raises:
        ModelError: naming ``where`` it was read.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model: {where} is a {config.model_type} model, not a causal language model")


def described_model(config: Any, where: Path, tensors: int, stored: int) -> nn.Module:
    """The causal language model of ``config``, without weights.

    Args:
        config: checked, as transformers reads it.
        where: what it was read from, for messages.
        tensors: number of tensors that are stored.
        stored: number of weights in them.

    Raises:
        ModelError: no model can be made of it, or it has more layers or weights than are stored.
    """
    import torch
    from transformers import AutoModelForCausalLM

    layers = getattr(config.get_text_config(), "num_hidden_layers", 0) or 0
    if layers > tensors:
        raise ModelError(
            f"model: {where}: the configuration has {layers} layers, the weights are {tensors} tensors; "
            "not a whole causal language model"
        )
    try:
        with torch.device("meta"):
            empty: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False
            )
        described = sum(weight.numel() for weight in empty.parameters())
    except Exception as error:
        raise ModelError(f"model: {where}: no model can be made of its configuration ({reason(error)})") from error
    if described > _SLACK * stored:
        raise ModelError(
            f"model: {where}: the configuration describes {described:,} weights, the files hold {stored:,}; "
            "not a whole causal language model"
        )
    return empty
