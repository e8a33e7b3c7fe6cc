"""GGUF files as models: written out once, whole or not at all, by one process of several; what is refused, and how."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.doubles.tiny_gguf import HEADS, WIDTH, WORDS, tiny_weights, write_tiny_gguf
from was_search.checkpoints import gguf_checkpoint
from was_search.checkpoints.files import is_on_the_hub, resolve_model, takes_long
from was_search.checkpoints.fingerprint import fingerprint
from was_search.checkpoints.load import load_model, load_tokenizer
from was_search.errors import ModelError, ResourceError, WasError
from was_search.service.model import Model
from was_search.service.settings import Settings
from was_workers.worker import Worker, WorkerSpec

pytest.importorskip("gguf")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where checkpoints of GGUF files are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "was-search" / "gguf"


@pytest.fixture
def file(tmp_path, home):
    path = tmp_path / "Tiny-Q8_0.gguf"
    write_tiny_gguf(path, quantise="Q8_0")
    return path


def kept(home) -> list[str]:
    return sorted(path.name for path in home.iterdir() if not path.name.endswith(".lock")) if home.is_dir() else []


def refused(path, kind: type[WasError] = ModelError) -> str:
    with pytest.raises(kind) as error:
        resolve_model(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_its_weights_are_written_out_in_bfloat16(file, home):
    from gguf import GGUFReader, dequantize

    source = resolve_model(str(file))
    assert (source.display_name, source.location, source.revision) == ("Tiny-Q8_0", str(file), "")
    assert kept(home) == [source.folder.name]
    stored = load_file(source.folder / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    (down,) = (t for t in GGUFReader(file).tensors if t.name == "blk.0.ffn_down.weight")
    expected = torch.from_numpy(dequantize(down.data, down.tensor_type)).bfloat16()
    assert torch.equal(stored["model.layers.0.mlp.down_proj.weight"], expected)
    assert load_model(source).config.num_hidden_layers == 1
    assert load_tokenizer(source).convert_tokens_to_ids("ab") == 0


def test_a_second_use_converts_nothing_and_needs_no_package(file, home, tmp_path, monkeypatch):
    first = resolve_model(str(file))
    monkeypatch.setattr(gguf_checkpoint, "find_spec", lambda name: None)
    other = tmp_path / "elsewhere.gguf"  # the same bytes
    other.write_bytes(file.read_bytes())
    again = resolve_model(str(other))
    assert again.folder == first.folder
    assert fingerprint(again) == fingerprint(first)
    assert first.tokenizer_hash() == again.tokenizer_hash()
    write_tiny_gguf(other, tiny_weights() | {"output_norm": np.ones(WIDTH, np.float32)})
    assert "pip install 'was-search[gguf]'" in refused(other, ResourceError)


def test_one_model_has_one_fingerprint_wherever_it_was_written(file, tmp_path, monkeypatch):
    """Nothing of the place or the time gets into the folder."""
    found = resolve_model(str(file))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    again = resolve_model(str(file))
    assert again.folder != found.folder
    assert {p.name: p.read_bytes() for p in again.folder.iterdir()} == {
        p.name: p.read_bytes() for p in found.folder.iterdir()
    }


def test_what_lies_beside_the_file_is_not_read(file):
    (file.parent / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "a/b"}')
    (file.parent / "config.json").write_text("{")
    (file.parent / "tokenizer.json").write_text("{")
    assert load_tokenizer(resolve_model(str(file))).convert_tokens_to_ids("ab") == 0


def test_a_damaged_folder_is_written_anew(file):
    source = resolve_model(str(file))
    (source.folder / "model.safetensors").write_bytes(b"")
    assert load_model(resolve_model(str(file))).config.num_hidden_layers == 1


def test_other_weights_of_the_same_form_in_the_kept_folder_are_not_taken_for_the_files(file):
    source = resolve_model(str(file))
    weights = source.folder / "model.safetensors"
    written, before = weights.read_bytes(), fingerprint(source)
    weights.write_bytes(written[:-2] + bytes(b ^ 1 for b in written[-2:]))
    assert fingerprint(resolve_model(str(file))) == before
    assert weights.read_bytes() == written
    (source.folder / "was-search.json").write_text("[]")
    assert resolve_model(str(file)).folder == source.folder
    assert "model.safetensors" in json.loads((source.folder / "was-search.json").read_text())


def test_its_name_is_told_where_it_takes_long(file):
    assert takes_long(str(file)) == f"read {file.name}"
    assert takes_long(str(file.parent)) == ""
    assert takes_long("a/b") == "fetch a/b from the hub"


def test_a_mistyped_name_is_not_asked_of_the_hub(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert not is_on_the_hub("Tiny-Q8_1.gguf")
    message = refused("Tiny-Q8_1.gguf")
    assert "must be a checkpoint's folder, a GGUF file or a hub id, got 'Tiny-Q8_1.gguf'" in message
    assert "Tiny-Q8_0.gguf" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"nothing of the kind", "is no GGUF file, and no checkpoint's folder"),
        (b"GGUF", "is damaged or truncated"),
    ],
)
def test_what_is_called_so_and_is_none(tmp_path, home, content, message):
    (tmp_path / "a.gguf").write_bytes(content)
    assert message in refused(tmp_path / "a.gguf")
    assert kept(home) == []


def test_other_files_are_no_models(tmp_path, home):
    (tmp_path / "model.bin").write_bytes(b"PK\x03\x04")
    assert "is a file, and no GGUF; give the checkpoint's folder" in refused(tmp_path / "model.bin")
    os.mkfifo(tmp_path / "pipe.gguf")  # opening it would wait for a writer
    assert "is a file, and no GGUF" in refused(tmp_path / "pipe.gguf")


@pytest.mark.parametrize("left", [100, 5000])
def test_a_truncated_file(file, home, left):
    file.write_bytes(file.read_bytes()[:-left])
    assert "is damaged or truncated; copy it again" in refused(file)
    assert kept(home) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"architecture": "clip"},
            "cannot be read as a checkpoint (ValueError: GGUF model with architecture clip is not",
        ),
        ({"architecture": "t5"}, "is a t5 model, not a causal language model"),
        ({"block_count": 2}, "the configuration describes 86,592 weights, the files hold 51,648"),
        ({"block_count": 99_999}, "has 99999 layers, the weights are 11 tensors"),
        ({"block_count": 1 << 31}, "num_hidden_layers: at most 100000 is taken for possible, got 2.15e+09"),
        ({"split__count": 3}, "is one of 3 parts; join them"),
        (
            {"llama__rope__scaling__type": "yarn"},
            "rotary embedding (llama.rope.scaling.type) in a way that is not read",
        ),
    ],
)
def test_what_is_no_whole_model(tmp_path, home, values, message):
    write_tiny_gguf(tmp_path / "a.gguf", **values)
    assert message in refused(tmp_path / "a.gguf")
    assert kept(home) == []


def test_weights_that_are_missing(tmp_path, home):
    """As many as there should be, but one matrix has another name."""
    weights = tiny_weights()
    weights["blk.0.other"] = weights.pop("blk.0.ffn_down")
    write_tiny_gguf(tmp_path / "a.gguf", weights)
    assert "lacks 1 of the model's weights, such as model.layers.0.mlp.down_proj" in refused(tmp_path / "a.gguf")
    assert kept(home) == []


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"rope_freqs": np.arange(1, 17, dtype=np.float32)}, "scales its rotary embedding (rope_freqs.weight)"),
        ({"rope_factors_long": np.ones(16, np.float32)}, "scales its rotary embedding (rope_factors_long.weight)"),
        ({"blk.0.attn_gate": np.ones((4, 4), np.float32)}, "weights, the llama model that is read of it has"),
    ],
)
def test_weights_that_would_be_left_out(tmp_path, home, extra, message):
    write_tiny_gguf(tmp_path / "a.gguf", tiny_weights() | extra)
    assert message in refused(tmp_path / "a.gguf")


def test_the_scaled_rotary_embedding_of_llama_3(tmp_path, home):
    """The factors as llama.cpp's converter makes them, frequency by frequency; the model divides by the very same."""
    base, factors, frequencies = 500_000.0, [], []
    for i in range(WIDTH // HEADS // 2):
        frequency = base ** (-2 * i / (WIDTH // HEADS))
        wave = 2 * math.pi / frequency
        smooth = (8192 / wave - 1.0) / (4.0 - 1.0)
        between = 1 / ((1 - smooth) / 32.0 + smooth)
        factors.append(1.0 if wave < 8192 / 4.0 else 32.0 if wave > 8192 / 1.0 else between)
        frequencies.append(frequency / factors[-1])
    assert len({round(factor, 3) for factor in factors}) > 2
    weights = tiny_weights() | {"rope_freqs": np.array(factors, np.float32)}
    write_tiny_gguf(tmp_path / "a.gguf", weights, llama__rope__freq_base=base)
    model = load_model(str(tmp_path / "a.gguf"), dtype="float32")
    np.testing.assert_allclose(model.model.rotary_emb.inv_freq.numpy(), frequencies, rtol=1e-5)  # float32


def test_a_rotary_embedding_with_factors_of_one(tmp_path, home):
    write_tiny_gguf(tmp_path / "a.gguf", tiny_weights() | {"rope_freqs": np.ones(16, np.float32)})
    assert load_model(str(tmp_path / "a.gguf")).config.rope_parameters["rope_type"] == "default"


def test_a_type_of_weights_that_is_not_known(file, monkeypatch):
    import gguf.constants

    known = {k: v for k, v in gguf.constants.GGML_QUANT_SIZES.items() if k.name != "Q8_0"}
    monkeypatch.setattr(gguf.constants, "GGML_QUANT_SIZES", known)
    assert "weights of type 8 ('token_embd.weight') are not known; a newer gguf may" in refused(file)


def test_without_room_or_leave_to_write(file, home, monkeypatch):
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patch:
        patch.setattr(gguf_checkpoint, "disk_usage", lambda path: usage(1000))
        assert "it takes 0.0 GB" in refused(file, ResourceError)
    shutil.rmtree(home)
    home.write_text("no folder")
    assert "cannot be written to (File exists); set XDG_CACHE_HOME" in refused(file, ResourceError)


def test_nobodys_home(file, monkeypatch):
    import platformdirs

    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: Path("~/.cache"))
    assert "has no home folder and HOME is not set: set XDG_CACHE_HOME" in refused(file, ResourceError)


def test_a_failure_half_way_leaves_nothing(file, home, monkeypatch):
    from transformers import PreTrainedTokenizerBase

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", fail)
        assert "cannot be read as a checkpoint (OSError: [Errno 28] No space left on device)" in refused(file)
    assert kept(home) == []
    assert resolve_model(str(file)).folder.is_dir()


def _converting(path, begun, end) -> None:
    """Stands still with an unfinished folder."""
    from transformers import PreTrainedTokenizerBase

    def wait(*_, **__):
        begun.set()
        end.wait()

    PreTrainedTokenizerBase.save_pretrained = wait
    resolve_model(path)


@pytest.mark.slow
def test_a_killed_conversion_is_made_again_and_a_second_process_waits(file, home):
    context = multiprocessing.get_context("spawn")
    begun, end = context.Event(), context.Event()
    other = context.Process(target=_converting, args=(str(file), begun, end))
    other.start()
    assert begun.wait(120)
    assert [name.endswith(".tmp") for name in kept(home)] == [True]
    found = []
    waiting = threading.Thread(target=lambda: found.append(resolve_model(str(file))))
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()  # the other one holds the lock
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    waiting.join(120)
    assert kept(home) == [found[0].folder.name]
    assert load_model(found[0]).config.num_hidden_layers == 1


def test_a_run_and_its_workers_open_the_file(file):
    """Workers resolve the file themselves, so that those of other machines convert where they are."""
    model = Model.of(Settings(model=str(file)))
    assert (model.label, model.token_rows) == ("Tiny-Q8_0", WORDS)
    worker = Worker(WorkerSpec(model.source.location, "", "float32", "cpu", "l2"))
    assert worker.prepare().shape == model.shape
