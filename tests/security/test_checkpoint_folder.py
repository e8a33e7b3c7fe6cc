"""Checkpoints from a stranger: pickles, code, kernels and adapters of others, names that lead out, absurd sizes."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tests.doubles.random_checkpoint import random_checkpoint
from tests.security.bounded import bounded
from was_search.checkpoints.files import resolve_model
from was_search.checkpoints.fingerprint import fingerprint
from was_search.checkpoints.load import load_model, load_tokenizer
from was_search.errors import ModelError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return random_checkpoint(tmp_path / "model")


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """Appears where code of the checkpoint was run."""
    return tmp_path / "ran"


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.ran}",))


def change(folder: Path, name: str = "config.json", **values: Any) -> None:
    path = folder / name
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **values}))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00001.bin"])
def test_pickled_weights_are_never_opened(folder: Path, ran: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(Payload(ran)))
    torch.save({"x": Payload(ran)}, folder / "training_args.bin")
    index = {"weight_map": {"lm_head.weight": name}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert isinstance(load_model(str(folder), dtype="float32"), LlamaForCausalLM)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        load_model(str(folder), dtype="float32")
    # Renamed, it is still no safetensors file.
    (folder / name).rename(folder / "model.safetensors")
    with pytest.raises(ModelError, match="damaged or truncated"):
        load_model(str(folder), dtype="float32")
    assert not ran.exists()


def test_code_beside_the_weights_is_not_run(folder: Path, ran: Path) -> None:
    code = f"open({str(ran)!r}, 'w')\nclass Own: pass\ndef generate(*a, **k): pass\n"
    for name in ("modeling_own.py", "tokenization_own.py", "configuration_own.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    change(
        folder,
        auto_map={"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"},
        trust_remote_code=True,
    )
    change(
        folder,
        "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"]},
        trust_remote_code=True,
    )
    change(folder, "generation_config.json", custom_generate=".", trust_remote_code=True)
    assert isinstance(load_model(str(folder), dtype="float32"), LlamaForCausalLM)
    load_tokenizer(str(folder))
    assert not ran.exists()
    change(folder, "tokenizer_config.json", tokenizer_class="OwnTokenizer")
    change(folder, model_type="own")
    with pytest.raises(ModelError, match="needs code of its own, which is never run"):
        load_model(str(folder), dtype="float32")
    with contextlib.suppress(ModelError):  # refused, or read by a class of transformers
        load_tokenizer(str(folder))
    assert not ran.exists()


@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": "evil/attention"},
        {"_attn_implementation": "evil/attention@main:forward"},
        {"_attn_implementation_internal": {"": "paged|evil/attention"}},
        {"_experts_implementation": "evil/experts"},
        {"text_config": {"attn_implementation": "evil/attention"}},
    ],
)
def test_kernels_of_others_are_refused(folder: Path, values: dict[str, Any]) -> None:
    change(folder, **values)
    with pytest.raises(ModelError, match="names code on the hub, which is never run"):
        load_model(str(folder), dtype="float32")


def test_an_adapter_leads_to_no_other_model(folder: Path) -> None:
    change(folder, "adapter_config.json", base_model_name_or_path="evil/model", peft_type="LORA")
    with pytest.raises(ModelError, match="holds an adapter beside a model"):
        load_model(str(folder), dtype="float32")


@pytest.mark.parametrize(
    "name",
    [
        "../outside/model.safetensors",
        "../../../../../../etc/passwd",
        "/etc/passwd",
        "sub/model.safetensors",
        "pytorch_model.bin",
        "..",
        "",
        "model.safetensors\0.bin",
        "https://evil/model.safetensors",
    ],
)
def test_an_index_leads_to_no_other_file(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").mkdir()
    (folder / "sub").mkdir()
    weights = load_file(folder / "model.safetensors")
    for place in (tmp_path / "outside", folder / "sub"):
        save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for act in (resolve_model, lambda path: load_model(path, dtype="float32"), load_tokenizer):
        with pytest.raises(ModelError, match=r"names .* as weights; only safetensors files of the folder are read"):
            act(str(folder))


def test_the_fingerprint_follows_no_index_out_of_the_folder(folder: Path) -> None:
    source = resolve_model(str(folder))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "/etc/passwd"}}))
    with pytest.raises(ModelError, match="only safetensors files of the folder"):
        fingerprint(source)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: at most 100000"),
        ({"num_hidden_layers": 50_000}, "has 50000 layers, the weights are"),
        ({"num_labels": 10**9}, "num_labels: at most"),
        ({"num_attention_heads": 10**12}, "num_attention_heads: at most"),
        ({"hidden_size": 2**40}, "describes|no model can be made"),
        ({"hidden_size": 10**30}, "no model can be made|not valid"),
        ({"vocab_size": 10**13}, "describes|no model can be made"),
        ({"intermediate_size": 10**12}, "describes|no model can be made"),
        ({"head_dim": 10**11}, "describes|no model can be made"),
        ({"num_attention_heads": 0}, "not valid|no model can be made|cannot be loaded"),
        ({"num_hidden_layers": 9}, "describes .* weights, the files hold"),
    ],
)
def test_absurd_sizes_take_no_memory(folder: Path, values: dict[str, Any], words: str) -> None:
    change(folder, **values)
    with bounded(), pytest.raises(ModelError, match=words) as caught:
        load_model(str(folder), dtype="float32")
    assert not isinstance(caught.value.__cause__, MemoryError | TimeoutError)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_nested_too_deep_or_too_long(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_text("[" * 200_000)
    with pytest.raises(ModelError, match=r"cannot be read"):
        resolve_model(str(folder))
    with (folder / name).open("w") as file:
        file.truncate(1 << 36)  # takes no room on the disk
    with pytest.raises(ModelError, match="larger than"):
        resolve_model(str(folder))


def test_a_header_that_is_longer_than_the_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match="damaged or truncated"):
        resolve_model(str(folder))


def test_quantised_weights_are_refused_before_they_are_loaded(folder: Path) -> None:
    change(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(
        ModelError, match=r"is quantised by 'gptq', 4 bits: .* round it here with --weights int8 or int4"
    ):
        load_model(str(folder), dtype="float32")
