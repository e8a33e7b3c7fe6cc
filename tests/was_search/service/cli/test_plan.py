"""``generate`` and ``bench`` on a small checkpoint with a plan that a few lines make."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from typer.testing import CliRunner

from scripts.make_random_model import make_random_model
from tests.doubles.small_plan import make_plan
from tests.doubles.tiny_models import tiny_model, tiny_plan
from was_kernels import DecodingLoop
from was_kernels.timing import step
from was_search.checkpoints.load import load_model
from was_search.errors import ConfigError, PlanError
from was_search.service.cli.main import app
from was_search.service.cli.plan import load_plan
from was_search.service.steps.demonstration import DEMO_FOLDER, demo_settings

run = CliRunner().invoke


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text that is soon in tokens."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text((DEMO_FOLDER / "text" / "test.txt").read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    return make_plan(tmp_path_factory.mktemp("decode") / "plan", data=text)


@pytest.fixture(scope="module")
def rounded_plan(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    return make_plan(tmp_path_factory.mktemp("decode") / "rounded", "int4", data=text)


@pytest.fixture(scope="module", autouse=True)
def bandwidth() -> Iterator[None]:
    """The memory's is measured once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "read_bandwidth", cache(step.read_bandwidth))
        yield


def result_of(output: str) -> dict:
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return next(line for line in lines if line["event"] == "result")


def test_bench_times_dense_beside_the_plan(plan):
    found = run(app, ["bench", "--plan", str(plan), "--kv-length", "40", "--steps", "6", "--device", "cpu", "--json"])
    assert found.exit_code == 0, found.output
    result = result_of(found.output)
    dense, sparse = result["rows"]
    assert (dense["name"], sparse["name"]) == ("dense", "plan")
    assert dense["sparsity"] == 0.0 and dense["live_channels"] is None
    assert 0.3 < sparse["sparsity"] < 0.7
    assert sparse["read_bytes"] < 0.8 * dense["read_bytes"]
    for row in result["rows"]:
        assert 0.0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["tokens_per_s"] == pytest.approx(1e3 / row["p50_ms"])
        assert row["read_bytes"] == row["weight_bytes"] + row["cache_bytes"]
        assert min(row["loop_tokens_per_s"], row["generate_tokens_per_s"]) > 0.0
        assert row["limit_ms"] == pytest.approx(1e3 * row["read_bytes"] / result["bandwidth_bytes_per_s"])
    assert result["backend"] == "cpu, 4 of 4 blocks fused"


def test_bench_prints_a_table(plan):
    found = run(app, ["bench", "--plan", str(plan), "--batch", "1,2", "--kv-length", "32,64", "--steps", "3"])
    assert found.exit_code == 0, found.output
    for case in ("1 row, 32 positions", "1 row, 64 positions", "2 rows, 32 positions", "2 rows, 64 positions"):
        assert f"One decode step, {case} in the cache" in found.output
    assert found.output.count("Tokens a second, of all rows") == 1 and "decoding loop" in found.output
    said = " ".join(found.output.split())
    ends = re.findall(r"by the bytes read, (\d) rows?: a plan's step is under 1.1x as fast from about (\d+)", said)
    assert [rows for rows, _ in ends] == ["1", "2"] and int(ends[0][1]) > int(ends[1][1]) > 100
    assert "live" in found.output and "Tokens a second" in found.output
    assert "keep every channel" not in found.output


def test_bench_says_when_nothing_is_skipped_for_the_rows(plan):
    given = ["bench", "--plan", str(plan), "--batch", "9", "--kv-length", "32", "--steps", "1", "--device", "cpu"]
    found = run(app, given)
    assert found.exit_code == 0, found.output
    assert "steps of more than 8 rows keep every channel" in " ".join(found.output.split())
    found = run(app, [*given, "--json"])
    dense, sparse = result_of(found.output)["rows"]
    assert sparse["sparsity"] == 0.0
    assert sparse["read_bytes"] == dense["read_bytes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "batch: must be at least 1, got 0"),
        (["--kv-length", "8"], "kv_length: must be at least 32, got 8"),
        (["--steps", "0"], "steps: must be at least 1"),
        (["--batch", "1,x"], "batch: must be whole numbers separated by commas, got '1,x'"),
        (["--kv-length", ""], "kv_length: must be whole numbers separated by commas, got ''"),
        (["--kv-length", "64,16"], "kv_length: must be at least 32, got 16"),
        (["--kv-length", "64,9000"], "kv_length: 9000 and 50 steps exceed the model's"),
        (["--batch", "4000"], "tokens of test text, there are"),
    ],
)
def test_bench_refuses(plan, options, message):
    found = run(app, ["bench", "--plan", str(plan), *options])
    assert isinstance(found.exception, ConfigError)
    assert message in str(found.exception)


def test_generate_counts_what_was_skipped(plan):
    given = ["generate", "--plan", str(plan), "--prompt", "def area(radius):\n", "--max-new-tokens", "40", "--json"]
    found = run(app, given)
    assert found.exit_code == 0, found.output
    result = result_of(found.output)
    assert result["tokens"] == 40
    assert 0.3 < result["achieved"] < 0.7


PROMPT = "def read_lines(path):\n"


def test_generate_shows_each_text_and_its_figures(plan):
    given = ["generate", "--plan", str(plan), "--device", "cpu", "--max-new-tokens", "12"]
    found = run(app, [*given, "--prompt", PROMPT, "--prompt", "-", "--stop", "):"], input="class Naïve🙂\n")
    assert found.exit_code == 0, found.output
    loaded, *texts = found.output.split("[prompt ")
    assert "load the model on cpu, float32" in loaded and "\x1b" not in found.output
    for text, begins in zip(texts, (f"1 of 2]\n{PROMPT}", "2 of 2]\nclass Naïve🙂"), strict=True):
        assert text.startswith(begins)
        assert re.search(r"\n1?\d tokens in \S+ s, the first after \S+ s, then \S+ tokens/s, \S+ % of weights", text)
    quiet = run(app, [*given, "--prompt", PROMPT, "-q"]).output
    result = result_of(run(app, [*given, "--prompt", PROMPT, "--json"]).output)
    assert quiet == f"{PROMPT}{result['text']}\n"


def test_generate_gives_programs_a_result_for_each_prompt(plan):
    given = ["generate", "--device", "cpu", "--model", demo_settings().model, "--max-new-tokens", "8", "--json"]
    drawn = ["--temperature", "1.5", "--top-k", "40", "--top-p", "0.9", "--repetition-penalty", "1.2"]
    outputs = [
        [json.loads(line) for line in run(app, [*given, *drawn, *more]).output.splitlines()]
        for more in (["--prompt", "a", "--prompt", PROMPT, "--seed", "3"], ["--prompt", PROMPT, "--seed", "4"])
    ]
    assert all(line["event"] in ("phase", "note", "result") for lines in outputs for line in lines)
    results = [[line for line in lines if line["event"] == "result"] for lines in outputs]
    assert [[one["prompt"] for one in some] for some in results] == [["a", PROMPT], [PROMPT]]
    assert results[0][1]["text"] != results[1][0]["text"]
    assert {one["finish"] for some in results for one in some} == {"length"}


def test_a_text_that_is_interrupted_ends_its_line(plan, monkeypatch):
    ordinary = DecodingLoop.stream

    def pressed(*arguments, **options):
        steps = ordinary(*arguments, **options)
        yield from itertools.islice(steps, 8)
        raise KeyboardInterrupt

    monkeypatch.setattr(DecodingLoop, "stream", pressed)
    given = ["generate", "--plan", str(plan), "--device", "cpu", "--prompt", PROMPT, "--max-new-tokens", "40"]
    found = run(app, given)
    assert found.exit_code == 130 and "Traceback" not in found.output
    _, text = found.stdout.split(PROMPT)
    assert text.strip() and text.endswith("\n") and "tokens/s" not in text
    assert found.stderr.startswith("interrupted; go on with\n")
    found = run(app, [*given, "--json"])
    assert found.exit_code == 130
    assert [json.loads(line)["event"] for line in found.stdout.splitlines()] == ["phase", "phase"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--temperature", "-1"], "temperature: must be a number from 0 on, got -1.0"),
        (["--temperature", "nan"], "temperature: must be a number from 0 on, got nan"),
        (["--top-p", "0"], "top_p: must be over 0 and at most 1, got 0.0"),
        (["--top-k", "-1"], "top_k: must be a whole number from 0 on, got -1"),
        (["--repetition-penalty", "0"], "repetition_penalty: must be from 0.001 to 1000, got 0.0"),
        (["--seed", "-1"], "seed: must be a whole number from 0 to 2^63 - 1, got -1"),
        (["--stop", ""], "stop: a string that ends the text must not be empty"),
        (["--prompt", ""], "prompt 2 of 2: must not be empty"),
        (["--prompt", "-"], "prompt: standard input is no text in UTF-8 (byte 1); convert it"),
        (["--prompt", "a " * 2000], "new ones exceed the model's 1024 positions; shorten it"),
        (
            ["--max-new-tokens", "2000"],
            "2000 new ones exceed the model's 1024 positions; shorten it, or give a smaller",
        ),
        (["--chat"], "chat: the model's tokenizer has no chat template; give a plain prompt (without --chat)"),
    ],
)
def test_generate_refuses(plan, options, words):
    given = ["generate", "--plan", str(plan), "--device", "cpu", "--prompt", "x", *options]
    found = run(app, given, input=b"a\xff")
    assert isinstance(found.exception, ConfigError), found.output
    assert words in str(found.exception) and "\n" not in str(found.exception)
    assert found.stdout == ""


def test_over_several_gpus_the_text_and_the_figures_are_the_same(plan, monkeypatch):
    """There is one CPU here: accelerate's hooks are on the blocks, what they move stays where it is."""
    import was_search.checkpoints.load as model_module

    prompt = ["generate", "--plan", str(plan), "--prompt", "def area(radius):\n", "--max-new-tokens", "12", "--json"]
    text = ["evaluate", "--plan", str(plan), "--test-sequences", "8", "--json"]
    alone = [result_of(run(app, arguments).output) for arguments in (prompt, text)]
    asked: list[int] = []
    ordinary = model_module.load_model

    def spread(source, *, dtype, device, weights, gpus):
        asked.append(gpus)
        model = ordinary(source, dtype=dtype, device=device, weights=weights)
        parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
        parts += [f"model.layers.{i}" for i in range(len(model.model.layers))]
        return dispatch_model(model, dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True)

    monkeypatch.setattr(model_module, "load_model", spread)
    hooked = [result_of(run(app, [*arguments, "--gpus", "2"]).output) for arguments in (prompt, text)]
    assert asked == [2, 2]
    assert hooked[0]["text"] == alone[0]["text"]
    assert hooked[0]["achieved"] == alone[0]["achieved"]
    assert hooked[1] == alone[1]


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["evaluate"]])
def test_several_gpus_need_several_gpus(plan, command):
    found = run(app, [*command, "--plan", str(plan), "--device", "cpu", "--gpus", "2"])
    assert isinstance(found.exception, ConfigError)
    assert "gpus: must be 1 with --device cpu, got 2" in str(found.exception)


def test_generate_with_rounded_weights(rounded_plan):
    given = ["generate", "--plan", str(rounded_plan), "--prompt", "def area(radius):\n", "--max-new-tokens", "8"]
    found = run(app, [*given, "--json"])
    assert found.exit_code == 0, found.output
    assert 0.3 < result_of(found.output)["achieved"] < 0.7
    found = run(app, [*given, "--weights", "none"])
    assert isinstance(found.exception, PlanError)
    assert "plan is for int4 weights in groups of 128 outputs (int4:128), the model has weights as stored" in str(
        found.exception
    )


def test_bench_compares_rounded_weights_with_those_stored(rounded_plan):
    given = ["bench", "--plan", str(rounded_plan), "--kv-length", "32", "--steps", "3", "--device", "cpu", "--json"]
    found = run(app, given)
    assert found.exit_code == 0, found.output
    dense, sparse = result_of(found.output)["rows"]
    assert (dense["name"], sparse["name"]) == ("dense", "plan, int4:128")
    assert sparse["read_bytes"] < 0.5 * dense["read_bytes"]  # the head is the same in both


def test_evaluate_shows_the_weights_as_stored_beside(rounded_plan):
    found = run(app, ["evaluate", "--plan", str(rounded_plan), "--device", "cpu", "--json"])
    assert found.exit_code == 0, found.output
    result = result_of(found.output)
    assert list(result["weights"]) == ["none", "int4:128"]
    stored, rounded = result["weights"].values()
    assert stored["protocol"]["weights"] == "none" and rounded["protocol"]["weights"] == "int4:128"
    assert result["plan"] == rounded["plan"] and result["dense"] == rounded["dense"]
    assert stored["dense"]["loss_nats"] != rounded["dense"]["loss_nats"]
    assert abs(stored["dense"]["loss_nats"] - rounded["dense"]["loss_nats"]) < 0.1
    assert stored["plan"]["achieved_sparsity"] == pytest.approx(rounded["plan"]["achieved_sparsity"], abs=0.03)


def test_evaluate_compares_formats(plan):
    found = run(app, ["evaluate", "--plan", str(plan), "--device", "cpu", "--weights", "none,int8,int4:32"])
    assert found.exit_code == 0, found.output
    shown = " ".join(found.output.split())
    stored = ("difference to", "dense, weights as stored, 95 %", "calibrated for weights as stored")
    for text in ("int8:128 weights", "int4:32 weights", *stored):
        assert text in shown
    assert "none weights" not in shown
    found = run(app, ["evaluate", "--plan", str(plan), "--device", "cpu", "--weights", "int3"])
    assert isinstance(found.exception, ConfigError)
    assert "weights: must be none, int8 or int4" in str(found.exception)


def test_a_protocol_names_rounded_weights():
    from was_search.service.context import Context
    from was_search.service.token_sets import tokens_here

    with Context(demo_settings(weights="int4", device="cpu")) as context:
        words = tokens_here(context, "test").protocol.describe()
    assert "float32, int4 weights in groups of 128 outputs, batch 8" in words


def test_cache_keys_tell_formats_apart():
    from was_search.service.context import Context

    keys = set()
    for weights in ("none", "int8", "int4", "int4:64", "int4:128"):
        with Context(demo_settings(weights=weights, device="cpu")) as context:
            keys.add(context.model.key)
    assert len(keys) == 4  # int4 is int4:128


def test_a_prompt_that_is_no_text_is_refused(plan):
    found = run(app, ["generate", "--plan", str(plan), "--prompt", "a\udcffb", "--device", "cpu"])
    assert isinstance(found.exception, ConfigError)
    assert "prompt: holds bytes that are no" in str(found.exception)


def test_losses_of_more_than_700_nats(tmp_path):
    """Such a perplexity is no number: the table says inf, JSON null."""
    made = make_random_model(tmp_path / "tiny", "tiny")
    model = load_model(str(made), dtype="float32")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    model.save_pretrained(made)
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven\n" * 400)
    given = ["evaluate", "--model", str(made), "--data", str(text), "--sequence-length", "32", "--test-sequences", "4"]
    shown = run(app, [*given, "--device", "cpu"])
    assert shown.exit_code == 0 and " inf " in shown.output, shown.output
    found = run(app, [*given, "--device", "cpu", "--json"])
    last = [json.loads(line, parse_constant=pytest.fail) for line in found.output.splitlines()][-1]
    assert last["dense"]["loss_nats"] > 700 and last["dense"]["perplexity"] is None


@pytest.mark.parametrize("settings", [{"data": 5}, {"sequence_length": "long"}, {"batch_size": 0}, {"device": "tpu"}])
def test_damaged_settings_of_a_plan_are_the_plans(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Before, ``data: must be text, got 5`` beside a ``--data`` that was text."""
    plan = dataclasses.replace(tiny_plan(tiny_model()), provenance={"settings": settings})
    folder = plan.save(tmp_path / "plan")
    with pytest.raises(PlanError, match=r"plan\.json: the settings that it was made with are damaged: \w+: must be"):
        load_plan(folder)
