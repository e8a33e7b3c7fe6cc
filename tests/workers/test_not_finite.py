"""NaN and overflow while calibrating, pricing and the like: a ModelError that says where and what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.doubles.small_run import environment
from tests.was_search.conftest import VOCABULARY, build_llama
from was_search.coordinator.calls import Call, Held
from was_search.coordinator.model_calls import Calibrate, EvaluateThresholds, FindDenseTop, GreedyBlock, Price
from was_search.errors import ModelError
from was_search.masks.histogram import Histograms
from was_search.service.cli import main
from was_search.service.steps.demonstration import DEMO_FOLDER
from was_search.texts.protocol import EvaluationProtocol, TokenSet
from was_workers.worker import Worker, WorkerSpec

TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (4, 17))
PROTOCOL = EvaluationProtocol(
    data="random.txt",
    data_hash="ab" * 32,
    split="test",
    sequence_length=17,
    stride=17,
    n_sequences=4,
    bos=False,
    dtype="float32",
    batch_size=4,
    dense_prefix=1,
)
DATA = TokenSet(PROTOCOL, TOKENS)
LEVELS = np.full((3, 7, 2), 0.1, np.float32)


@pytest.fixture
def make_worker(tmp_path: Path) -> Callable[..., Worker]:
    """A worker on a checkpoint of three blocks, changed by ``spoil`` before it is saved."""

    def make(spoil: Callable[[torch.nn.Module], object], dtype: str = "float32") -> Worker:
        model = build_llama()
        with torch.no_grad():
            spoil(model)
        model.save_pretrained(tmp_path)
        return Worker(WorkerSpec(str(tmp_path), "", dtype, "cpu", "l2", threads=1))

    return make


def with_a_nan(model: torch.nn.Module) -> None:
    model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")


def with_large_activations(model: torch.nn.Module) -> None:
    """Beyond float16's 65504 between the gated MLP's maps, far within float32's range."""
    model.model.layers[1].mlp.up_proj.weight.mul_(3e3)
    model.model.layers[1].mlp.gate_proj.weight.mul_(3e3)


PHASES: dict[str, Callable[[Histograms], Call[Any]]] = {
    "calibration:": lambda _: Calibrate(Held(DATA), None),
    "calibration under masks:": lambda _: Calibrate(Held(DATA), LEVELS[..., 0]),
    "prices (the gradients of the dense model):": lambda _: Price(DATA, LEVELS),
    "greedy table of block 1:": lambda dense: GreedyBlock(1, Held(DATA), Held(dense), 0.2),
    "predictions of the dense model:": lambda _: FindDenseTop(DATA, 5),
    "loss of the dense model:": lambda _: EvaluateThresholds(DATA, None),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_nan_among_the_weights_is_said_in_every_phase(make_worker, tmp_path: Path, phase: str) -> None:
    worker = make_worker(with_a_nan)
    sound = Histograms(np.ones((3, 7, 1 << 15), np.int64) * (np.arange(1 << 15) < 0x4000))
    with pytest.raises(ModelError) as error:
        worker.run(PHASES[phase](sound))
    message = str(error.value)
    assert message.startswith(f"{phase} {tmp_path} in float32 gives NaN or infinite numbers")
    assert "some of its weights (the first: model.layers.1.mlp.up_proj.weight)" in message
    assert message.endswith("the checkpoint is damaged: get it again")


@pytest.mark.parametrize("phase", [phase for phase in PHASES if "table" not in phase])
def test_an_overflow_says_which_dtype_to_use(make_worker, tmp_path: Path, phase: str) -> None:
    with pytest.raises(ModelError) as error:
        make_worker(with_large_activations, "float16").run(PHASES[phase](None))
    message = str(error.value)
    assert message.startswith(f"{phase} {tmp_path} in float16 gives NaN or infinite numbers; ")
    assert message.endswith("use --dtype bfloat16 or float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_said_to_do_helps(make_worker, dtype: str) -> None:
    worker = make_worker(with_large_activations, dtype)
    dense = worker.run(Calibrate(Held(DATA), None))[0]
    assert dense.finite
    assert worker.run(EvaluateThresholds(DATA, None)).loss_nats > 0


def test_gradients_that_overflow_alone_are_told_of_prices(make_worker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make_worker(lambda model: None, "bfloat16")
    worker.run(Calibrate(Held(DATA), None))
    sums = np.zeros((3, 7, 2))
    sums[2, 6, 1] = np.inf
    monkeypatch.setattr("was_search.coordinator.model_calls.price_sums", lambda *args, **options: (sums, 64))
    with pytest.raises(
        ModelError, match=r"^prices .* in bfloat16 .*; it needs more range or digits: use --dtype float32$"
    ):
        worker.run(Price(DATA, LEVELS))


def test_float32_without_a_bad_weight_has_nothing_wider(make_worker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make_worker(lambda model: None)
    monkeypatch.setattr(
        "was_search.coordinator.model_calls.price_sums", lambda *args, **options: (np.full((3, 7, 2), np.nan), 64)
    )
    with pytest.raises(ModelError, match=r"float32 has the widest range there is: check the checkpoint"):
        worker.run(Price(DATA, LEVELS))


def damaged_demo(folder: Path) -> Path:
    """The packaged checkpoint with one weight that is no number."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(DEMO_FOLDER / "model", dtype=torch.float32)
    with torch.no_grad():
        with_a_nan(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_FOLDER / "model").save_pretrained(folder)
    return folder


def words(command: str, model: Path, *options: str) -> list[str]:
    text = str(DEMO_FOLDER / "text")
    return ["was_search", command, "--model", str(model), "--data", text, "--sequence-length", "64", *options]


@pytest.mark.ray
@pytest.mark.postgres
@pytest.mark.slow
def test_calibration_ends_with_one_line_and_is_not_repeated(postgres_url: str, tmp_path: Path) -> None:
    small = ["--calibration-sequences", "4", "--device", "cpu", "--ray", "local", "--workers", "1"]
    storage = ["--storage", postgres_url, "--log-format", "text"]
    typed = words("calibrate", damaged_demo(tmp_path / "model"), *small, *storage)
    env = {**os.environ, **environment()}
    done = subprocess.run([sys.executable, "-m", *typed], capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: calibration: {tmp_path / 'model'} in float32 gives NaN")
    assert line.endswith("the checkpoint is damaged: get it again")
    assert "Traceback" not in done.stderr
    assert "lost" not in done.stderr and "quarantine" not in done.stderr


def test_evaluating_says_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    few = ["--test-sequences", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", words("evaluate", damaged_demo(tmp_path / "model"), *few))
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 1
    printed = capsys.readouterr().err
    assert "error: loss of the dense model: model in float32 gives NaN or infinite numbers" in printed
    assert "Traceback" not in printed
