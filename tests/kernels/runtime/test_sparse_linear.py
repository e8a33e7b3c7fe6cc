"""SparseLinear with the Triton kernels: needs ``device``; the plain path is covered by test_sparse_model.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.doubles.tiny_models import masked_logits, tiny_model, tiny_plan
from tests.kernels.where import need_kernels
from was_kernels.runtime.positions import DensePrefix
from was_kernels.runtime.sparse_linear import SparseLinear
from was_kernels.runtime.sparse_model import sparsify
from was_search.errors import ConfigError
from was_search.masks.score import column_norms, masked

need_kernels()

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def pair(dtype: torch.dtype, device: torch.device, *, bias: bool = True) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(65, 33, bias=bias, dtype=dtype).to(device)
    return linear, column_norms(linear.weight, "l2")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (16, 1), (17, 1), (1, 6), (3, 4), (4,), ()])
def test_equals_the_masked_linear(device, dtype, shape):
    linear, norms = pair(dtype, device, bias=len(shape) != 1)
    x = torch.randn(*shape, 65).to(device, dtype)
    with torch.no_grad():
        expected = linear(masked(x, norms, 0.3)).double()
        found = SparseLinear(linear, norms, 0.3, prefix=None, triton=True, dense_above=None)(x)
    assert found.shape == expected.shape and found.dtype == dtype
    # Two sums of up to 65 products of order 1, in different orders and each rounded once to the dtype.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_masked_tokens_are_corrected(device, bias, threshold):
    """One-token steps, of which the second row lies in the dense prefix, and a prompt."""
    linear, norms = pair(torch.float16, device, bias=bias)
    drawn = torch.randn(2, 33, device=device)
    prefix, vectors = DensePrefix(2), (1.0 + drawn[0] / 8, drawn[1] / 4)
    held = SparseLinear(linear, norms, threshold, prefix=prefix, triton=True, compensation=vectors)
    for shape, places in (((3, 1), [[5], [1], [9]]), ((1, 4), [[0, 1, 2, 3]])):
        x, positions = torch.randn(*shape, 65).to(device, torch.float16), torch.tensor(places, device=device)
        prefix.begin({"inputs_embeds": x, "position_ids": positions})
        found = held(x)
        prefix.end()
        dense = positions[..., None] < 2
        own = linear.bias.double() if bias else 0.0
        plain = torch.where(dense, x, masked(x, norms, threshold)).double() @ linear.weight.double().T + own
        expected = torch.where(dense, plain, vectors[0].double() * plain + vectors[1].double())
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=4 * torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_decoding_with_kernels_equals_the_masked_model(device, batch):
    model = tiny_model(dtype=torch.float32).to(device)
    plan = tiny_plan(model)
    tokens = torch.randint(2, 97, (batch, 10), generator=torch.Generator().manual_seed(5)).to(device)
    expected = masked_logits(model, plan, tokens)
    with torch.inference_mode(), sparsify(model, plan, backend="triton"):
        step = model(tokens[:, :4], use_cache=True)
        found = [step.logits]
        for t in range(4, 10):
            step = model(tokens[:, t : t + 1], past_key_values=step.past_key_values, use_cache=True)
            found.append(step.logits)
    # float32 sums of ~80 terms in another order, through two blocks; a flipped mask would show as 1e-2.
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_first_token_decoded_alone_is_dense(device):
    model = tiny_model(dtype=torch.float32).to(device)
    plan = tiny_plan(model, sparsity=0.8, dense_prefix=2)
    tokens = torch.tensor([[5, 9, 11]], device=device)
    with torch.inference_mode():
        dense = model(tokens[:, :2]).logits
        expected = masked_logits(model, plan, tokens)
        with sparsify(model, plan, backend="triton"):
            step, found = None, []
            for t in range(3):
                cache = None if step is None else step.past_key_values
                step = model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
                found.append(step.logits)
    torch.testing.assert_close(torch.cat(found[:2], dim=1), dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_backend_triton_needs_a_kernel_dtype(device):
    model = tiny_model().to(device)
    with pytest.raises(ConfigError, match="float64"):
        sparsify(model, tiny_plan(model), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("batch", [1, 2, 17])
def test_generate_on_the_gpu(cuda, cache, batch):
    model = tiny_model(dtype=torch.float32).to(cuda)  # in half precision a near tie may end another text
    plan = tiny_plan(model)
    prompt = torch.randint(2, 97, (batch, 5), generator=torch.Generator().manual_seed(5)).to(cuda)
    texts = []
    for backend in ("auto", "reference"):
        handle = sparsify(model, plan, backend=backend)
        assert handle.backend == {"auto": "triton"}.get(backend, backend)
        with handle as sparse:
            texts.append(
                sparse.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=12,
                    do_sample=False,
                    cache_implementation=cache,
                    disable_compile=True,
                )
            )
    assert torch.equal(texts[0], texts[1])


class Decoder(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor) -> Tensor:
        y: Tensor = self.linear(inputs_embeds)
        return y


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_decode_step_in_a_cuda_graph(cuda, dtype, batch):
    linear, norms = pair(dtype, cuda)
    prefix = DensePrefix(2)
    decoder = Decoder(SparseLinear(linear, norms, 0.4, prefix=prefix, triton=True))
    prefix.attach(decoder)
    x = torch.randn(batch, 1, 65).to(cuda, dtype)
    position = torch.zeros(batch, 1, dtype=torch.long, device=cuda)
    with torch.inference_mode():
        decoder(x, position)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = decoder(x, position)
        for place in (0, 3):  # in the dense prefix and outside: decided on the device at replay
            position.fill_(place)
            graph.replay()
            assert torch.equal(y, decoder(x, position))
            expected = F.linear(x if place < 2 else masked(x, norms, 0.4), linear.weight, linear.bias)
            torch.testing.assert_close(y.double(), expected.double(), rtol=0, atol=4 * torch.finfo(dtype).eps)
