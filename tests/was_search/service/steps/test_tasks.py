"""lm-eval on tiny models: its figures against log-likelihoods computed directly. Skipped without the extra."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml

from was_search.checkpoints.load import load_model, load_tokenizer
from was_search.errors import ConfigError, DataError, ModelError, ResourceError
from was_search.service.steps.tasks import TaskResult, _manager, evaluate_tasks

pytest.importorskip("lm_eval", reason="the optional extra 'tasks' is not installed")

DOCUMENTS = [
    {"question": f"Question {i} of {['a', 'bb', 'ccc'][i % 3]}:", "choices": choices, "answer": i % len(choices)}
    for i, choices in enumerate([["yes", "no"], ["one", "two hundred", "3"], ["é", "longer words", "x y z"]] * 4)
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = Path(__file__).parents[4] / "scripts" / "make_random_model.py"
    spec = importlib.util.spec_from_file_location("make_random_model", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return str(script.make_random_model(tmp_path_factory.mktemp("made"), "tiny"))


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """What datasets makes of the local files goes into the test's folder."""
    import datasets.config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two multiple-choice tasks, a group of both, and a task without its data."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, documents in (("was_first", DOCUMENTS), ("was_second", DOCUMENTS[:5])):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            "metadata": {"version": 1},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    lost = {**task, "task": "was_lost", "dataset_kwargs": {"data_files": {"test": str(folder / "nowhere.jsonl")}}}
    (folder / "was_lost.yaml").write_text(yaml.safe_dump(lost))
    group = {
        "group": "was_both",
        "task": ["was_first", "was_second"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (folder / "was_both.yaml").write_text(yaml.safe_dump(group))
    return folder


def log_likelihood(model, tokenizer, context, continuation):
    """Sum of log-probabilities of the continuation's tokens, one sequence at a time."""
    prefix = tokenizer(context)["input_ids"]
    ids = prefix + tokenizer(continuation, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logs[i - 1, ids[i]].item() for i in range(len(prefix), len(ids)))


def expected_accuracies(model, tokenizer, documents):
    plain, normalised = [], []
    for document in documents:
        logs = [log_likelihood(model, tokenizer, document["question"], f" {c}") for c in document["choices"]]
        per_byte = [log / len(choice.encode()) for log, choice in zip(logs, document["choices"], strict=True)]
        for kept, scores in ((plain, logs), (normalised, per_byte)):
            kept.append(float(max(range(len(scores)), key=scores.__getitem__) == document["answer"]))
    return plain, normalised


def standard_error(values):
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_accuracies_are_those_of_the_log_likelihoods(model, tokenizer, folder, batch_size):
    found = evaluate_tasks(model, tokenizer, ["was_first"], include_path=folder, batch_size=batch_size)
    plain, normalised = expected_accuracies(model, tokenizer, DOCUMENTS)
    by_metric = {result.metric: result for result in found}
    assert set(by_metric) == {"acc", "acc_norm"}
    for metric, values in (("acc", plain), ("acc_norm", normalised)):
        result = by_metric[metric]
        assert (result.task, result.n) == ("was_first", len(DOCUMENTS))
        assert result.value == pytest.approx(sum(values) / len(values))
        assert result.stderr == pytest.approx(standard_error(values))
    assert 0 < sum(plain) < len(plain)  # else nothing was tested


def test_a_text_with_a_token_that_the_model_has_no_row_for(model, tokenizer, folder):
    import copy

    wider = copy.deepcopy(tokenizer)
    wider.add_tokens(["Question"])
    with pytest.raises(ModelError, match=r"gives id 258 \('Question'\) in a task's text, the model has 258 rows"):
        evaluate_tasks(model, wider, ["was_second"], include_path=folder)


def test_the_log_likelihoods_themselves(model, tokenizer, folder, monkeypatch):
    """The numbers that lm-eval ranks by, before it makes accuracies of them."""
    from lm_eval.models.huggingface import HFLM

    seen = {}
    inner = HFLM.loglikelihood

    def record(self, requests, **options):
        answers = inner(self, requests, **options)
        seen.update({request.args: answer[0] for request, answer in zip(requests, answers, strict=True)})
        return answers

    monkeypatch.setattr(HFLM, "loglikelihood", record)
    evaluate_tasks(model, tokenizer, ["was_second"], include_path=folder, batch_size=3)
    pairs = {(d["question"], f" {choice}") for d in DOCUMENTS[:5] for choice in d["choices"]}
    assert set(seen) == pairs
    for pair in pairs:
        # float32 log-softmax over 258 ids, padded batches
        assert seen[pair] == pytest.approx(log_likelihood(model, tokenizer, *pair), abs=1e-3)


def test_the_model_is_used_as_it_is(model, tokenizer, folder):
    """A hook on a projection, like a mask's, changes the figures and stays with the caller."""
    calls = []
    hook = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, args: calls.append(len(args)))
    try:
        evaluate_tasks(model, tokenizer, ["was_second"], include_path=folder)
    finally:
        hook.remove()
    assert calls


@pytest.mark.slow  # lm-eval reads all of its own tasks
def test_limit_and_groups(model, tokenizer, folder):
    found = evaluate_tasks(model, tokenizer, ["was_both"], include_path=folder, limit=3)
    accuracies = {result.task: result for result in found if result.metric == "acc"}
    assert set(accuracies) == {"was_both", "was_first", "was_second"}
    plain, _ = expected_accuracies(model, tokenizer, DOCUMENTS[:3])
    for task, n in (("was_first", 3), ("was_second", 3), ("was_both", 6)):
        assert accuracies[task].value == pytest.approx(sum(plain) / 3)
        assert accuracies[task].n == n


def test_twice_the_same_and_nothing_of_the_callers_is_changed(model, tokenizer, folder, caplog):
    import logging

    level = logging.getLogger("lm_eval").level
    before = tokenizer.pad_token
    tasks = ["was_second", "was_first", "was_second"]
    first, second = (evaluate_tasks(model, tokenizer, tasks, include_path=folder, limit=2) for _ in range(2))
    assert first == second
    assert [result.task for result in first] == ["was_second", "was_second", "was_first", "was_first"]
    assert tokenizer.pad_token == before
    assert logging.getLogger("lm_eval").level == level
    assert not [record for record in caplog.records if record.name.startswith("lm_eval")]
    assert isinstance(first[0], TaskResult)


def test_lm_evals_own_tasks_are_not_read_for_those_of_a_folder(folder):
    own = _manager(["was_first", "was_second"], folder)
    assert set(own.all_tasks) == {"was_first", "was_second", "was_lost", "was_both"}
    assert _manager(["was_second"], folder) is own


@pytest.mark.slow  # as above
def test_an_unknown_task_names_close_ones(model, tokenizer, folder):
    with pytest.raises(ConfigError, match="no task, group or tag 'was_frist'; close names: was_first"):
        evaluate_tasks(model, tokenizer, ["was_frist"], include_path=folder)
    with pytest.raises(ConfigError, match=r"'hellaswagg'; close names: .*hellaswag"):
        evaluate_tasks(model, tokenizer, ["hellaswagg"], include_path=folder)
    with pytest.raises(ConfigError, match="'@@@'; 'lm-eval ls tasks' lists them"):
        evaluate_tasks(model, tokenizer, ["@@@"], include_path=folder)


def test_data_that_cannot_be_loaded(model, tokenizer, folder):
    with pytest.raises(DataError, match=r"tasks: was_lost cannot be loaded .*nowhere\.jsonl.* run once with a network"):
        evaluate_tasks(model, tokenizer, ["was_lost"], include_path=folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "tasks: must name at least one task, got none"),
        ({"limit": 0}, "limit: must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: must be at least 1, got 0"),
        ({"include_path": Path("/no/such/folder")}, "include_path: must be a folder .*, got '/no/such/folder'"),
    ],
)
def test_values_outside_their_range(model, tokenizer, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_tasks(model, tokenizer, **{"tasks": ["was_first"], **options})


def test_without_the_extra(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ResourceError, match=r"tasks: lm-eval or a package .* pip install was-search\[tasks\]"):
        evaluate_tasks(model, tokenizer, ["was_first"])
