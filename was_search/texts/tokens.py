"""From text to token ids: windows of one length, spread over the text, in a fixed shuffled order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from was_search.checkpoints.files import reason
from was_search.errors import ConfigError, DataError
from was_search.shape import IntArray
from was_search.texts.protocol import EvaluationProtocol, TokenSet
from was_search.texts.splits import SplitText
from was_search.weight_format import AS_STORED


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer starts a text with its BOS of its own accord; tried on a text, whatever its flags say."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return False
    with_special = tokenizer("a")["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    return list(with_special[:1]) == [bos] and list(without[:1]) != [bos]


def text_ids(text: SplitText, tokenizer: Any) -> IntArray:
    """Token ids of the whole text, int64 [n]: a text that names control tokens, such as ``<s>``, is text there too.

    Raises:
        DataError: the tokenizer cannot read the text.
    """
    options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
    try:
        try:
            found = tokenizer(text.text, split_special_tokens=True, **options)
        except ValueError:  # Mistral's own tokenizers do not take the option, and never read control tokens in text
            found = tokenizer(text.text, **options)
    except Exception as error:
        raise DataError(f"data: {text.name} [{text.split}] cannot be tokenised ({reason(error)})") from error
    return np.asarray(found["input_ids"], np.int64)


def control_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokenizer's control tokens; the token for what it does not know is none, as text may give it."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    controls = {*tokenizer.all_special_ids, *(i for i, token in added.items() if getattr(token, "special", False))}
    return frozenset(controls - {getattr(tokenizer, "unk_token_id", None)})


def count_controls(ids: IntArray, tokenizer: Any) -> int:
    """How many of ``ids`` are control tokens: some vocabularies spell these of ordinary text as well."""
    return int(np.isin(ids, sorted(control_ids(tokenizer))).sum())


def tokenise(
    text: SplitText,
    tokenizer: Any,
    *,
    sequence_length: int = 2048,
    stride: int | None = None,
    n_sequences: int | None = None,
    at_most: bool = False,
    bos: bool | None = None,
    dtype: str = "bfloat16",
    weights: str = AS_STORED,
    batch_size: int = 8,
    dense_prefix: int = 1,
    seed: int = 0,
) -> TokenSet:
    """Windows of ``text`` as :class:`TokenSet`, int64 [n_sequences, sequence_length].

    The text is tokenised as a whole, control tokens in it as text. Window k starts at text token ``k * stride`` and is
    ``sequence_length`` tokens, or BOS and ``sequence_length - 1`` tokens; the tail that fills no window is left
    out. The windows taken are the centres of ``n_sequences`` equal stretches of the text, then shuffled by ``seed``.

    Args:
        text: one split.
        tokenizer: a transformers tokenizer.
        sequence_length: tokens of a sequence, BOS included.
        stride: text tokens between window starts; None means ``sequence_length``.
        n_sequences: how many windows; None means all.
        at_most: take fewer than ``n_sequences`` where the text holds fewer, instead of an error.
        bos: whether each sequence starts with BOS; None means as the tokenizer does of its own accord.
        dtype: recorded in the protocol.
        weights: recorded in the protocol.
        batch_size: recorded in the protocol.
        dense_prefix: recorded in the protocol.
        seed: decides the order.

    Raises:
        DataError: the text is too short for one sequence, or for ``n_sequences``.
        ConfigError: a value outside its range, or ``bos`` asked of a tokenizer that has none.
    """
    with_bos = _with_bos(tokenizer, bos)
    protocol = EvaluationProtocol(
        data=text.name,
        data_hash=text.sha256,
        split=text.split,
        sequence_length=sequence_length,
        stride=sequence_length if stride is None else stride,
        n_sequences=1 if n_sequences is None else n_sequences,
        bos=with_bos,
        dtype=dtype,
        weights=weights,
        batch_size=batch_size,
        dense_prefix=dense_prefix,
        kind=text.kind,
    )  # checks the ranges before the text is tokenised
    ids = text_ids(text, tokenizer)
    protocol = replace(protocol, control_tokens=count_controls(ids, tokenizer))
    span = sequence_length - with_bos
    there = _count(len(ids), span, protocol.stride)
    where = f"data: {text.name} [{text.split}]"
    if there < 1:
        raise DataError(
            f"{where} has {len(ids)} tokens, one sequence needs {span}; give more text or a smaller sequence_length"
        )
    wanted = there if n_sequences is None else n_sequences
    if wanted > there and not at_most:
        raise DataError(
            f"{where} has {there} sequences of {sequence_length} tokens, {wanted} were asked for; ask for fewer, "
            "give more text, or a smaller sequence_length or stride"
        )
    count = min(wanted, there)
    chosen = (2 * np.arange(count, dtype=np.int64) + 1) * there // (2 * count)
    chosen = np.random.default_rng(seed).permutation(chosen)
    tokens = np.empty((count, sequence_length), np.int64)
    if with_bos:
        tokens[:, 0] = tokenizer.bos_token_id
    tokens[:, sequence_length - span :] = ids[chosen[:, None] * protocol.stride + np.arange(span)]
    return TokenSet.of(protocol, tokens)


def _with_bos(tokenizer: Any, bos: bool | None) -> bool:
    if bos and tokenizer.bos_token_id is None:
        raise ConfigError("bos: the tokenizer has no BOS token, so it must be false or left out, got true")
    return adds_bos(tokenizer) if bos is None else bos


def _count(n_tokens: int, span: int, stride: int) -> int:
    return (n_tokens - span) // stride + 1 if n_tokens >= span else 0
