"""What an evaluation is: the frozen protocol printed beside every figure, the tokens, and what was found."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from was_search.errors import ConfigError
from was_search.shape import FloatArray, IntArray
from was_search.weight_format import AS_STORED, WeightFormat

SPLITS = ("calibration", "search", "test")


@dataclass(frozen=True)
class EvaluationProtocol:
    """Everything that decides a loss besides the model and the vector.

    Attributes:
        data: name of the data set or file, without folders.
        data_hash: sha256 of the split's text.
        split: ``calibration``, ``search`` or ``test``.
        sequence_length: tokens of one sequence (the window), those that begin it included.
        stride: tokens between the starts of two windows; ``sequence_length`` means no overlap. With overlap
            only the last ``stride`` tokens of a window are predicted, the others are context.
        n_sequences: sequences evaluated.
        bos: whether the tokenizer's BOS is among the tokens that begin every sequence.
        dtype: ``float32``, ``bfloat16`` or ``float16``: the model's weights and activations.
        batch_size: sequences per forward; fixed, because rounding may depend on it.
        dense_prefix: tokens at a sequence's start that are never masked (and not counted as achieved sparsity).
        tokens_hash: sha256 of the token ids, so of the tokenizer, the windows and their order.
        weights: ``none``, or the format that the projections' weights were rounded to, such as ``int4:128``.
        begins: tokens that begin every sequence and are not of the text; None means one BOS, or none.
        control_tokens: control tokens that the tokenizer makes of the split's text itself; none for most.
        kind: what the data were read from, such as ``500 documents of JSON lines``; "" for plain text. It is only
            shown: the text decides, which has its hash.
    """

    data: str
    data_hash: str
    split: str
    sequence_length: int
    stride: int
    n_sequences: int
    bos: bool
    dtype: str
    batch_size: int
    dense_prefix: int
    tokens_hash: str = ""
    weights: str = AS_STORED
    begins: int | None = None
    control_tokens: int = 0
    kind: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ConfigError(f"split: must be one of {', '.join(SPLITS)}, got {self.split!r}")
        if self.sequence_length < 2:
            raise ConfigError(f"sequence_length: must be at least 2 tokens, got {self.sequence_length}")
        if not 1 <= self.stride <= self.sequence_length:
            raise ConfigError(f"stride: must be in [1, sequence_length={self.sequence_length}], got {self.stride}")
        if self.n_sequences < 1:
            raise ConfigError(f"n_sequences: must be at least 1, got {self.n_sequences}")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size: must be at least 1, got {self.batch_size}")
        if self.begins is None:
            object.__setattr__(self, "begins", int(self.bos))
        if self.first_tokens >= self.sequence_length:
            raise ConfigError(
                f"sequence_length: must be above the {self.first_tokens} token(s) that the tokenizer puts first, "
                f"got {self.sequence_length}"
            )
        if not 0 <= self.dense_prefix < self.sequence_length:
            raise ConfigError(f"dense_prefix: must be in [0, sequence_length), got {self.dense_prefix}")

    @property
    def first_tokens(self) -> int:
        """Tokens that begin every sequence and are not of the text."""
        return int(self.bos) if self.begins is None else self.begins

    @property
    def predicted_per_sequence(self) -> int:
        """Tokens predicted in one sequence, all of them of the text: the loss is a mean over these."""
        return min(self.stride, self.sequence_length - max(1, self.first_tokens))

    @property
    def predicted_tokens(self) -> int:
        return self.n_sequences * self.predicted_per_sequence

    def brief(self) -> str:
        """Data, split and size, for progress lines; :meth:`describe` says the rest."""
        return f"{self.data} [{self.split}], {self.n_sequences} x {self.sequence_length} tokens"

    def describe(self) -> str:
        """One line for tables and logs."""
        window = f"{self.n_sequences} x {self.sequence_length} tokens"
        if self.stride != self.sequence_length:
            window += f", stride {self.stride}"
        form = WeightFormat.parse(self.weights)
        precision = self.dtype if form is None else f"{self.dtype}, {form.words}"
        read = f", {self.kind}," if self.kind else ""
        controls = f", {self.control_tokens} control token(s) in its text" if self.control_tokens else ""
        first = "BOS" if self.bos else "no BOS"
        if self.first_tokens != int(self.bos):
            first = f"{self.first_tokens} tokens of the tokenizer first, {first} among them"
        return (
            f"{self.data}{read} [{self.split}] sha256:{self.data_hash[:8]}, {window}, {precision}, "
            f"batch {self.batch_size}, {first}, first {self.dense_prefix} token(s) dense"
            f"{controls}"
        )

    def to_json(self) -> dict[str, Any]:
        """Everything that decides a loss: the same data read from another kind of file are the same protocol."""
        usual = {"kind": self.kind, "begins": int(self.bos), "control_tokens": 0}
        return {key: value for key, value in asdict(self).items() if value != usual.get(key, ...)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> EvaluationProtocol:
        return cls(**value)


def content_hash(*parts: Any) -> str:
    """sha256 over JSON of ``parts``: the key of a cache entry, the same in every process."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [
            str(value.dtype),
            list(value.shape),
            hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest(),
        ]
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "to_json"):
        return value.to_json()
    raise TypeError(f"cannot hash a {type(value).__name__}")


def perplexity(loss_nats: float) -> float:
    """exp of the mean nats per predicted token; inf where that overflows, NaN for NaN."""
    return math.inf if loss_nats >= 700 else math.exp(loss_nats)


@dataclass(frozen=True)
class Distance:
    """How far next-token predictions are from the dense model's; :mod:`was_search.masks.beside_dense` defines both.

    Attributes:
        flips: share of the predicted tokens at which greedy decoding takes another one, of each sequence, float64 [n].
        variation: mean total variation distance of each sequence, float64 [n].
    """

    flips: FloatArray
    variation: FloatArray

    @classmethod
    def concatenated(cls, parts: Sequence[Distance]) -> Distance:
        """That of consecutive runs of sequences."""
        return cls(np.concatenate([p.flips for p in parts]), np.concatenate([p.variation for p in parts]))

    def to_json(self) -> dict[str, float]:
        """Means over all sequences."""
        return {"flip_rate": float(self.flips.mean()), "total_variation": float(self.variation.mean())}


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation.

    Attributes:
        losses: the fitness: mean nats per predicted token of each sequence evaluated, float64 [n], in the protocol's
            order.
        tokens: predicted tokens evaluated.
        seconds: time spent, in seconds.
        stopped_early: whether a stop rule ended it before the last sequence.
        achieved: share of channels dropped, counted, float64 [L, 7]; over the tokens outside the dense prefix.
        nats: where the losses are not the NLL themselves, the mean NLL of each sequence evaluated, float64 [n].
            None: ``losses`` are the NLL.
        distance: from the dense model's predictions, where they were compared.
    """

    losses: FloatArray
    tokens: int
    seconds: float
    stopped_early: bool
    achieved: FloatArray
    nats: FloatArray | None = None
    distance: Distance | None = None

    @property
    def loss_nats(self) -> float:
        """Mean fitness per predicted token over the sequences evaluated; NaN where one of them is."""
        return float(self.losses.mean())

    def nll_nats(self) -> float:
        """Mean NLL per predicted token over the sequences evaluated: what perplexity is the exponential of."""
        return self.loss_nats if self.nats is None else float(self.nats.mean())

    def as_nll(self) -> Evaluation:
        """The same evaluation with the NLL as its losses."""
        return self if self.nats is None else replace(self, losses=self.nats, nats=None)


@dataclass(frozen=True)
class TokenSet:
    """Token ids of one split under one protocol: int64 [n_sequences, sequence_length], in shuffled, fixed order."""

    protocol: EvaluationProtocol
    tokens: IntArray

    @classmethod
    def of(cls, protocol: EvaluationProtocol, tokens: IntArray) -> TokenSet:
        """``tokens`` under ``protocol``, with their number of sequences and their hash in it."""
        digest = hashlib.sha256(np.ascontiguousarray(tokens, "<i8").tobytes()).hexdigest()
        return cls(replace(protocol, n_sequences=len(tokens), tokens_hash=digest), tokens)

    def read_from(self, kind: str) -> TokenSet:
        """The same token ids, whose protocol tells of this kind of data."""
        return replace(self, protocol=replace(self.protocol, kind=kind))

    def first(self, n: int) -> TokenSet:
        """The first ``n`` sequences; they are in shuffled order, so they are spread over the text."""
        return TokenSet.of(self.protocol, self.tokens[:n])

    def part(self, rows: slice | list[int]) -> TokenSet:
        """Some of the sequences under the same protocol, for a pass over these alone; nothing is hashed."""
        tokens = self.tokens[rows]
        return TokenSet(replace(self.protocol, n_sequences=len(tokens), tokens_hash=""), tokens)
