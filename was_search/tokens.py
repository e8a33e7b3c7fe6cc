"""From text to token ids: windows of one length in a fixed shuffled order."""

from __future__ import annotations

from typing import Any

import numpy as np

from was_search.errors import DataError
from was_search.protocol import EvaluationProtocol, TokenSet
from was_search.shape import IntArray
from was_search.text import SplitText


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer starts a text with its BOS of its own accord."""
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def text_ids(text: SplitText, tokenizer: Any) -> IntArray:
    """Token ids of the whole text without special tokens, int64 [n]."""
    ids = tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
    return np.asarray(ids, np.int64)


def tokenise(
    text: SplitText,
    tokenizer: Any,
    *,
    sequence_length: int,
    stride: int,
    n_sequences: int,
    dtype: str,
    batch_size: int,
    dense_prefix: int,
    seed: int,
    bos: bool | None = None,
) -> TokenSet:
    """Windows of ``text``: at most ``n_sequences``, spread evenly over it, in an order shuffled by ``seed``.

    With ``bos`` each window is BOS and ``sequence_length - 1`` tokens of text; None means as the tokenizer does of
    its own accord. The tail that fills no window is left out.

    Raises:
        DataError: the text is too short for one window.
    """
    with_bos = adds_bos(tokenizer) if bos is None else bos
    if with_bos and tokenizer.bos_token_id is None:
        raise DataError("bos: asked for, but the tokenizer has no BOS token")
    ids = text_ids(text, tokenizer)
    span = sequence_length - int(with_bos)
    there = (len(ids) - span) // stride + 1 if len(ids) >= span else 0
    if there < 1:
        raise DataError(
            f"data: {text.name} [{text.split}] has {len(ids)} tokens, too short for one sequence of "
            f"{sequence_length}; give more text or a smaller --sequence-length"
        )
    count = min(n_sequences, there)
    chosen = np.linspace(0, there - 1, count).round().astype(np.int64)
    chosen = np.random.default_rng(seed).permutation(chosen)
    windows = np.stack([ids[start : start + span] for start in chosen * stride])
    if with_bos:
        windows = np.concatenate([np.full((count, 1), tokenizer.bos_token_id, np.int64), windows], axis=1)
    protocol = EvaluationProtocol(
        data=text.name,
        data_hash=text.sha256,
        split=text.split,
        sequence_length=sequence_length,
        stride=stride,
        n_sequences=count,
        bos=with_bos,
        dtype=dtype,
        batch_size=batch_size,
        dense_prefix=dense_prefix,
    )
    return TokenSet(protocol, windows)
