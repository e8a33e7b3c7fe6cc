"""A hostile checkpoint through every command that opens one: refused at once, in the same words, in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.doubles.profiles import synthetic_profile
from tests.doubles.random_checkpoint import random_checkpoint
from tests.security.bounded import bounded
from was_search.service.cli import main
from was_search.service.steps.demonstration import DEMO_FOLDER
from was_search.shape import ModelShape

SECONDS = 60
"""For one command. Each takes about one; what is not refused would keep it for hours or take all memory."""

COMMANDS: dict[str, list[str]] = {
    "calibrate": ["calibrate", "DATA"],
    "seed": ["seed", "DATA"],
    "search": ["search", "DATA"],
    "search by time": ["search", "DATA", "--target-speedup", "1.5", "PROFILE"],
    "search with a profile": ["search", "DATA", "PROFILE"],
    "run": ["run", "DATA"],
    "run by time": ["run", "DATA", "--target-speedup", "1.5", "PROFILE"],
    "run at several targets": ["run", "DATA", "--targets", "0.4,0.5"],
    "run at several speeds": ["run", "DATA", "--target-speedups", "1.5,1.8", "PROFILE"],
    "run within a limit": ["run", "DATA", "--max-ppl-increase", "5%"],
    "export": ["export", "DATA"],
    "export by time": ["export", "DATA", "--target-speedup", "1.5", "PROFILE"],
    "export with weights": ["export", "DATA", "--with-weights"],
    "export between studies": ["export", "DATA", "--interpolate"],
    "evaluate": ["evaluate", "DATA"],
    "evaluate rounded": ["evaluate", "DATA", "--weights", "int8"],
    "generate": ["generate", "--prompt", "x"],
    "bench": ["bench", "TEXT"],
    "profile": ["profile"],
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_hidden_layers": 3_000_000}, "num_hidden_layers: at most 100000 is taken for possible, got 3e+06"),
    "layers as a float": ({"num_hidden_layers": 3e6}, "num_hidden_layers: at most 100000 is taken for possible"),
    "layers beyond floats": ({"num_hidden_layers": 10**400}, "num_hidden_layers: at most 100000 is taken for possible"),
    "layers of the text": ({"text_config": {"num_hidden_layers": 3_000_000}}, "num_hidden_layers: at most 100000"),
    "layers in a list": ({"stages": [{"num_layers": 3_000_000}]}, "num_layers: at most 100000 is taken for possible"),
    "more layers than tensors": ({"num_hidden_layers": 50_000}, "the configuration has 50000 layers, the weights are"),
    "width": ({"hidden_size": 2**40}, "the configuration describes|no model can be made of its configuration"),
    "vocabulary": ({"vocab_size": 10**13}, "the configuration describes|no model can be made of its configuration"),
    "heads": ({"num_attention_heads": 10**12}, "num_attention_heads: at most 100000 is taken for possible, got 1e+12"),
    "kernels": ({"attn_implementation": "evil/attention"}, "names code on the hub, which is never run"),
    "kernels of the text": ({"text_config": {"_attn_implementation": "a/b"}}, "names code on the hub, which is never"),
    "remote code": (
        {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}},
        "needs code of its own, which is never run",
    ),
    "no language model": ({"model_type": "clip"}, "is a clip model, not a causal language model"),
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised by 'gptq', 4 bits"),
}


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_profile(ModelShape(((8,) * 7,), ((8,) * 7,))).save(
        tmp_path_factory.mktemp("profile") / "profile.json"
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged texts' beginnings, which are soon in tokens."""
    folder = tmp_path_factory.mktemp("texts")
    for path in (DEMO_FOLDER / "text").glob("*.txt"):
        (folder / path.name).write_text(path.read_text(encoding="utf-8")[:40_000], encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return random_checkpoint(tmp_path / "model")


@pytest.mark.postgres
@pytest.mark.parametrize("hostile", REFUSED)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_it_at_once(
    command: str,
    hostile: str,
    folder: Path,
    profile: Path,
    texts: Path,
    postgres_url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values, words = REFUSED[hostile]
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 4096  # the default length fits
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    monkeypatch.setattr("was_workers.cluster.connect", lambda *_, **__: pytest.fail("Ray was started"))
    monkeypatch.setenv("WAS_SEARCH_STORAGE", postgres_url)
    monkeypatch.chdir(tmp_path)
    text = ["--data", str(texts)]
    stand_ins = {"TEXT": text, "DATA": [*text, "--sequence-length", "32"], "PROFILE": ["--profile", str(profile)]}
    name, *rest = COMMANDS[command]
    arguments = [word for given in rest for word in stand_ins.get(given, [given])]
    arguments += ["--model", str(folder), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["was-search", name, *arguments])
    with bounded(SECONDS), pytest.raises(SystemExit) as end:
        main.main()
    printed = " ".join(capsys.readouterr().err.split())
    assert end.value.code == 1, printed
    assert "Traceback" not in printed
    # A plan needs a study, and looking for one reads no more of the checkpoint than its configuration.
    expected = [*words.split("|"), *(["no study of this model", "does not exist"] if name == "export" else [])]
    assert any(each in printed for each in expected), printed
    assert not (tmp_path / "ran").exists()
