"""Prompts: what begins and ends their texts, what they may hold, and ids that the model has no row for."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from tests.places.checkpoints import checkpoint
from tests.places.tokenizers import with_template
from was_kernels import DecodingLoop, Sampling
from was_search.checkpoints.load import load_model, load_tokenizer
from was_search.errors import ConfigError, ModelError
from was_search.service.context import Context
from was_search.service.reports.progress import Reporter
from was_search.service.settings import Settings
from was_search.service.steps import decoding
from was_search.service.steps.decoding import Generation, _notes, generate, generate_each
from was_search.service.steps.evaluation import load_for

MASK, SOP, BOS = 258, 259, 256


class Notes(Reporter):
    def __init__(self):
        self.notes = []
        self.results = []

    def note(self, text):
        self.notes.append(text)

    def result(self, value):
        self.results.append(value)


def context_of(folder):
    return Context(Settings(model=str(folder), device="cpu", dtype="float32"), Notes())


@pytest.mark.parametrize(
    ("template", "ids"), [("[gMASK] <sop> $A", [MASK, SOP]), ("$A </s>", []), ("<s> $A </s>", [BOS])]
)
def test_a_prompt_begins_like_a_window_and_has_nothing_after_it(template, ids, tmp_path):
    folder = checkpoint(tmp_path, tokenizer=with_template(template))
    with context_of(folder) as context:
        found = generate(context, None, "abc", max_new_tokens=5)
    model = load_model(str(folder), dtype="float32")
    fed = torch.tensor([[*ids, 97, 98, 99]])
    out = model.generate(fed, attention_mask=torch.ones_like(fed), max_new_tokens=5, do_sample=False)
    assert found.text == with_template(template).decode(out[0, fed.shape[1] :], skip_special_tokens=True)


def test_control_tokens_in_a_prompt_are_read_and_said(tmp_path):
    with context_of(checkpoint(tmp_path, tokenizer=with_template("<s> $A"))) as context:
        generate(context, None, "a[gMASK]b</s>", max_new_tokens=2)
        assert "2 control token(s) are named in the prompt" in context.reporter.notes
        context.reporter.notes.clear()
        generate(context, None, "abc", max_new_tokens=2)
        assert not any("control" in note for note in context.reporter.notes)


def test_a_prompt_with_a_token_beyond_the_models_rows(tmp_path):
    folder = checkpoint(tmp_path, tokenizer=with_template("$A"), vocab_size=258)
    with context_of(folder) as context, pytest.raises(ModelError, match=r"id 259 \('<sop>'\) in the prompt, the model"):
        generate(context, None, "abc<sop>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model that reads bytes, and writes a text without repetitions."""
    tokenizer = with_template("<s> $A")
    tokenizer.chat_template = "<s>[{{ messages[0].role }}]{{ messages[0].content }}</s>"
    return checkpoint(tmp_path_factory.mktemp("bytes"), tokenizer=tokenizer)


SAMPLING = Sampling(temperature=2.0, seed=3)


def test_a_text_is_shown_while_it_comes_and_its_figures_after_it(folder, capsys, monkeypatch):
    shown = []
    ordinary = DecodingLoop.stream

    def watched(*arguments, **options):
        for step in ordinary(*arguments, **options):
            shown.append(capsys.readouterr().out)
            yield step

    monkeypatch.setattr(DecodingLoop, "stream", watched)
    with context_of(folder) as context:
        found = generate(context, None, "abc", max_new_tokens=9, sampling=SAMPLING)
    assert shown[0] == "abc" and len(shown) == 9
    assert "".join(shown) + capsys.readouterr().out == f"abc{found.text}\n"
    assert sum(map(bool, shown)) > 3
    assert (found.prompt, found.tokens, found.finish, found.achieved) == ("abc", 9, "length", None)
    assert 0 < found.first_seconds < found.seconds
    assert found.tokens_per_second == pytest.approx(8 / (found.seconds - found.first_seconds))
    (note,) = context.reporter.notes
    assert note == (
        f"9 tokens in {found.seconds:.2f} s, the first after {found.first_seconds:.2f} s, "
        f"then {found.tokens_per_second:.1f} tokens/s, dense, cpu"
    )
    (result,) = context.reporter.results
    assert Generation(**{name: result[name] for name in vars(found)}) == found
    assert (result["tokens_per_second"], result["device"]) == (found.tokens_per_second, "cpu")


def test_one_token_has_no_rate(folder):
    with context_of(folder) as context:
        found = generate(context, None, "abc", max_new_tokens=1)
    assert found.tokens_per_second is None
    assert context.reporter.notes == [f"1 token in {found.seconds:.2f} s, dense, cpu"]


def test_a_gpu_without_a_graph_says_why(folder):
    found = Generation("b", 3, 0.5, 0.4, "stop", 0.25, "a", "autocast is on")
    figures = "3 tokens in 0.50 s, the first after 0.25 s, then 8.0 tokens/s, 40.0 % of weights skipped in decode steps"
    assert list(_notes(found, 0, "cpu")) == [f"{figures}, cpu"]
    assert list(_notes(found, 0, "cuda")) == [f"{figures}, cuda", "steps ran without a CUDA graph: autocast is on"]
    assert list(_notes(dataclasses.replace(found, eager_because=None), 0, "cuda:1")) == [f"{figures}, cuda:1"]


def test_several_prompts_have_titles_and_one_model(folder, capsys, monkeypatch):
    loads = []
    monkeypatch.setattr(decoding, "load_for", lambda *given: loads.append(given) or load_for(*given))
    with context_of(folder) as context:
        alone = [generate(context, None, text, max_new_tokens=5, sampling=SAMPLING) for text in ("abc", "d")]
        capsys.readouterr()
        both = generate_each(context, None, ["abc", "d"], max_new_tokens=5, sampling=SAMPLING)
    assert [one.text for one in both] == [one.text for one in alone] and len(loads) == 3
    expected = [f"[prompt {i + 1} of 2]\n{one.prompt}{one.text}\n" for i, one in enumerate(both)]
    assert capsys.readouterr().out == "".join(expected)
    assert [result["text"] for result in context.reporter.results[2:]] == [one.text for one in both]


def test_a_string_ends_the_text_and_the_seed_decides_it(folder):
    with context_of(folder) as context:
        whole = generate(context, None, "abc", max_new_tokens=30, sampling=SAMPLING)
        stop = whole.text[8:10]
        cut = generate(context, None, "abc", max_new_tokens=30, sampling=SAMPLING, stop=["no such", stop])
        other = generate(context, None, "abc", max_new_tokens=30, sampling=Sampling(temperature=2.0, seed=4))
    assert cut.text == whole.text[: whole.text.find(stop)] and cut.finish == "stop" and cut.tokens < 30
    assert other.text != whole.text


def test_a_chat_is_read_as_its_template_says_and_the_answer_shown_alone(folder, capsys):
    tokenizer = load_tokenizer(str(folder))
    fed = tokenizer("<s>[user]abc</s>", add_special_tokens=False, return_tensors="pt")["input_ids"]
    model = load_model(str(folder), dtype="float32")
    out = model.generate(fed, attention_mask=torch.ones_like(fed), max_new_tokens=5, do_sample=False)
    with context_of(folder) as context:
        found = generate(context, None, "abc", max_new_tokens=5, chat=True)
        assert capsys.readouterr().out == f"{found.text}\n"
        assert not any("control" in note for note in context.reporter.notes)
        generate(context, None, "abc</s>", max_new_tokens=1, chat=True)
        assert "1 control token(s) are named in the prompt" in context.reporter.notes
    assert found.text == tokenizer.decode(out[0, fed.shape[1] :], skip_special_tokens=True)


def test_an_answer_ends_at_the_tokenizers_own_end(folder, tmp_path):
    """The checkpoint's files name none."""
    with context_of(folder) as context:
        first = generate(context, None, "abc", max_new_tokens=3, chat=True)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.eos_token = first.text[0]
    shutil.copytree(folder, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with context_of(tmp_path / "model") as context:
        ended = generate(context, None, "abc", max_new_tokens=3, chat=True)
        assert (ended.tokens, ended.finish) == (1, "stop")
        assert generate(context, None, "abc", max_new_tokens=3).tokens == 3


def test_what_does_nothing_at_temperature_0_is_said(folder):
    words = "top_p, seed: nothing is drawn at temperature 0; give --temperature to sample"
    with context_of(folder) as context:
        generate(context, None, "abc", max_new_tokens=1, sampling=Sampling(top_p=0.5, seed=2))
        assert words in context.reporter.notes
        context.reporter.notes.clear()
        generate(context, None, "abc", max_new_tokens=1, sampling=Sampling(1.5, 0.7, top_p=0.5, seed=2))
        assert not any("nothing is drawn" in note for note in context.reporter.notes)


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([""], {}, "prompt: must not be empty"),
        (["a", ""], {}, "prompt 2 of 2: must not be empty"),
        (["a\udcff"], {}, "prompt: holds bytes that are no utf-8"),
        (["abc"], {"max_new_tokens": 0}, "max_new_tokens: must be at least 1, got 0"),
        (["abc"], {"stop": ["x", ""]}, "stop: a string that ends the text must not be empty"),
        (
            ["a" * 60],
            {"max_new_tokens": 4},
            "prompt: 61 tokens and 4 new ones exceed the model's 64 positions; shorten",
        ),
        (["a", "a" * 60], {"max_new_tokens": 4}, "prompt 2 of 2: 61 tokens and 4 new ones exceed the model's 64 pos"),
        (["a" * 50], {"max_new_tokens": 8, "chat": True}, "prompt: 58 tokens and 8 new ones exceed the model's 64 pos"),
    ],
)
def test_what_is_refused_is_refused_before_the_model_is_loaded(folder, prompts, options, words, capsys, monkeypatch):
    monkeypatch.setattr(decoding, "load_for", lambda *_: pytest.fail("loaded"))
    with context_of(folder) as context, pytest.raises(ConfigError) as caught:
        generate_each(context, None, prompts, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_no_prompt_is_no_text(folder):
    with context_of(folder) as context, pytest.raises(ConfigError, match="prompts: must hold at least one"):
        generate_each(context, None, [])
