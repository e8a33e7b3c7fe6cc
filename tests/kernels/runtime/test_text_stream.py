"""The text after a prompt: part by part the text of the loop's tokens, and why it ended."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from was_kernels import DecodingLoop, Sampling, TextStream
from was_search.checkpoints.load import load_model, load_tokenizer, resolve_model
from was_search.errors import ConfigError
from was_search.service.steps.demonstration import DEMO_FOLDER

SOURCE = resolve_model(str(DEMO_FOLDER / "model"))
N = 40


@pytest.fixture(scope="module")
def loop() -> DecodingLoop:
    return DecodingLoop(load_model(SOURCE, dtype="float32"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(SOURCE)


@pytest.fixture(scope="module")
def ids(tokenizer: Any) -> list[int]:
    return list(tokenizer("def read_lines(path):\n")["input_ids"])


@pytest.fixture(scope="module")
def new(loop: DecodingLoop, ids: list[int]) -> list[int]:
    """Ids that the loop writes."""
    return [step[0] for step in loop.stream(torch.tensor([ids]), max_new_tokens=N, eos=()) if step[0] is not None]


def test_the_parts_are_the_text_of_the_loops_tokens(loop, tokenizer, ids, new):
    stream = TextStream(loop, tokenizer, ids, max_new_tokens=N)
    assert (stream.tokens, stream.finish, stream.first_seconds) == (0, None, None)
    parts = iter(stream)
    first = next(parts)
    assert first and stream.tokens < 5 and stream.finish is None
    assert first + "".join(parts) == tokenizer.decode(new)
    assert (stream.tokens, stream.finish) == (N, "length")
    assert stream.first_seconds is not None and 0 < stream.first_seconds < stream.seconds


def test_a_string_ends_it_and_the_loops_stream(loop, tokenizer, ids, new, monkeypatch):
    closed: list[bool] = []
    ordinary = loop.stream

    def watched(*arguments: Any, **options: Any) -> Any:
        try:
            yield from ordinary(*arguments, **options)
        finally:
            closed.append(True)

    monkeypatch.setattr(loop, "stream", watched)
    whole = tokenizer.decode(new)
    stop = whole[len(whole) // 2 :][:6]
    stream = TextStream(loop, tokenizer, ids, max_new_tokens=N, stops=["never in it", stop])
    assert "".join(stream) == whole[: whole.find(stop)]
    assert stream.finish == "stop" and 0 < stream.tokens < N and closed == [True]
    at_the_end = TextStream(loop, tokenizer, ids, max_new_tokens=N, stops=[whole[-3:]])
    assert whole.startswith("".join(at_the_end)) and at_the_end.finish == "stop"


def test_a_token_ends_it_also_where_it_is_the_last_one_allowed(loop, tokenizer, ids, new, monkeypatch):
    before, end = next((i, token) for i, token in enumerate(new) if i > 2 and token not in new[:i])
    for most in (N, before + 1):
        stream = TextStream(loop, tokenizer, ids, max_new_tokens=most, eos=[end])
        "".join(stream)
        assert (stream.tokens, stream.finish) == (before + 1, "stop")
    stream = TextStream(loop, tokenizer, ids, max_new_tokens=before, eos=[end])
    "".join(stream)
    assert (stream.tokens, stream.finish) == (before, "length")
    monkeypatch.setattr(loop._model.generation_config, "eos_token_id", [9999, end])
    stream = TextStream(loop, tokenizer, ids, max_new_tokens=N)
    "".join(stream)
    assert (stream.tokens, stream.finish) == (before + 1, "stop")


def test_it_may_be_left_in_the_middle(loop, tokenizer, ids, new):
    stream = TextStream(loop, tokenizer, ids, max_new_tokens=N)
    next(iter(stream))
    stream.close()
    assert list(stream) == [] and stream.finish is None and stream.tokens < 5
    TextStream(loop, tokenizer, ids, max_new_tokens=N).close()
    assert "".join(TextStream(loop, tokenizer, ids, max_new_tokens=N)) == tokenizer.decode(new)


def test_tokens_are_chosen_as_the_sampling_says(loop, tokenizer, ids, new):
    def text(seed: int) -> str:
        sampling = Sampling(temperature=1.5, seed=seed)
        return "".join(TextStream(loop, tokenizer, ids, max_new_tokens=12, sampling=sampling))

    assert text(3) == text(3) != text(4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stops": ["a", ""]}, "stop: a string that ends the text must not be empty"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1, got 0"),
        ({"ids": []}, r"ids: must be whole numbers \[rows, n\] with a token at least"),
    ],
)
def test_what_is_refused_is_refused_before_the_first_part(loop, tokenizer, given, message):
    options = {"ids": [5], "max_new_tokens": 2, **given}
    with pytest.raises(ConfigError, match=message):
        TextStream(loop, tokenizer, options.pop("ids"), **options)
