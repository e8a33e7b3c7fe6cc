"""Tokenizers of every kind that a checkpoint may bring, small enough to be made on the spot: one builder a kind."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

CONTROLS = ("<s>", "</s>", "<|im_start|>")
"""Control tokens that every kind has."""

_LETTERS = [*string.ascii_letters, *string.digits, *"<>/|_.,!? \n"]


def byte_bpe() -> Any:
    """Llama's kind: merges over characters, byte order fixed by the vocabulary."""
    vocabulary = {each: i for i, each in enumerate([*CONTROLS, *_LETTERS, "th", "he"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("h", "e")]))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return _fast(made)


def metaspace_bpe() -> Any:
    """Merges over words with a mark for the space, as Llama 2 has them."""
    vocabulary = {each: i for i, each in enumerate([*CONTROLS, "▁", *_LETTERS])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _fast(made)


def word_piece() -> Any:
    """BERT's kind, with a token for what it does not know."""
    vocabulary = {each: i for i, each in enumerate([*CONTROLS, "[UNK]", *_LETTERS, *(f"##{c}" for c in _LETTERS)])}
    made = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _fast(made, unk_token="[UNK]")


def with_words_of_its_own() -> Any:
    """Merges, and an added token that is none of control, as Qwen's ``<think>``."""
    made = byte_bpe()
    made.add_tokens([AddedToken("<think>", special=False)])
    return made


def reserved_controls() -> Any:
    """Control tokens that no attribute names, as Llama 3's reserved ones."""
    made = byte_bpe()
    made.add_tokens([AddedToken("<|reserved_7|>", special=True)])
    return made


def slow_bytes() -> Any:
    """A tokenizer in Python, not of the library ``tokenizers``."""
    return ByT5Tokenizer(bos_token="<s>", additional_special_tokens=["<|im_start|>"], extra_ids=0)


class Tekken:
    """As Mistral's own tokenizers are called: no option for control tokens, which they never read in text."""

    all_special_ids = (1, 2)
    bos_token_id = 1
    unk_token_id = 0

    def __call__(self, text: str, *, split_special_tokens: bool = False, **_: Any) -> dict[str, list[int]]:
        if split_special_tokens:
            raise ValueError("`MistralCommonBackend` does not support `split_special_tokens`.")
        return {"input_ids": [3 + ord(letter) for letter in text]}


TEXT_IS_TEXT = (byte_bpe, metaspace_bpe, word_piece, with_words_of_its_own, reserved_controls, slow_bytes, Tekken)
"""Kinds that can read the names of control tokens as text."""


def unigram() -> Any:
    """T5's kind: the vocabulary spells control tokens in text, whatever is asked."""
    vocabulary = [(each, 0.0) for each in (*CONTROLS, "<unk>")] + [(each, -5.0) for each in _LETTERS]
    return _fast(Tokenizer(models.Unigram(vocabulary, unk_id=3)), unk_token="<unk>")


def whole_words() -> Any:
    """Words between blanks: a control token's name is a word like others."""
    words = [*CONTROLS, "<unk>", "hello", "world", "and"]
    made = Tokenizer(models.WordLevel({each: i for i, each in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _fast(made, unk_token="<unk>")


SPELLS_CONTROLS = (unigram, whole_words)
"""Kinds whose vocabulary makes control tokens of their names: they are counted."""


def with_template(template: str, *, bos: str | None = "<s>") -> Any:
    """Bytes, with tokens put around every text as ``template`` says."""
    alphabet = {chr(b): b for b in range(256)}
    specials = [("<s>", 256), ("</s>", 257), ("[gMASK]", 258), ("<sop>", 259)]
    made = Tokenizer(models.BPE(vocab={**alphabet, **dict(specials)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=bos,
        eos_token="</s>",
        additional_special_tokens=["[gMASK]", "<sop>"],
    )


def saved(tokenizer: Any, folder: Path) -> Path:
    """The tokenizer's files in ``folder``."""
    tokenizer.save_pretrained(folder)
    return folder


def _fast(made: Tokenizer, **options: Any) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>"],
        **options,
    )
