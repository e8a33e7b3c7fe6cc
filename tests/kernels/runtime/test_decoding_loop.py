"""The decoding loop: the tokens of ``generate``, for every family, form of sampling, padding and interruption."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from tests.doubles.tiny_models import FAMILIES, model_of, tiny_model, tiny_plan, tokens_of
from was_kernels import DecodingLoop, Sampling, sparsify
from was_search.errors import ConfigError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def device_or_skip(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return name


def generated(model: Any, tokens: torch.Tensor, n: int, **options: Any) -> list[list[int]]:
    with torch.inference_mode():
        out = model.generate(tokens, max_new_tokens=n, do_sample=False, pad_token_id=0, **options)
    return out[:, tokens.shape[1] :].tolist()


def streamed(loop: Any, tokens: torch.Tensor, n: int, **options: Any) -> list[list[int]]:
    """The rows of a stream, each up to its end."""
    steps = list(loop.stream(tokens, max_new_tokens=n, **options))
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


def until(rows: list[list[int]], ends: set[int]) -> list[list[int]]:
    return [row[: next((i + 1 for i, t in enumerate(row) if t in ends), len(row))] for row in rows]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_what_generate_writes_dense_and_with_a_plan(family, rows, device):
    model = tiny_model(family, torch.float32).to(device_or_skip(device))
    tokens = tokens_of(rows, 9).to(device)
    expected = generated(model, tokens, 20)
    assert streamed(DecodingLoop(model), tokens, 20) == expected
    with sparsify(model, tiny_plan(model), backend="reference") as sparse:
        masked = generated(sparse, tokens, 20)
        loop = DecodingLoop(sparse)
        assert streamed(loop, tokens, 20) == masked
        assert streamed(loop, tokens[:, :5], 20) == generated(sparse, tokens[:, :5], 20)
    if family != "gemma2":  # whose random model writes one token again and again
        assert masked != expected


@pytest.mark.parametrize("device", DEVICES)
def test_padded_rows_write_what_they_write_alone(device):
    model = tiny_model("llama", torch.float32).to(device_or_skip(device))
    tokens = tokens_of(3, 9).to(device)
    mask = torch.ones_like(tokens)
    mask[1, :4], mask[2, :1] = 0, 0
    handle = sparsify(model, tiny_plan(model, dense_prefix=2), backend="reference")
    found = streamed(handle, tokens, 16, mask=mask)
    alone = [streamed(handle, tokens[i : i + 1, int((1 - mask[i]).sum()) :], 16)[0] for i in range(3)]
    assert found == alone
    assert streamed(handle, tokens, 16, mask=torch.ones_like(mask)) == streamed(handle, tokens, 16)
    other = torch.ones_like(mask)
    other[0, :3] = 0
    assert streamed(handle, tokens, 16, mask=other)[0] == streamed(handle, tokens[:1, 3:], 16)[0]
    handle.restore()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_end_on_their_own(device):
    model = tiny_model("llama", torch.float32).to(device_or_skip(device))
    tokens = tokens_of(4, 9).to(device)
    whole = streamed(DecodingLoop(model), tokens, 24)
    ends = {whole[0][3], whole[1][10]}
    loop = DecodingLoop(model)
    found = streamed(loop, tokens, 24, eos=ends)
    assert found == until(whole, ends) and len(set(map(len, found))) > 1
    assert streamed(loop, tokens, 24) == whole
    model.generation_config.eos_token_id = sorted(ends)
    assert streamed(loop, tokens, 24) == found
    assert streamed(loop, tokens, 24, eos=()) == whole
    steps = list(loop.stream(tokens[:1], max_new_tokens=24, eos=[whole[0][0]]))
    assert steps == [[whole[0][0]]]


@pytest.mark.parametrize("device", DEVICES)
def test_streams_in_turns_and_streams_left_alone(device):
    model = tiny_model("llama", torch.float32).to(device_or_skip(device))
    handle = sparsify(model, tiny_plan(model), backend="reference")
    tokens = tokens_of(2, 9).to(device)
    one, other = (streamed(handle, tokens[i : i + 1], 16) for i in range(2))
    both = [handle.stream(tokens[i : i + 1], max_new_tokens=16) for i in range(2)]
    turns = list(zip(*both, strict=True))
    assert [[[step[0] for step in row]] for row in zip(*turns, strict=True)] == [one, other]
    left = handle.stream(tokens[:1], max_new_tokens=16)
    next(left)
    left.close()
    assert streamed(handle, tokens[1:], 16) == other
    handle.restore()
    with pytest.raises(ConfigError, match="no longer applied"):
        handle.stream(tokens, max_new_tokens=2)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_prepared_is_there_for_the_next_stream(device, monkeypatch):
    model = model_of("llama", device_or_skip(device), torch.bfloat16 if device == "cuda" else torch.float32)
    tokens = tokens_of(1, 9).to(device)
    loop = DecodingLoop(model)
    assert loop.eos == frozenset()
    loop.prepare(tokens, max_new_tokens=16)
    if device == "cuda":
        monkeypatch.setattr("was_kernels.runtime.decoding_loop.captured", lambda *_, **__: pytest.fail("captured"))
        assert loop._kept is not None and loop._kept._graph is not None
    assert streamed(loop, tokens, 16) == streamed(DecodingLoop(model, graphs=False), tokens, 16)
    assert loop._kept is not None
    with pytest.raises(ConfigError, match="max_new_tokens: must be at least 1, got 0"):
        loop.prepare(tokens, max_new_tokens=0)


def test_counting_sees_the_streams_steps():
    model = tiny_model("llama", torch.float32)
    handle = sparsify(model, tiny_plan(model), backend="reference")
    with handle.counting() as counts:
        list(handle.stream(tokens_of(1, 9), max_new_tokens=16))
    assert 0.2 < counts.sparsity() < 0.8
    handle.restore()


@pytest.mark.parametrize("device", DEVICES)
def test_a_repetition_penalty_is_that_of_transformers(device):
    model = tiny_model("llama", torch.float32).to(device_or_skip(device))
    tokens = tokens_of(2, 9).to(device)
    plain = generated(model, tokens, 24)
    expected = generated(model, tokens, 24, repetition_penalty=1.7)
    assert streamed(DecodingLoop(model), tokens, 24, sampling=Sampling(repetition_penalty=1.7)) == expected != plain


@pytest.mark.parametrize("device", DEVICES)
def test_a_seed_gives_one_text_and_another_gives_another(device):
    model = tiny_model("llama", torch.float32).to(device_or_skip(device))
    tokens = tokens_of(2, 9).to(device)
    loop = DecodingLoop(model)
    texts = [streamed(loop, tokens, 24, sampling=Sampling(temperature=1.0, seed=seed)) for seed in (3, 4, 3)]
    assert texts[0] == texts[2] != texts[1]
    assert streamed(DecodingLoop(model), tokens, 24, sampling=Sampling(temperature=1.0, seed=3)) == texts[0]
    assert streamed(loop, tokens, 24, sampling=Sampling(temperature=1e-4)) == generated(model, tokens, 24)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), {}, r"ids: must be whole numbers \[rows, n\].*got torch.int64 \[3\]"),
        (torch.zeros((1, 0), dtype=torch.int64), {}, r"with a token at least, got torch.int64 \[1, 0\]"),
        (torch.zeros((1, 2)), {}, "got torch.float32"),
        ([[1, 2]], {}, "got list"),
        (torch.ones((1, 2), dtype=torch.int64), {"max_new_tokens": 0}, "max_new_tokens: must be at least 1, got 0"),
        (torch.ones((1, 2), dtype=torch.int64), {"mask": torch.ones(1, 3)}, r"shaped like ids, \[1, 2\], got"),
        (torch.ones((1, 2), dtype=torch.int64), {"mask": torch.tensor([[1, 0]])}, "padded on the left only"),
        (torch.ones((1, 2), dtype=torch.int64), {"mask": torch.zeros(1, 2)}, "hold a token"),
    ],
)
def test_what_no_prompt_is(ids, options, message):
    with pytest.raises(ConfigError, match=message):
        DecodingLoop(tiny_model()).stream(ids, **{"max_new_tokens": 2, **options})


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(1.3), Sampling(temperature=0.9, seed=5), Sampling(1.2, 0.9, 20, 0.8, 5)],
    ids=["greedy", "penalty", "sampling", "everything"],
)
def test_graphs_write_what_steps_without_write(cuda, family, rows, sampling):
    model = model_of(family, "cuda", torch.bfloat16)
    tokens = tokens_of(rows, 20).to(cuda)
    mask = torch.ones_like(tokens)
    mask[-1, :6] = 0
    for sparse in (False, True):
        handle = sparsify(model, tiny_plan(model)) if sparse else None
        for given in ({}, {"mask": mask}):
            loop = DecodingLoop(model)
            found = [streamed(loop, tokens, 40, sampling=sampling, **given) for _ in range(2)]
            assert loop.eager_because is None
            eager = DecodingLoop(model, graphs=False)
            expected = streamed(eager, tokens, 40, sampling=sampling, **given)
            assert eager.eager_because == "graphs are off"
            assert found == [expected, expected]
        if handle is not None:
            handle.restore()


@pytest.mark.gpu
def test_what_is_not_captured_says_why(cuda):
    model = model_of("llama", "cuda", torch.bfloat16)
    tokens = tokens_of(1, 9).to(cuda)
    loop = DecodingLoop(model)
    expected = streamed(loop, tokens, 12)
    assert loop.eager_because is None
    seen: list[int] = []
    hook = model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    assert streamed(loop, tokens, 12) == expected and len(seen) == 12
    assert loop.eager_because == "a module has hooks, or a forward of its own"
    hook.remove()
    assert streamed(loop, tokens, 12) == expected and loop.eager_because is None
    with torch.autocast("cuda"):
        list(loop.stream(tokens, max_new_tokens=3))
        assert loop.eager_because == "autocast is on"
    windowed = tiny_model("mistral", torch.bfloat16).to(cuda)
    loop = DecodingLoop(windowed)
    assert streamed(loop, tokens, 12) == generated(windowed, tokens, 12)
    assert loop.eager_because == "its cache is not of one length"


@pytest.mark.gpu
def test_weights_that_were_replaced_are_read(cuda):
    model = model_of("llama", "cuda", torch.bfloat16)
    tokens = tokens_of(1, 9).to(cuda)
    loop = DecodingLoop(model)
    before = streamed(loop, tokens, 24)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(-model.model.layers[0].mlp.up_proj.weight)
    after = streamed(loop, tokens, 24)
    assert after == streamed(DecodingLoop(model, graphs=False), tokens, 24) != before


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_runs_without(cuda, monkeypatch):
    model = model_of("llama", "cuda", torch.bfloat16)
    tokens = tokens_of(1, 9).to(cuda)
    expected = streamed(DecodingLoop(model, graphs=False), tokens, 12)
    norm = type(model.model.norm)
    plain = norm.forward

    def waits(self: Any, x: torch.Tensor) -> torch.Tensor:
        float(x.sum())
        return plain(self, x)

    monkeypatch.setattr(norm, "forward", waits)
    loop = DecodingLoop(model)
    assert [streamed(loop, tokens, 12) for _ in range(2)] == [expected, expected]
    assert loop.eager_because is not None and "no graph could be captured" in loop.eager_because
    torch.rand(1, device="cuda")  # torch's own generator is not left in the middle of a capture
    drawn = [streamed(loop, tokens, 12, sampling=Sampling(temperature=1.0)) for _ in range(2)]
    assert drawn[0] == drawn[1] != [expected]


@pytest.mark.gpu
def test_nothing_is_held_after_restore(cuda):
    model = model_of("llama", "cuda", torch.bfloat16)
    handle = sparsify(model, tiny_plan(model))
    list(handle.stream(tokens_of(1, 9).to(cuda), max_new_tokens=12))
    kept = weakref.ref(handle.loop._kept)
    handle.restore()
    gc.collect()
    assert kept() is None
