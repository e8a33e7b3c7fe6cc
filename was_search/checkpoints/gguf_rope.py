"""The scaled rotary embedding of Llama 3.1 and later, which GGUF files hold as one factor a frequency.

transformers leaves the factors out, and so would read another model. They follow from a rule (Llama 3.1's, ``llama3``
in transformers): frequencies whose wave is longer than the context of the first training are divided by one factor,
those under a quarter of it by none, and those between by a mean of both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from was_search.checkpoints.gguf_header import GgufHeader, GgufTensor
from was_search.errors import ModelError
from was_search.shape import FloatArray

_NAME = "rope_freqs.weight"
_FLOAT32 = 0
_LOW, _HIGH, _FIRST_CONTEXT = 1.0, 4.0, 8192
"""The rule's numbers in all models that have been released; only the factor differs."""


def rope_factors(header: GgufHeader) -> GgufTensor | None:
    """The tensor of the factors; None where the file has none."""
    return next((tensor for tensor in header.tensors if tensor.name == _NAME), None)


def scaled_rope(header: GgufHeader, path: Path) -> dict[str, Any] | None:
    """``rope_parameters`` of transformers for a file of scaled frequencies; None where none is scaled.

    Raises:
        ModelError: frequencies are scaled by another rule.
    """
    tensor = rope_factors(header)
    others = [other.name for other in header.tensors if other.name.startswith("rope_") and other is not tensor]
    others += [key for key, value in header.values.items() if key.endswith(".rope.scaling.type") and value != "none"]
    if tensor is None and not others:
        return None
    if tensor is not None and not others and tensor.kind == _FLOAT32:
        found = np.fromfile(path, "<f4", tensor.elements, offset=header.data_start + tensor.start).astype(np.float64)
        factor, base = float(found.max(initial=1.0)), header.values.get("llama.rope.freq_base")
        if np.all(found == 1.0):
            return None
        if isinstance(base, float) and np.allclose(found, llama3_factors(len(found), base, factor), rtol=1e-4, atol=0):
            return {
                "rope_type": "llama3",
                "rope_theta": base,
                "factor": factor,
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": _FIRST_CONTEXT,
            }
    raise ModelError(
        f"model: {path} scales its rotary embedding ({[*others, _NAME][0]}) in a way that is not read from GGUF; give "
        "the checkpoint that it was made of"
    )


def llama3_factors(n: int, base: float, factor: float) -> FloatArray:
    """What each of ``n`` frequencies, ``base ** (-i / n)``, is divided by: float64 [n], from 1 to ``factor``."""
    waves = 2.0 * np.pi * base ** (np.arange(n) / n)
    smooth = np.clip((_FIRST_CONTEXT / waves - _LOW) / (_HIGH - _LOW), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - smooth) / factor + smooth), np.float64)
