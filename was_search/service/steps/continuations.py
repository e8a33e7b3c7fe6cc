"""Greedy continuations of a text's beginnings, dense and with a plan: how many stay the same, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from was_search.errors import ConfigError
from was_search.plan import Plan
from was_search.shape import IntArray

if TYPE_CHECKING:
    from torch import nn

    from was_kernels import DecodingLoop

PROMPT_TOKENS = 64
NEW_TOKENS = 64
_ENDED = -1


@dataclass(frozen=True)
class Continuations:
    """A plan's greedy continuations beside the dense model's.

    Attributes:
        prompts: number of prompts.
        prompt_tokens: tokens of each.
        new_tokens: of each continuation, at most; a text that has ended counts as the same from there on.
        equal: share of the continuations that are the same to their end.
        until_difference: mean number of tokens before the first other one; ``new_tokens`` where there is none.
    """

    prompts: int
    prompt_tokens: int
    new_tokens: int
    equal: float
    until_difference: float

    @classmethod
    def of(cls, dense: IntArray, sparse: IntArray, prompt_tokens: int) -> Continuations:
        """From the new tokens of both, [prompts, new_tokens]."""
        n, new = dense.shape
        differs = dense != sparse
        until = np.where(differs.any(axis=1), differs.argmax(axis=1), new)
        return cls(n, prompt_tokens, new, float(np.mean(until == new)), float(until.mean()))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{100 * self.equal:.1f} % of {self.prompts} greedy continuations stay the dense model's over "
            f"{self.new_tokens} tokens; {self.until_difference:.1f} tokens on average before the first other one"
        )


def require_room(positions: int | None, sequence_length: int) -> None:
    """Refuse a model whose positions do not hold prompt and continuation, with a ConfigError."""
    prompt = min(PROMPT_TOKENS, sequence_length)
    if positions is not None and prompt + NEW_TOKENS > positions:
        raise ConfigError(
            f"continuations: prompts of {prompt} tokens and {NEW_TOKENS} new ones exceed the model's {positions} "
            "positions; leave them out"
        )


def compare_continuations(
    model: nn.Module, plans: Sequence[Plan], sequences: IntArray, *, advance: Callable[[], None] = lambda: None
) -> list[Continuations]:
    """Continue the beginnings of ``sequences`` [n, length] densely and with each of ``plans``, one text at a time.

    Steps, and the masks of prompts, are those of ``was-search generate``.

    Args:
        model: the dense model, which is left as it was.
        plans: for its weights.
        sequences: token ids; the first :data:`PROMPT_TOKENS` of each are its prompt.
        advance: called after each text.
    """
    from was_kernels import DecodingLoop, sparsify

    prompts = sequences[:, :PROMPT_TOKENS]
    dense = _greedy(DecodingLoop(model), prompts, advance)
    found = []
    for plan in plans:
        handle = sparsify(model, plan)
        with handle:
            found.append(Continuations.of(dense, _greedy(handle.loop, prompts, advance), prompts.shape[1]))
    return found


def _greedy(loop: DecodingLoop, prompts: IntArray, advance: Callable[[], None]) -> IntArray:
    """The new tokens of each prompt, [prompts, NEW_TOKENS]."""
    found = np.full((len(prompts), NEW_TOKENS), _ENDED, np.int64)
    for row, prompt in zip(found, prompts, strict=True):
        tokens = list(_tokens(loop, prompt))
        row[: len(tokens)] = tokens
        advance()
    return found


def _tokens(loop: DecodingLoop, prompt: IntArray) -> Iterator[int]:
    for (token,) in loop.stream(torch.tensor(prompt)[None], max_new_tokens=NEW_TOKENS):
        assert token is not None
        yield token
