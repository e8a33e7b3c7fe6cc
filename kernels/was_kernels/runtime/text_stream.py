"""The text that a model writes after one prompt, part by part, as the decoding loop makes the tokens."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterator, Sequence
from typing import Any, Literal

import torch

from was_kernels.runtime.decoding_loop import GREEDY, DecodingLoop
from was_kernels.runtime.sampling import Sampling
from was_search.texts.incremental import IncrementalText, require_stops, until_stop

Finish = Literal["stop", "length"]


class TextStream:
    """The text after ``ids``; iterate over it once, and read its figures while it comes or when it has ended.

    All parts together are the new text: without special tokens, and without the string that ended it. A character, or
    what may begin such a string, is held back until it is certain. Whoever leaves in the middle may ``close()`` it.

    Args:
        loop: decodes; its cache and graph serve the next text too.
        tokenizer: of transformers.
        ids: of the prompt, at least one.
        max_new_tokens: at least 1.
        sampling: how tokens are chosen.
        eos: ids that end the text; None: those that end the loop's texts.
        stops: strings that end the text.

    Attributes:
        tokens: new tokens so far, with those that ended the text.
        finish: ``stop`` where an id of ``eos`` or a string of ``stops`` ended the text, ``length`` where
            ``max_new_tokens`` did; None before the end.
        first_seconds: from the first part that was asked for to the first token; None before it.
        seconds: from there to the last token so far, with the reader's own time in between.

    Raises:
        ConfigError: one of ``stops`` is empty, or the loop refuses the prompt or ``max_new_tokens``.
    """

    def __init__(
        self,
        loop: DecodingLoop,
        tokenizer: Any,
        ids: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        eos: Collection[int] | None = None,
        stops: Sequence[str] = (),
    ) -> None:
        self.tokens = 0
        self.finish: Finish | None = None
        self.first_seconds: float | None = None
        self.seconds = 0.0
        self._ends = loop.eos if eos is None else frozenset(eos)
        self._steps: Any = loop.stream(
            torch.tensor([list(ids)], dtype=torch.int64),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos=self._ends,
        )
        self._text = IncrementalText(tokenizer, ids)
        self._parts = self._written(require_stops(stops))

    def __iter__(self) -> Iterator[str]:
        return self._parts

    def close(self) -> None:
        """Stop decoding; the loop is free for the next text, as it is after the end of this one."""
        self._parts.close()
        self._steps.close()

    def _written(self, stops: tuple[str, ...]) -> Generator[str]:
        known: list[Finish] = []
        try:
            yield from until_stop(self._pieces(known), stops)
            # The pieces were not read to their end where a string ended the text.
            self.finish = known[0] if known else "stop"
        finally:
            self._steps.close()

    def _pieces(self, known: list[Finish]) -> Iterator[str]:
        """The text token by token; puts into ``known`` why it ended, once all of it was read."""
        token = -1
        started = time.perf_counter()
        for (token,) in self._steps:
            self.seconds = time.perf_counter() - started
            if not self.tokens:
                self.first_seconds = self.seconds
            self.tokens += 1
            yield self._text.add(token)
        yield self._text.rest()
        known.append("stop" if token in self._ends else "length")
