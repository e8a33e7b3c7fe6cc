from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from was_search.masks.masked_model import MaskedModel, structure_norms
from was_search.masks.masking import Masking
from was_search.masks.ops import Ops
from was_search.masks.score import column_norms


class Edited(nn.Module):
    """A linear map that masks its own input, position by position: the reference for the hooks."""

    def __init__(self, linear: nn.Linear, norms: torch.Tensor, threshold: float, prefix: int) -> None:
        super().__init__()
        self.linear, self.norms, self.threshold, self.prefix = linear, norms, threshold, prefix
        self.dropped = self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = []
        for t in range(x.shape[1]):
            token = x[:, t]
            if t >= self.prefix:
                keep = (token.abs() * self.norms >= self.threshold).to(x.dtype)
                self.dropped += int((keep == 0).sum())
                self.seen += keep.numel()
                token = token * keep
            out.append(nn.functional.linear(token, self.linear.weight, self.linear.bias))
        return torch.stack(out, dim=1)


def edited_copy(model, thresholds, kind, prefix):
    model = copy.deepcopy(model)
    for b, layer in enumerate(model.model.layers):
        names = [(layer.self_attn, n) for n in ("q", "k", "v", "o")] + [(layer.mlp, n) for n in ("gate", "up", "down")]
        for p, (parent, name) in enumerate(names):
            linear = getattr(parent, f"{name}_proj")
            norms = column_norms(linear.weight, kind)
            setattr(parent, f"{name}_proj", Edited(linear, norms, float(thresholds[b, p]), prefix))
    return model


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("kind", ["none", "l1", "l2"])
def test_hooks_against_edited_modules(llama, tokens, kind, prefix):
    thresholds = np.random.default_rng(1).uniform(0.0, 1.0, (3, 7)).astype(np.float32)
    thresholds[0, 2] = 0.0
    batch = torch.as_tensor(tokens[:3])
    reference = edited_copy(llama, thresholds, kind, prefix)
    with torch.inference_mode():
        expected = reference(input_ids=batch).logits
        with Masking(MaskedModel.of(llama, kind), thresholds, dense_prefix=prefix, count=True) as masking:
            found = llama(input_ids=batch).logits
    # One matrix product for all positions against one for each: float32 sums in another order.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    edited = [m for m in reference.modules() if isinstance(m, Edited)]
    achieved = np.array([m.dropped / m.seen for m in edited]).reshape(3, 7)
    achieved[0, 2] = 0.0
    np.testing.assert_allclose(masking.achieved(), achieved, atol=1e-12)
    assert 0.05 < masking.achieved().mean() < 0.95  # the thresholds do something


def test_norms_belong_to_their_weights(structure):
    norms = structure_norms(structure, "l2")
    for b, p, linear in structure.linears():
        torch.testing.assert_close(norms[b][p], linear.weight.norm(dim=0))


def test_closing_restores_the_model(llama, structure, masked, tokens):
    batch = torch.as_tensor(tokens[:2])
    with torch.inference_mode():
        before = llama(input_ids=batch).logits
        with (
            pytest.raises(RuntimeError, match="inside"),
            Masking(masked, np.full((3, 7), 1e9, np.float32)),
        ):
            raise RuntimeError("inside")
        assert torch.equal(before, llama(input_ids=batch).logits)
    assert not any(linear._forward_pre_hooks for _, _, linear in structure.linears())


def test_no_thresholds_changes_nothing_and_counts_nothing(llama, masked, tokens):
    batch = torch.as_tensor(tokens[:2])
    with torch.inference_mode():
        before = llama(input_ids=batch).logits
        with Masking(masked, None, count=True) as masking:
            assert torch.equal(before, llama(input_ids=batch).logits)
    np.testing.assert_array_equal(masking.achieved(), np.zeros((3, 7)))


def test_everything_dropped(llama, masked, tokens):
    with (
        torch.inference_mode(),
        Masking(masked, np.full((3, 7), 1e9, np.float32), count=True) as masking,
    ):
        llama(input_ids=torch.as_tensor(tokens[:2]))
    np.testing.assert_array_equal(masking.achieved(), np.ones((3, 7)))


def test_counts_add_up_over_batches(llama, masked, tokens):
    thresholds = np.full((3, 7), 0.3, np.float32)
    found = []
    for size in (10, 3):
        with torch.inference_mode(), Masking(masked, thresholds, count=True) as masking:
            for start in range(0, 10, size):
                llama(input_ids=torch.as_tensor(tokens[start : start + size]))
        found.append(masking.achieved())
    # Rounding may move a score across a threshold: at most one of the 2,560 channels counted per projection.
    np.testing.assert_allclose(found[0], found[1], atol=1.01 / 2560)


def test_the_observer_sees_scores_before_masking_outside_the_prefix(llama, tokens):
    seen, masked = {}, MaskedModel.of(llama, "none")
    thresholds = np.full((3, 7), 1e9, np.float32)
    with (
        torch.inference_mode(),
        Masking(masked, thresholds, dense_prefix=2, observer=lambda b, p, s: seen.setdefault((b, p), s)),
    ):
        llama(input_ids=torch.as_tensor(tokens[:2]))
    assert set(seen) == {(b, p) for b in range(3) for p in range(7)}
    assert all(scores.shape[:2] == (2, 15) for scores in seen.values())
    assert float(seen[0, 0].min()) >= 0.0
    assert torch.equal(seen[0, 0], seen[0, 1])  # q and k read the same input, norms being ones
    assert float(seen[0, 0].max()) > 0.0


def test_another_mask_op_is_used(llama, tokens):
    calls = []

    def op(x, norms, threshold, prefix):
        calls.append((tuple(x.shape), threshold, prefix))
        return x, torch.tensor(5)

    thresholds = np.zeros((3, 7), np.float32)
    thresholds[1, 6] = 0.5
    with (
        torch.inference_mode(),
        Masking(MaskedModel.of(llama, "l2", ops=Ops(mask=op)), thresholds, count=True) as found,
    ):
        llama(input_ids=torch.as_tensor(tokens[:2]))
    assert calls == [((2, 17, 24), 0.5, 1)]
    assert found.achieved()[1, 6] == 1.0 - 5 / (2 * 16 * 24)


def test_biases_are_added_after_masking(tokens):
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    linear = model.model.layers[0].self_attn.q_proj
    nn.init.normal_(linear.bias)
    found = []
    handle = linear.register_forward_hook(lambda _m, _a, out: found.append(out))
    with (
        torch.inference_mode(),
        Masking(MaskedModel.of(model, "l2"), np.full((1, 7), 1e9, np.float32)),
    ):
        model(input_ids=torch.as_tensor(tokens[:1]))
    handle.remove()
    assert torch.equal(found[0][0, 1:], linear.bias.expand(16, -1))
