"""Finding a checkpoint: what is refused, with which words, and what is read from the local hub cache."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.numpy import save_file

from was_search.checkpoints.files import read_config, resolve_model
from was_search.errors import ModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": np.arange(60.0)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty hub cache and no network."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


def test_a_folder(folder, monkeypatch):
    source = resolve_model(str(folder))
    assert (source.name, source.display_name, source.folder, source.revision) == (
        str(folder),
        "my-model",
        folder.resolve(),
        "",
    )
    assert source.location == str(folder.resolve())
    monkeypatch.chdir(folder)
    assert resolve_model(".").display_name == "my-model"


def test_the_weights_are_those_that_transformers_loads(folder):
    save_file({"a": np.arange(3.0)}, folder / "consolidated.safetensors")
    assert [path.name for path in resolve_model(str(folder)).weight_files()] == ["model.safetensors"]
    save_file({"a": np.arange(3.0)}, folder / "model-00002-of-00002.safetensors")
    save_file({"b": np.arange(3.0)}, folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert [path.name for path in resolve_model(str(folder)).weight_files()] == ["model.safetensors"]
    (folder / "model.safetensors").unlink()
    found = [path.name for path in resolve_model(str(folder)).weight_files()]
    assert found == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_the_hash_of_the_tokenizer_follows_its_files(folder):
    source = resolve_model(str(folder))
    seen = {source.tokenizer_hash()}
    for name in ("tokenizer.json", "special_tokens_map.json", "merges.txt"):
        (folder / name).write_text("{}")
        seen.add(source.tokenizer_hash())
    assert len(seen) == 4
    (folder / "README.md").write_text("not counted")
    assert source.tokenizer_hash() in seen


def test_a_hub_id_is_read_from_the_local_cache(folder, offline):
    repository = offline / "models--some--tiny-model"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    source = resolve_model("some/tiny-model")
    assert (source.display_name, source.revision, source.location) == ("tiny-model", COMMIT, "some/tiny-model")
    assert source.folder == repository / "snapshots" / COMMIT
    assert resolve_model("some/tiny-model", COMMIT) == source


def test_what_is_asked_of_the_hub(folder, monkeypatch):
    asked = {}

    def fetch(name, **options):
        asked.update(name=name, **options)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    resolve_model("some/tiny-model", "v2")
    assert (asked["name"], asked["revision"]) == ("some/tiny-model", "v2")

    def wanted(path):
        from fnmatch import fnmatch

        return any(fnmatch(path, p) for p in asked["allow_patterns"]) and not any(
            fnmatch(path, p) for p in asked["ignore_patterns"]
        )

    for path in ("config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "merges.txt"):
        assert wanted(path)
    for path in ("pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors", "modeling_x.py"):
        assert not wanted(path)


def test_no_network(offline):
    message = r"'some/model' is no local folder, is not in the local hub cache, and the hub cannot be reached .*folder$"
    with pytest.raises(ModelError, match=message):
        resolve_model("some/model")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (GatedRepoError, "some/model needs its licence accepted on the hub and a token"),
        (RepositoryNotFoundError, "no folder and no model on the hub is called 'some/model'"),
        (RevisionNotFoundError, "some/model has no revision 'v9' on the hub"),
    ],
)
def test_what_the_hub_refuses(monkeypatch, kind, message):
    def refuse(name, **options):
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=message):
        resolve_model("some/model", "v9")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/nowhere/at/all", "a/b/c", "two words"])
def test_neither_a_folder_nor_a_hub_id(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ModelError, match=r"must be a checkpoint's folder, a GGUF file or a hub id, got .* does not exist"
    ):
        resolve_model(name)


def test_a_file(folder):
    with pytest.raises(ModelError, match=r"config\.json is a file, and no GGUF; give the checkpoint's folder"):
        resolve_model(str(folder / "config.json"))


def test_no_configuration(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json; give the folder of a transformers checkpoint"):
        resolve_model(str(folder))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has no config\.json; an adapter: merge it"):
        resolve_model(str(folder))


@pytest.mark.parametrize(
    ("content", "message"), [("{", "cannot be read"), ("[]", "must hold a JSON object, got list"), ("", "cannot be")]
)
def test_a_damaged_configuration(folder, content, message):
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=rf"config\.json {message}"):
        resolve_model(str(folder))


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no weights \(model\.safetensors or model\.safetensors\.index\.json\)$"):
        resolve_model(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"no weights .*; pytorch_model\.bin is pickled, which is never loaded"):
        resolve_model(str(folder))


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-1], content + b"0", content[:20], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"model\.safetensors is damaged or truncated .*; copy the checkpoint"):
            resolve_model(str(folder))


def test_a_missing_shard(folder):
    index = folder / "model.safetensors.index.json"
    (folder / "model.safetensors").rename(folder / "some.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "some.safetensors", "b": "other.safetensors"}}))
    with pytest.raises(ModelError, match=r"other\.safetensors is missing, though .*index\.json names it"):
        resolve_model(str(folder))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"index\.json cannot be read .*copy the checkpoint again"):
        resolve_model(str(folder))


def test_the_configuration(folder):
    assert read_config(resolve_model(str(folder))) == {"model_type": "llama"}
