from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from was_search.masks.block_error import block_error, capture_inputs
from was_search.masks.calibration import histogram_pass


@pytest.fixture(scope="module")
def dense(masked, make_data, tokens):
    return histogram_pass(masked, make_data(tokens), None)[0]


@pytest.mark.parametrize("block", [0, 2])
def test_inputs_are_those_of_the_dense_model(llama, structure, masked, make_data, tokens, block):
    with torch.inference_mode():
        states = llama(input_ids=torch.as_tensor(tokens), output_hidden_states=True).hidden_states
    captured = capture_inputs(masked, make_data(tokens), block)
    assert len(captured) == 3  # 4, 4 and 2 sequences
    found = torch.cat([args[0] if args else kwargs["hidden_states"] for args, kwargs in captured])
    torch.testing.assert_close(found, states[block])  # batches of other sizes: default float32 tolerance
    assert not structure.blocks[block].module._forward_pre_hooks


@pytest.mark.parametrize("prefix", [0, 1])
def test_error_against_an_edited_block(structure, masked, make_data, tokens, dense, prefix):
    """A copy of the block whose maps zero their own small inputs, summed up in float64."""
    data = make_data(tokens, dense_prefix=prefix)
    inputs = capture_inputs(masked, data, 1)
    error = block_error(masked, data, 1, dense)
    sparsities = np.array([0.3, 0.0, 0.5, 0.2, 0.7, 0.0, 0.9])
    thresholds = dense.thresholds(np.tile(sparsities, (3, 1)))[1]

    module = copy.deepcopy(structure.blocks[1].module)
    names = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    for p, name in enumerate(names):
        linear, column = module.get_submodule(name), masked.norms[1][p]

        def edit(_m, args, column=column, limit=float(thresholds[p])):
            x = args[0].clone()
            small = x.abs() * column < limit
            small[:, :prefix] = False
            x[small] = 0.0
            return (x,)

        linear.register_forward_pre_hook(edit)
    off = total = 0.0
    with torch.inference_mode():
        for args, kwargs in inputs:
            dense_out = structure.blocks[1].module(*args, **kwargs)[:, prefix:].double()
            off += float((module(*args, **kwargs)[:, prefix:].double() - dense_out).square().sum())
            total += float(dense_out.square().sum())
    assert error(sparsities) == pytest.approx((off / total) ** 0.5, rel=1e-5)  # float32 sums against float64


def test_no_sparsity_has_no_error_and_more_has_more(masked, make_data, tokens, dense):
    error = block_error(masked, make_data(tokens, batch_size=5), 0, dense)
    assert error(np.zeros(7)) == 0.0
    assert 0.0 < error(np.full(7, 0.2)) < error(np.full(7, 0.6)) < error(np.full(7, 0.9))


def test_other_blocks_are_left_alone(structure, masked, make_data, tokens, dense):
    data = make_data(tokens, batch_size=5)
    only = block_error(masked, data, 1, dense)(np.full(7, 0.5))
    assert only == block_error(masked, data, 1, dense)(np.full(7, 0.5))
    assert not any(linear._forward_pre_hooks for _, _, linear in structure.linears())
