"""The fingerprint follows the content; the cache saves the reading and never decides the result."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from was_search.checkpoints.files import ModelSource, resolve_model
from was_search.checkpoints.fingerprint import fingerprint
from was_search.errors import ModelError


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 32, "dtype": "bfloat16"}))
    save_file({"a": np.arange(6.0)}, folder / "model.safetensors")
    return resolve_model(str(folder))


@pytest.fixture
def reads(monkeypatch):
    """Names of the weight files opened."""
    seen = []
    open_ = Path.open

    def counted(self, *args, **kwargs):
        if self.suffix == ".safetensors":
            seen.append(self.name)
        return open_(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", counted)
    return seen


def shard(source, *names):
    (source.folder / "model.safetensors").unlink(missing_ok=True)
    for i, name in enumerate(names):
        save_file({name: np.arange(4.0) + i}, source.folder / name)
    index = {"weight_map": {name: name for name in names}}
    (source.folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_the_same_content_elsewhere_has_the_same_fingerprint(source, tmp_path):
    other = tmp_path / "copy"
    other.mkdir()
    config = json.loads((source.folder / "config.json").read_text())
    config = {"transformers_version": "9.9", "_name_or_path": "x", **dict(reversed(config.items()))}
    (other / "config.json").write_text(json.dumps(config, indent=4))
    (other / "model.safetensors").write_bytes((source.folder / "model.safetensors").read_bytes())
    (other / "README.md").write_text("not counted")
    found = fingerprint(resolve_model(str(other)))
    assert found == fingerprint(source)
    assert len(found) == 64


@pytest.mark.parametrize("key", ["hidden_size", "dtype", "rope_theta"])
def test_another_configuration_is_another_model(source, key):
    before = fingerprint(source)
    config = json.loads((source.folder / "config.json").read_text())
    (source.folder / "config.json").write_text(json.dumps({**config, key: "float32"}))
    assert fingerprint(source) != before


def test_one_changed_weight_is_another_model(source, tmp_path):
    before = fingerprint(source, tmp_path / "cache")
    values = np.arange(6.0)
    values[3] += 1e-9
    save_file({"a": values}, source.folder / "model.safetensors")
    assert fingerprint(source, tmp_path / "cache") != before


def test_every_shard_counts_and_their_names_do(source):
    shard(source, "model-1.safetensors", "model-2.safetensors")
    before = fingerprint(source)
    first, second = source.weight_files()
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    assert fingerprint(source) != before


def test_the_weights_are_read_once(source, tmp_path, reads):
    shard(source, "model-1.safetensors", "model-2.safetensors")
    found = fingerprint(source, tmp_path / "cache")
    assert reads == ["model-1.safetensors", "model-2.safetensors"]
    assert fingerprint(source, tmp_path / "cache") == found
    assert len(reads) == 2
    os.utime(source.folder / "model-2.safetensors", ns=(1, 1))
    assert fingerprint(source, tmp_path / "cache") == found
    assert reads[2:] == ["model-2.safetensors"]


def test_other_weights_of_the_same_size_and_modification_time(source, tmp_path):
    """As cp -p and rsync -t leave them, of two models of one shape that were made at once."""
    path = source.folder / "model.safetensors"
    before, was = fingerprint(source, tmp_path / "cache"), path.stat()
    while True:
        save_file({"a": np.arange(6.0) + 1.0}, path)
        os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
        if path.stat().st_ctime_ns != was.st_ctime_ns:  # a file system's clock may be coarse
            break
        time.sleep(0.001)
    assert path.stat().st_size == was.st_size
    assert fingerprint(source, tmp_path / "cache") != before


def test_without_a_cache_folder_nothing_is_written(source, reads):
    assert fingerprint(source) == fingerprint(source, None)
    assert len(reads) == 2


@pytest.mark.parametrize("content", ["", "no json", "[]", "3", '{"x": 3}', '{"x": "short"}', "\xff"])
def test_a_damaged_cache_is_ignored_and_mended(source, tmp_path, content, reads):
    expected = fingerprint(source)
    (tmp_path / "fingerprints.json").write_text(content, encoding="latin-1")
    assert fingerprint(source, tmp_path) == expected
    fingerprint(source, tmp_path)
    assert len(reads) == 2


def test_a_damaged_entry_is_not_believed(source, tmp_path):
    expected = fingerprint(source, tmp_path)
    known = json.loads((tmp_path / "fingerprints.json").read_text())
    (tmp_path / "fingerprints.json").write_text(json.dumps(dict.fromkeys(known, "damaged")))
    assert fingerprint(source, tmp_path) == expected


def test_a_cache_folder_that_cannot_be_written(source, tmp_path):
    (tmp_path / "file").write_text("")
    assert fingerprint(source, tmp_path / "file" / "cache") == fingerprint(source)


def test_a_link_into_a_hub_cache_is_its_blob(source, tmp_path, reads):
    blob = tmp_path / "blob"
    (source.folder / "model.safetensors").rename(blob)
    (source.folder / "model.safetensors").symlink_to(blob)
    fingerprint(source, tmp_path / "cache")
    assert str(blob.resolve()) in (tmp_path / "cache" / "fingerprints.json").read_text()


def test_files_that_cannot_be_read(source):
    shard(source, "model-1.safetensors")
    (source.folder / "model-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-1\.safetensors cannot be read \(No such file"):
        fingerprint(source)
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        fingerprint(ModelSource("x", "x", source.folder / "nowhere", ""))
