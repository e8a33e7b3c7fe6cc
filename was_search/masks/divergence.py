"""Divergence of a model's next-token distribution from the dense model's, over the dense model's top tokens.

With p the dense model's distribution, q the other's, T the k tokens of largest p and one bucket for all the rest,

    D = sum over i in T of p_i (ln p_i - ln q_i)  +  p_rest (ln p_rest - ln q_rest),   nats,

the Kullback-Leibler divergence of the two distributions after all tokens outside T are merged into one. Merging
outcomes never increases a divergence (data-processing inequality; Cover and Thomas, Elements of Information Theory,
2.7), so 0 <= D <= KL(p || q), with equality on the right for k = vocabulary.

The rest's log-probability is a logsumexp over the logits outside T, not 1 minus a sum: that keeps its digits where
the top holds nearly everything. Pure maths on logits; :mod:`was_search.masks.evaluation` runs models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from was_search.errors import ConfigError

ENTRY_BYTES = 8
"""Bytes of one entry: an int32 index and a float32 log-probability."""


@dataclass(frozen=True)
class DenseTop:
    """What the dense model predicts at every predicted token of a split.

    Log-probabilities are float32, which costs a third more than float16 and keeps the dense model's own divergence
    at 0.

    Attributes:
        indices: the k tokens of largest probability, int32 [n_sequences, predicted, k]; in no order that matters.
        log_probs: their natural log-probabilities and, last, that of all other tokens (-inf where there are
            none), float32 [n_sequences, predicted, k + 1].
    """

    indices: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        wanted = (*self.indices.shape[:-1], self.indices.shape[-1] + 1)
        if self.indices.ndim != 3 or self.log_probs.shape != wanted:
            raise ValueError(
                "log_probs: must be [n, predicted, k + 1] for indices [n, predicted, k], "
                f"got {self.log_probs.shape} and {self.indices.shape}"
            )
        if self.indices.dtype != np.int32 or self.log_probs.dtype != np.float32:
            raise ValueError(
                f"indices, log_probs: must be int32 and float32, got {self.indices.dtype} and {self.log_probs.dtype}"
            )

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def k(self) -> int:
        return int(self.indices.shape[-1])

    def __getitem__(self, sequences: slice | list[int]) -> DenseTop:
        """The predictions for some of the sequences."""
        return DenseTop(self.indices[sequences], self.log_probs[sequences])

    def rows(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """One row a predicted token, on ``device``: indices int64 [rows, k], log-probabilities [rows, k + 1]."""
        # Copies: what Ray shares between processes is read-only, and torch takes no read-only arrays.
        indices = torch.tensor(self.indices.reshape(-1, self.k)).to(device)
        log_probs = torch.tensor(self.log_probs.reshape(-1, self.k + 1)).to(device)
        return indices.long(), log_probs


def concatenate(parts: list[DenseTop]) -> DenseTop:
    """The predictions for all sequences, from those for consecutive runs of them."""
    return DenseTop(np.concatenate([p.indices for p in parts]), np.concatenate([p.log_probs for p in parts]))


def check_top_k(top_k: int, vocabulary: int) -> None:
    """Raise ConfigError if the vocabulary has fewer than ``top_k`` tokens."""
    if top_k > vocabulary:
        raise ConfigError(f"kl_top_k: must be at most the vocabulary, {vocabulary} tokens, got {top_k}")


def bucket_log_probs(logits: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens ``indices`` [rows, k] and of all others together: [rows, k + 1].

    Also the logsumexp of each row, [rows, 1], which turns any logit into a log-probability. ``logits`` is float32
    [rows, vocabulary]; usable with autograd.
    """
    top = logits.gather(1, indices)
    total = top.logsumexp(1, keepdim=True)
    if indices.shape[1] == logits.shape[1]:
        rest = torch.full_like(total, -torch.inf)
    else:
        rest = logits.scatter(1, indices, -torch.inf).logsumexp(1, keepdim=True)
        total = torch.logaddexp(total, rest)
    return torch.cat([top, rest], 1) - total, total


def top_log_probs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row: indices int64 [rows, k], and log-probabilities as in :class:`DenseTop`.

    Among tokens of equal probability any choice does: D holds for every set T.
    """
    indices = logits.topk(k, dim=1, sorted=False).indices
    return indices, bucket_log_probs(logits, indices)[0]


def divergence(dense_log_probs: Tensor, log_probs: Tensor) -> Tensor:
    """D of each row, float32 [rows]; both are [rows, k + 1] over the same tokens. Rounding may leave it at -1e-7.

    A token that the dense model excludes (log-probability -inf) costs nothing, as 0 ln 0 = 0.
    """
    p = dense_log_probs.exp()
    # Chosen before they are multiplied: 0 times (-inf + inf) is not a number.
    gap = torch.where(p > 0, dense_log_probs - log_probs, 0.0)
    return (p * gap).sum(1)
