"""A GGUF file of a tiny Llama of one block with its tokenizer, as the package ``gguf`` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

WIDTH, INNER, HEADS, WORDS = 64, 96, 2, 260

Arrays = dict[str, npt.NDArray[np.float32]]


def tiny_weights(blocks: int = 1) -> Arrays:
    """float32 weights by ggml's names, without their ``.weight``; the head is the embedding."""
    generator = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (WORDS, WIDTH), "output_norm": (WIDTH,)}
    for block in range(blocks):
        shapes |= {
            f"blk.{block}.attn_norm": (WIDTH,),
            f"blk.{block}.ffn_norm": (WIDTH,),
            **{f"blk.{block}.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")},
            f"blk.{block}.ffn_gate": (INNER, WIDTH),
            f"blk.{block}.ffn_up": (INNER, WIDTH),
            f"blk.{block}.ffn_down": (WIDTH, INNER),
        }
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_tiny_gguf(
    path: Path,
    weights: Arrays | None = None,
    *,
    architecture: str = "llama",
    block_count: int = 1,
    quantise: str = "",
    **values: Any,
) -> Arrays:
    """Write the file; returns its weights before rounding.

    Args:
        path: the file.
        weights: by ggml's names; :func:`tiny_weights` if not given.
        architecture: what the file says that it is.
        block_count: what the file says of its blocks.
        quantise: a type of ggml, such as ``Q8_0``, that the matrices are rounded to; "" for float32.
        values: further keys, ``__`` for a dot, with whole numbers, numbers or texts.
    """
    gguf = pytest.importorskip("gguf")
    weights = tiny_weights() if weights is None else weights
    writer = gguf.GGUFWriter(path, architecture)
    for add, value in (
        (writer.add_block_count, block_count),
        (writer.add_context_length, 128),
        (writer.add_embedding_length, WIDTH),
        (writer.add_feed_forward_length, INNER),
        (writer.add_head_count, HEADS),
        (writer.add_head_count_kv, HEADS),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_dimension_count, WIDTH // HEADS),
        (writer.add_vocab_size, WORDS),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_token_list, ["ab", *(chr(0x100 + i) for i in range(WORDS - 3)), "a", "b"]),
        (writer.add_token_types, [1] * WORDS),
        (writer.add_token_merges, ["a b"]),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
    ):
        add(value)
    adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in values.items():
        adders[type(value)](key.replace("__", "."), value)
    kind = gguf.GGMLQuantizationType[quantise] if quantise else None
    for name, weight in weights.items():
        if kind is None or weight.ndim == 1:
            writer.add_tensor(f"{name}.weight", weight)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights
