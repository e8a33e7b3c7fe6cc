"""Token ids of the splits under the settings' protocol."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from was_search.service.arrays import pack_array, unpack_array
from was_search.service.caching import CachedRow, cached
from was_search.service.settings import Settings
from was_search.texts.protocol import EvaluationProtocol, TokenSet, content_hash
from was_search.texts.tokens import text_order

if TYPE_CHECKING:
    from was_search.service.context import Context
    from was_search.service.model import Model
    from was_search.texts.splits import SplitText
    from was_storage.studies.cache import Artifact


_VALIDATION = 0.15
"""Share of the sequences that a compensation could be learned from which judge it instead."""


@dataclass(frozen=True)
class TokenSets:
    """What every split holds, each made when it is first asked for; cached, so that a second run needs no tokenizer.

    Attributes:
        context: its settings name text and protocol, its cache is where token ids are stored.
    """

    context: Context

    @cached_property
    def calibration(self) -> TokenSet:
        return self._load("calibration", self.context.settings.calibration_sequences)

    @cached_property
    def search(self) -> TokenSet:
        return self._load("search", self.context.settings.search_sequences)

    @cached_property
    def test(self) -> TokenSet:
        return self._load("test", self.context.settings.test_sequences)

    @cached_property
    def slopes(self) -> TokenSet:
        """What slopes are drawn from: the sequences of ``calibration`` and more of its split."""
        settings = self.context.settings
        if settings.slope_sequences == settings.calibration_sequences:
            return self.calibration
        return self._load("calibration", settings.slope_sequences)

    @cached_property
    def learning(self) -> TokenSet:
        """What a compensation is learned from: ``search`` and most of ``slopes``, each sequence twice or more often."""
        settings, most = self.context.settings, self._divided[0]
        tokens = np.concatenate([self.search.tokens, most.tokens])
        enough = max(1, settings.compensation_steps * settings.compensation_sequences // 2)
        return TokenSet.of(most.protocol, tokens[:enough])

    @cached_property
    def validation(self) -> TokenSet:
        """What a compensation is judged by: the last stretch of ``slopes`` in the text's order; never learned from.

        It is empty where the calibration split has one sequence only.
        """
        return self._divided[1]

    @cached_property
    def _divided(self) -> tuple[TokenSet, TokenSet]:
        """All but the last stretch of ``slopes``, and that."""
        slopes = self.slopes
        n = len(slopes.tokens)
        last = text_order(n, self.context.settings.seed) >= n - min(n - 1, max(1, round(_VALIDATION * n)))
        return slopes.part(np.flatnonzero(~last).tolist()), slopes.part(np.flatnonzero(last).tolist())

    def of(self, split: str) -> TokenSet:
        found: TokenSet = getattr(self, split)
        return found

    def _load(self, split: str, n: int) -> TokenSet:
        context = self.context
        settings = context.settings
        text, options = _text(context, split), _options(settings, n, context.placement.dtype, settings.weights)
        model = context.model
        model.require_positions(settings.sequence_length)
        key = content_hash("tokens", 4, text.name, split, text.sha256, model.source.tokenizer_hash(), options)
        row = CachedRow(context.cache, "tokens", key, _read, _pack)
        data = cached(row, lambda: _tokenise(context, text, options)).read_from(text.kind)
        _require_rows(data, model)  # token ids that were cached may be of another model with this tokenizer
        return data


def tokens_here(context: Context, split: str, weights: str = "") -> TokenSet:
    """The same token ids without the database, for steps that need no other part of it.

    Args:
        context: its settings name text and protocol.
        split: of the text.
        weights: the format that the protocol tells of; "" for the settings'.
    """
    settings = context.settings
    n = getattr(settings, f"{split}_sequences")
    text = _text(context, split)
    options = _options(settings, n, context.placement_here.dtype, weights or settings.weights)
    return _tokenise(context, text, options)


def _text(context: Context, split: str) -> SplitText:
    from was_search.texts.splits import is_named, load_text

    settings = context.settings
    settings.require("model", "data")
    what = "load" if is_named(settings.data) else "read"
    with context.lasting(f"{what} {settings.data} [{split}]"):
        return load_text(settings.data, split)


def _options(settings: Settings, n: int, dtype: str, weights: str) -> dict[str, Any]:
    return {
        "weights": weights,
        "sequence_length": settings.sequence_length,
        "stride": settings.stride or settings.sequence_length,
        "n_sequences": n,
        "dtype": dtype,
        "batch_size": settings.batch_size,
        "dense_prefix": settings.asked_prefix,
        "seed": settings.seed,
        "at_most": True,
    }


def _read(found: Artifact) -> TokenSet:
    protocol = EvaluationProtocol.from_json(found.meta["protocol"])
    tokens = unpack_array(found.payload, (protocol.n_sequences, protocol.sequence_length), np.int64)
    data = TokenSet.of(protocol, tokens)
    if data.protocol != protocol:
        raise ValueError("the tokens are not those of the protocol")
    return data


def _pack(data: TokenSet) -> tuple[bytes, dict[str, Any]]:
    return pack_array(data.tokens), {"protocol": data.protocol.to_json()}


def _tokenise(context: Context, text: SplitText, options: dict[str, Any]) -> TokenSet:
    from was_search.checkpoints.load import load_tokenizer
    from was_search.texts.tokens import tokenise

    with context.lasting(f"tokenise {text.name} [{text.split}]"):
        data = tokenise(text, load_tokenizer(context.model.source), **options)
    _require_rows(data, context.model)
    return data


def _require_rows(data: TokenSet, model: Model) -> None:
    from was_search.checkpoints.load import load_tokenizer
    from was_search.texts.tokens import require_rows

    if not 0 <= data.tokens.min() <= data.tokens.max() < model.token_rows:
        name = f"{data.protocol.data} [{data.protocol.split}]"
        require_rows(data.tokens, model.token_rows, load_tokenizer(model.source), name)
