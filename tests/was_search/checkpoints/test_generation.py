"""What a checkpoint wishes of ``generate``, and what of it reaches greedy decoding: the ids of special tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.make_random_model import make_random_model
from was_search.checkpoints.files import resolve_model
from was_search.checkpoints.generation import special_ids
from was_search.checkpoints.load import load_model
from was_search.errors import ModelError
from was_search.service.context import Context
from was_search.service.settings import Settings
from was_search.service.steps.decoding import generate

PROMPT = torch.tensor([[5, 9, 17, 30]])
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

WISHES: dict[str, Any] = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "stop_strings": ["e"],
    "cache_implementation": "quantized",
    "cache_config": {"backend": "hqq"},
    "max_time": 1e-9,
    "num_beams": 3,
    "num_return_sequences": 2,
    "repetition_penalty": 1.9,
    "encoder_repetition_penalty": 1.9,
    "no_repeat_ngram_size": 1,
    "exponential_decay_length_penalty": [1, 3.0],
    "forced_eos_token_id": 3,
    "forced_bos_token_id": 3,
    "suppress_tokens": list(range(100)),
    "begin_suppress_tokens": list(range(100)),
    "bad_words_ids": [[i] for i in range(100)],
    "sequence_bias": [[[7], 100.0]],
    "guidance_scale": 4.0,
    "watermarking_config": {"bias": 50.0},
    "penalty_alpha": 0.6,
    "constraints": [1],
    "force_words_ids": [[3]],
    "dola_layers": "low",
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "use_mtp": True,
    "token_healing": True,
    "is_assistant": True,
    "use_cache": False,
    "min_new_tokens": 30,
    "max_length": 5,
    "do_sample": True,
    "temperature": 9.0,
    "early_stopping": "whenever",
    "custom_generate": ".",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("made") / "tiny", "tiny")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink(missing_ok=True)
    return tmp_path / "model"


@pytest.fixture(scope="module")
def unwished(made: Path, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """What greedy decoding gives where the files hold nothing but ids."""
    folder = shutil.copytree(made, tmp_path_factory.mktemp("plain") / "model")
    wish(folder, "generation_config.json", **IDS)
    return decoded(load_model(str(folder), dtype="float32"))


def wish(folder: Path, where: str, **values: Any) -> None:
    path = folder / where
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **values}))


def decoded(model: Any) -> list[int]:
    with torch.inference_mode():
        return model.generate(PROMPT, max_new_tokens=12, do_sample=False, use_cache=True)[0].tolist()


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("key", WISHES)
def test_a_wish_does_not_reach_a_loaded_model(folder, unwished, key, where):
    wish(folder, where, **IDS, **{key: WISHES[key]}, **({"top_k": 4} if key == "penalty_alpha" else {}))
    model = load_model(str(folder), dtype="float32")
    told = {name: value for name, value in model.generation_config.to_dict().items() if value is not None}
    assert told.keys() - {"transformers_version", "_from_model_config"} == IDS.keys()
    assert decoded(model) == unwished


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_the_command_obeys_its_own_options(folder, where):
    """All at once, by the step that the command calls."""

    def text() -> str:
        settings = Settings(model=str(folder), data="unused", device="cpu", dtype="float32")
        with Context(settings) as context:
            return generate(context, None, "one two three", max_new_tokens=9).text

    expected = text()
    wish(folder, where, **WISHES)
    assert text() == expected


def test_the_text_ends_at_the_checkpoints_own_ids(folder):
    third = decoded(load_model(str(folder), dtype="float32"))[PROMPT.shape[1] + 2]
    for ids in (third, [96, third]):
        wish(folder, "generation_config.json", eos_token_id=ids)
        assert decoded(load_model(str(folder), dtype="float32"))[PROMPT.shape[1] :][-1] == third


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        ({"eos_token_id": 7, "pad_token_id": -1}, (None, 7, None)),
        ({"bos_token_id": None, "eos_token_id": [7, 8]}, (None, [7, 8], None)),
        ({"eos_token_id": []}, (None, None, None)),
    ],
)
def test_ids_are_read_from_the_file(folder, stored, found):
    (folder / "generation_config.json").write_text(json.dumps(stored))
    assert tuple(special_ids(resolve_model(str(folder))).values()) == found


def test_without_the_file_ids_come_from_the_configuration(folder):
    for values in ({**IDS, "text_config": {"eos_token_id": 9}}, {"eos_token_id": None, "text_config": {**IDS}}):
        wish(folder, "config.json", **values)
        assert special_ids(resolve_model(str(folder)))["eos_token_id"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[]", "must hold a JSON object, got list"),
        ("null", "must hold a JSON object, got NoneType"),
        ('{"eos_token_id": "</s>"}', "eos_token_id must be a token's id, got '</s>'"),
        ('{"eos_token_id": [2, "x"]}', "eos_token_id must be a token's id"),
        ('{"eos_token_id": true}', "eos_token_id must be a token's id, got 'True'"),
        ('{"pad_token_id": [0]}', "pad_token_id must be a token's id"),
        ('{"bos_token_id": 1.5}', "bos_token_id must be a token's id"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(folder, text, message):
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"generation_config\.json") as caught:
        load_model(str(folder), dtype="float32")
    assert message in str(caught.value) and "\n" not in str(caught.value)
