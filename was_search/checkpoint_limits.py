"""What a checkpoint's configuration may say: nothing that fetches code, and no more weights than there are.

A checkpoint comes from anywhere. transformers would fetch and run attention kernels that a configuration names by their
hub id, load another model where an adapter lies beside it, and take memory for every weight that is described,
stored or not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from was_search.checkpoint import ModelSource
from was_search.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MOST_OF_A_KIND = 100_000
"""Layers, heads, labels, ...: of some, lists are made before any weight is looked at."""

_COUNT = re.compile(r"(layers?|labels|heads?|experts)$")

_SLACK = 1.5
"""Weights described for each one that is stored; tied ones are stored once or twice."""


def check_values(source: ModelSource, config: dict[str, Any]) -> None:
    """Refuse a ``config.json`` that names code of others, is quantised, or counts absurdly.

    Raises:
        ModelError: naming the key.
    """
    path = source.folder / "config.json"
    if (source.folder / "adapter_config.json").exists():
        raise ModelError(f"model: {source.folder} holds an adapter beside a model; merge it into the model first")
    for key, value in _items(config):
        if key == "quantization_config" and value:
            raise ModelError(
                f"model: {source.folder} is quantised{_method(value)}: such weights lie in an order that no sparse "
                "kernel reads; give the original checkpoint (bf16, fp16 or fp32) and round it here with --weights int8 "
                "or int4"
            )
        if "_implementation" in key and any("/" in text for text in _texts(value)):
            raise ModelError(
                f"model: {path}: {key} {str(value)[:80]!r} names code on the hub, which is never run; remove the key"
            )
        if _COUNT.search(key) and isinstance(value, int) and value > MOST_OF_A_KIND:
            raise ModelError(f"model: {path}: {key}: at most {MOST_OF_A_KIND} is taken for possible, got {value:.3g}")


def check_size(source: ModelSource, config: PretrainedConfig) -> None:
    """Refuse a configuration that describes more weights than the checkpoint holds, before memory is taken for them.

    Raises:
        ModelError: with both numbers.
    """
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    tensors = stored = 0
    for path in source.weight_files():
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensors += 1
                elements = 1
                for width in file.get_slice(name).get_shape():
                    elements *= width
                stored += elements
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0) or 0
    if layers > tensors:
        raise ModelError(
            f"model: {source.folder}: the configuration has {layers} layers, the weights are {tensors} tensors; "
            "not a whole causal language model"
        )
    with torch.device("meta"):
        empty: torch.nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False
        )
    described = sum(weight.numel() for weight in empty.parameters())
    if described > _SLACK * stored:
        raise ModelError(
            f"model: {source.folder}: the configuration describes {described:,} weights, the files hold {stored:,}; "
            "not a whole causal language model"
        )


def _method(quantisation: Any) -> str:
    """`` by gptq, 4 bits``, as far as a configuration says so."""
    if not isinstance(quantisation, dict):
        return ""
    name, bits = quantisation.get("quant_method"), quantisation.get("bits")
    by = f" by {name[:40]!r}" if isinstance(name, str) else ""
    return f"{by}, {bits} bits" if by and isinstance(bits, int) and 0 < bits < 64 else by


def _items(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from _items(value)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
