"""How the next token is chosen from the logits, by operations that never wait for the device: a graph can hold them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from was_search.errors import ConfigError

_LEAST_TEMPERATURE = 1e-6
"""Under it logits divided by it may be more than a float32 holds, and a draw is the likeliest token anyway."""


@dataclass(frozen=True)
class Sampling:
    """How each next token is chosen; the default is greedy. Applied in the order of the fields, as transformers does.

    Attributes:
        repetition_penalty: logits of tokens that are in the prompt or the text so far are divided by it where they are
            positive and multiplied where negative (Keskar et al., 2019, CTRL); 1 leaves them.
        temperature: logits are divided by it; 0, or less than a millionth, takes the likeliest token.
        top_k: sample from the likeliest so many tokens only; 0 from all.
        top_p: sample from the fewest likeliest tokens whose probabilities reach it (Holtzman et al., 2020); 1 from all.
        seed: of the random draws: the same seed gives the same text on the same device with the same versions.

    Raises:
        ConfigError: a value out of its range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require("repetition_penalty", self.repetition_penalty, "from 0.001 to 1000", lambda x: 1e-3 <= x <= 1e3)
        _require("temperature", self.temperature, "a number from 0 on", lambda x: 0.0 <= x < math.inf)
        _require("top_k", self.top_k, "a whole number from 0 on", lambda x: x >= 0, whole=True)
        _require("top_p", self.top_p, "over 0 and at most 1", lambda x: 0.0 < x <= 1.0)
        _require("seed", self.seed, "a whole number from 0 to 2^63 - 1", lambda x: 0 <= x < 2**63, whole=True)

    @property
    def form(self) -> Form:
        """Which operations the choice needs."""
        random = self.temperature >= _LEAST_TEMPERATURE
        return Form(
            random,
            self.repetition_penalty != 1.0,
            self.top_k if random else 0,
            random and self.top_p < 1.0,
        )


@dataclass(frozen=True)
class Form:
    """The operations of a choice, apart from the numbers in them.

    Attributes:
        random: draw instead of taking the likeliest.
        penalised: tokens that were seen count less.
        top_k: how many tokens are drawn from; 0: all.
        nucleus: tokens are left out by their probability.
    """

    random: bool
    penalised: bool
    top_k: int
    nucleus: bool


class Sampler:
    """Chooses tokens for a few rows; its numbers and its memory of tokens lie on the device.

    Args:
        form: the operations.
        rows: texts side by side.
        vocabulary: logits a row.
        device: where the logits are.
    """

    def __init__(self, form: Form, rows: int, vocabulary: int, device: torch.device) -> None:
        self.form = form
        self.rows = rows
        self.device = device
        self.generator = torch.Generator(device)
        self._numbers = torch.ones(3, device=device)
        self._seen = torch.zeros((rows, vocabulary if form.penalised else 0), dtype=torch.bool, device=device)
        self._none = torch.zeros((), device=device)

    def begin(self, sampling: Sampling, prompt: Tensor, mask: Tensor | None) -> None:
        """Start new texts.

        Args:
            sampling: of this sampler's form.
            prompt: int64 [rows, n].
            mask: [rows, n], zero where the prompt is padding; None: nowhere.
        """
        self.generator.manual_seed(sampling.seed)
        numbers = (sampling.repetition_penalty, sampling.temperature, sampling.top_p)
        self._numbers.copy_(torch.tensor(numbers))
        if self.form.penalised:
            self._seen.zero_()
            real = torch.ones_like(prompt, dtype=torch.bool) if mask is None else mask != 0
            rows, places = real.nonzero(as_tuple=True)
            self._seen[rows, prompt[rows, places]] = True

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of each row, int64 [rows].

        Args:
            logits: [rows, vocabulary], of any floating dtype.
        """
        penalty, temperature, top_p = self._numbers.unbind()
        scores = logits.float() if self.form.random or self.form.penalised else logits
        if self.form.penalised:
            punished = torch.where(scores > 0, scores / penalty, scores * penalty)
            scores = torch.where(self._seen, punished, scores)
        token = self._drawn(scores / temperature, top_p) if self.form.random else scores.argmax(-1)
        if self.form.penalised:
            self._seen.scatter_(1, token[:, None], True)
        return token

    def _drawn(self, scores: Tensor, top_p: Tensor) -> Tensor:
        of: Tensor | None = None
        if self.form.top_k:
            scores, of = scores.topk(min(self.form.top_k, scores.shape[-1]), dim=-1)
        elif self.form.nucleus:
            scores, of = scores.sort(dim=-1, descending=True)
        chances = scores.softmax(-1)
        if self.form.nucleus:
            before = chances.cumsum(-1) - chances
            before[:, :1] = 0  # the likeliest always stays
            chances = torch.where(before < top_p, chances, self._none)
        # The largest of chances over exponential noise is a draw by the chances, without a sum or a search.
        noise = torch.empty_like(chances).exponential_(generator=self.generator)
        place = (chances / noise).argmax(-1)
        return place if of is None else of.gather(-1, place[:, None])[:, 0]


def _require(name: str, value: Any, words: str, good: Callable[[Any], bool], *, whole: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not good(value):
        raise ConfigError(f"{name}: must be {words}, got {value!r}")
