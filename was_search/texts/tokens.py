"""From text to token ids: windows of one length, spread over the text, in a fixed shuffled order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from was_search.errors import ConfigError, DataError, ModelError, reason
from was_search.shape import IntArray
from was_search.texts.protocol import EvaluationProtocol, TokenSet
from was_search.texts.splits import SplitText
from was_search.weight_format import AS_STORED


def beginning(tokenizer: Any) -> tuple[int, ...]:
    """Ids that the tokenizer puts before every text of its own accord; tried on a text, whatever its flags say.

    It is what a window of calibration, search and evaluation begins with, and a prompt.

    Raises:
        ModelError: the tokenizer reads no text.
    """
    for probe in ("a", "0", "."):
        try:
            whole = list(tokenizer(probe)["input_ids"])
            inner = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
        except Exception as error:
            raise ModelError(f"model: its tokenizer cannot be used ({reason(error)}); copy its files again") from error
        for start in range(len(whole) - len(inner) + 1) if inner else ():
            if whole[start : start + len(inner)] == inner:
                return tuple(int(i) for i in whole[:start])
    return ()


def prompt_ids(prompt: str, tokenizer: Any) -> IntArray:
    """Token ids of a prompt, int64 [n]: what begins a window, unless the prompt does so itself, and the prompt.

    Control tokens that a prompt names are read as such: this is how chats are written.

    Raises:
        DataError: the tokenizer cannot read the prompt, or makes no tokens of it.
    """
    try:
        ids = [int(i) for i in tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]]
    except Exception as error:
        raise DataError(f"prompt: cannot be tokenised ({reason(error)})") from error
    if not ids:
        raise DataError(f"prompt: the tokenizer makes no tokens of {prompt[:80]!r}")
    begins = beginning(tokenizer)
    return np.asarray(ids if tuple(ids[: len(begins)]) == begins else [*begins, *ids], np.int64)


def require_rows(ids: IntArray, rows: int, tokenizer: Any, where: str) -> None:
    """Refuse ids that the model has no row for, before a worker's lookup fails on them.

    Args:
        ids: token ids of any shape.
        rows: rows of the model's embedding and head, the fewer of both.
        tokenizer: names the token.
        where: what the ids are of, for the message.

    Raises:
        ModelError: an id is not below ``rows``.
    """
    beyond = ids[(ids >= rows) | (ids < 0)]
    if beyond.size:
        worst = int(beyond.max())
        known = 0 <= worst < 2**31 and hasattr(tokenizer, "get_vocab")
        named = tokenizer.convert_ids_to_tokens(worst) if known else ""
        raise ModelError(
            f"model: the tokenizer gives id {worst}{f' ({named!r})' if named else ''} in {where}, the model has {rows} "
            "rows for tokens; take the tokenizer's files of this very model, or give the model a row for each token "
            "that was added (resize_token_embeddings), train them and save it"
        )


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
    unknown = getattr(tokenizer, "unk_token_id", None)
    return frozenset(int(i) for i in controls if i is not None and i != unknown)


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
    dense_prefix: int | None = None,
    seed: int = 0,
) -> TokenSet:
    """Windows of ``text`` as :class:`TokenSet`, int64 [n_sequences, sequence_length].

    The text is tokenised as a whole, control tokens in it as text. Window k starts at text token ``k * stride`` and is
    ``sequence_length`` tokens, less those that begin it (:func:`beginning`); the tail that fills no window is left
    out. The windows taken are the centres of ``n_sequences`` equal stretches of the text, then shuffled by ``seed``.

    Args:
        text: one split.
        tokenizer: a transformers tokenizer.
        sequence_length: tokens of a sequence, those that begin it included.
        stride: text tokens between window starts; None means ``sequence_length``.
        n_sequences: how many windows; None means all.
        at_most: take fewer than ``n_sequences`` where the text holds fewer, instead of an error.
        bos: whether each sequence starts with BOS; None means that it begins as the tokenizer does of its own accord.
        dtype: recorded in the protocol.
        weights: recorded in the protocol.
        batch_size: recorded in the protocol.
        dense_prefix: recorded in the protocol; None means what begins a sequence, and at least one token.
        seed: decides the order.

    Raises:
        DataError: the text is too short for one sequence, or for ``n_sequences``.
        ConfigError: a value outside its range, or ``bos`` asked of a tokenizer that has none.
    """
    begins = _beginning(tokenizer, bos)
    protocol = EvaluationProtocol(
        data=text.name,
        data_hash=text.sha256,
        split=text.split,
        sequence_length=sequence_length,
        stride=sequence_length if stride is None else stride,
        n_sequences=1 if n_sequences is None else n_sequences,
        bos=tokenizer.bos_token_id in begins,
        begins=len(begins),
        dtype=dtype,
        weights=weights,
        batch_size=batch_size,
        dense_prefix=max(1, len(begins)) if dense_prefix is None else dense_prefix,
        kind=text.kind,
    )  # checks the ranges before the text is tokenised
    ids = text_ids(text, tokenizer)
    protocol = replace(protocol, control_tokens=count_controls(ids, tokenizer))
    span = sequence_length - len(begins)
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
    chosen = chosen[text_order(count, seed)]
    tokens = np.empty((count, sequence_length), np.int64)
    tokens[:, : len(begins)] = begins
    tokens[:, sequence_length - span :] = ids[chosen[:, None] * protocol.stride + np.arange(span)]
    return TokenSet.of(protocol, tokens)


def text_order(n: int, seed: int) -> IntArray:
    """The places in the text of the ``n`` windows that :func:`tokenise` gives, counted from 0: int64 [n]."""
    return np.random.default_rng(seed).permutation(n)


def _beginning(tokenizer: Any, bos: bool | None) -> tuple[int, ...]:
    """What each window begins with: as the tokenizer does, with BOS before it where it is asked for, or nothing."""
    if bos is False:
        return ()
    if bos and tokenizer.bos_token_id is None:
        raise ConfigError("bos: the tokenizer has no BOS token, so it must be false or left out, got true")
    found = beginning(tokenizer)
    return (tokenizer.bos_token_id, *found) if bos and tokenizer.bos_token_id not in found else found


def _count(n_tokens: int, span: int, stride: int) -> int:
    return (n_tokens - span) // stride + 1 if n_tokens >= span else 0
