from __future__ import annotations

import pytest
import torch
from torch import nn

from was_kernels.runtime.positions import DensePrefix, token_positions
from was_search.errors import ModelError

CPU = torch.device("cpu")


class Cache:
    def __init__(self, length):
        self.length = length

    def get_seq_length(self):
        return self.length


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("length", [5, torch.tensor(5)])
def test_from_the_cache(length, name):
    assert token_positions({name: None}, 3, CPU).tolist() == [[0, 1, 2]]
    assert token_positions({name: Cache(length)}, 2, CPU).tolist() == [[5, 6]]


def test_from_position_ids():
    ids = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 1]])
    cache, mask = Cache(9), torch.ones(2, 13)
    assert token_positions({"position_ids": ids, "past_key_values": cache, "attention_mask": mask}, 4, CPU) is ids
    assert token_positions({"position_ids": ids[0]}, 4, CPU).tolist() == [[0, 1, 0, 1]]
    planes = torch.stack([ids, ids + 7, ids + 9])
    assert torch.equal(token_positions({"position_ids": planes}, 4, CPU), ids)


@pytest.mark.parametrize("past", [2, torch.tensor(2)])
def test_from_the_attention_mask(past):
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert token_positions({"attention_mask": mask}, 5, CPU).tolist() == [[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]]
    given = {"attention_mask": mask, "past_key_values": Cache(past)}
    assert token_positions(given, 2, CPU).tolist() == [[0, 1], [2, 3]]


def test_from_cache_position():
    assert token_positions({"cache_position": torch.tensor([7])}, 1, CPU).tolist() == [[7]]
    four = torch.ones(1, 1, 1, 9)
    given = {"attention_mask": four, "cache_position": torch.tensor([4, 5])}
    assert token_positions(given, 2, CPU).tolist() == [[4, 5]]


class Decoder(nn.Module):
    def __init__(self, prefix):
        super().__init__()
        self.prefix = prefix
        self.seen = []

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        x = input_ids if input_ids is not None else inputs_embeds[..., 0]
        self.seen.append(self.prefix.dense(torch.zeros(*x.shape, 8)))
        return x


def test_flags_follow_the_forward():
    prefix = DensePrefix(2)
    decoder = Decoder(prefix)
    handles = prefix.attach(decoder)
    x = torch.zeros(2, 8)
    assert prefix.dense(x) is None
    decoder(torch.ones(2, 3), torch.tensor([[0, 1, 1], [1, 1, 1]]))  # positional arguments, too
    decoder(inputs_embeds=torch.ones(1, 4, 5))
    assert decoder.seen[0].tolist() == [True, True, True, True, True, False]
    assert decoder.seen[1].tolist() == [True, True, False, False]
    assert prefix.dense(x) is None
    with pytest.raises(ModelError, match="neither input_ids nor inputs_embeds"):
        decoder(attention_mask=torch.ones(1, 2))
    for handle in handles:
        handle.remove()


def test_rows_that_are_not_tokens_are_refused():
    prefix = DensePrefix(1)
    prefix._flags = torch.tensor([True, False])
    with pytest.raises(ModelError, match=r"input \[3, 1, 8\] where the model runs 2 tokens"):
        prefix.dense(torch.zeros(3, 1, 8))
    assert prefix.dense(torch.zeros(2, 8)) is prefix._flags
