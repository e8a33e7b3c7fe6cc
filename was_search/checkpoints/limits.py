"""What a checkpoint's configuration may say: nothing that fetches code, and no absurd counts.

A checkpoint comes from anywhere. transformers would fetch and run attention kernels that a configuration names by their
hub id, load another model where an adapter lies beside it, and make lists as long as a configuration says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from was_search.errors import ModelError

MOST_OF_A_KIND = 100_000
"""Greatest count of layers, heads, labels, ...: lists of that length may be made before any weight is looked at."""

PLAN_METHOD = "was"
"""The ``quant_method`` of a checkpoint that carries a plan."""

_COUNT = re.compile(r"(layers?|blocks?|labels|heads?|experts|replace)$")


def is_plan(quantization: Any) -> bool:
    """Whether a ``quantization_config`` speaks of a plan beside the weights, which are as stored then."""
    return isinstance(quantization, dict) and quantization.get("quant_method") == PLAN_METHOD


def check_values(folder: Path, config: dict[str, Any]) -> None:
    """Refuse the ``config.json`` of a ``folder`` that names code of others, is quantised, or counts absurdly.

    Raises:
        ModelError: naming the key.
    """
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"model: {folder} holds an adapter beside a model; merge it into the model first")
    check_config(folder, folder / "config.json", config)


def check_config(where: Path, path: Path, config: dict[str, Any]) -> None:
    """Refuse what :func:`check_values` does of the values of a configuration, read from ``path``, of ``where``.

    Raises:
        ModelError: naming the key.
    """
    for key, value in _items(config):
        if key == "quantization_config" and value and not (value is config.get(key) and is_plan(value)):
            raise ModelError(
                f"model: {where} is quantised{_method(value)}: such weights lie in an order that no sparse "
                "kernel reads; give the original checkpoint (bf16, fp16 or fp32) and round it here with --weights int8 "
                "or int4"
            )
        if "_implementation" in key and any("/" in text for text in _texts(value)):
            raise ModelError(
                f"model: {path}: {key} {str(value)[:80]!r} names code on the hub, which is never run; remove the key"
            )
        if _COUNT.search(key) and isinstance(value, int | float) and value > MOST_OF_A_KIND:
            got = f"{min(value, 1e300):.3g}"  # an integer may be too long for a float
            raise ModelError(f"model: {path}: {key}: at most {MOST_OF_A_KIND} is taken for possible, got {got}")


def _method(quantisation: Any) -> str:
    """`` by gptq, 4 bits``, as far as a configuration says so."""
    if not isinstance(quantisation, dict):
        return ""
    name, bits = quantisation.get("quant_method"), quantisation.get("bits")
    by = f" by {name[:40]!r}" if isinstance(name, str) else ""
    return f"{by}, {bits} bits" if by and isinstance(bits, int) and 0 < bits < 64 else by


def _items(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key with its value, nested ones too; an element of a list comes with the list's key."""
    for key, value in config.items():
        yield from _nested(key, value)


def _nested(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    yield key, value
    if isinstance(value, dict):
        yield from _items(value)
    elif isinstance(value, list):
        for element in value:
            yield from _nested(key, element)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
