"""The header of a GGUF file: read as it was written, and refused in one line where it is absurd or ends early."""

from __future__ import annotations

import struct

import pytest

from tests.doubles.tiny_gguf import tiny_weights, write_tiny_gguf
from was_search.checkpoints import gguf_header
from was_search.checkpoints.gguf_header import read_header
from was_search.errors import ModelError


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def head(tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def tensor(name: str = "a", widths: tuple[int, ...] = (4,), kind: int = 0, start: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(widths)}QIQ", len(widths), *widths, kind, start)


def test_it_is_what_was_written(tmp_path):
    gguf = pytest.importorskip("gguf")
    weights = write_tiny_gguf(tmp_path / "a.gguf", quantise="Q8_0")
    found = read_header(tmp_path / "a.gguf")
    assert found.values["general.architecture"] == "llama"
    assert found.values["llama.block_count"] == 1
    assert found.values["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert "tokenizer.ggml.tokens" not in found.values
    assert found.elements == sum(weight.size for weight in weights.values())
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert {(t.name, t.elements, t.kind, found.data_start + t.start) for t in found.tensors} == {
        (t.name, t.n_elements, t.tensor_type, t.data_offset) for t in reader.tensors
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GG", r"is no GGUF file"),
        (b"PK\x03\x04" + bytes(40), r"is no GGUF file, and no checkpoint's folder"),
        (b"GGUF", r"is damaged or truncated; copy it again"),
        (head(version=1), r"is GGUF of version 1, or of another byte order; versions 2 and 3"),
        (head(version=3 << 24), r"is GGUF of version 50331648, or of another byte order"),
        (head(tensors=1 << 60), r"at most 100000 tensors are taken for possible, got 1\.15e\+18"),
        (head(keys=1 << 60), r"at most 100000 keys are taken for possible, got 1\.15e\+18"),
        (head(keys=1), r"is damaged or truncated"),
        (head(keys=1) + struct.pack("<Q", 1 << 63), r"is damaged or truncated"),
        (
            head(keys=1) + text("a") + struct.pack("<I", 99),
            r"is damaged, or of a newer kind: 'a' has values of type 99",
        ),
        (head(keys=1) + text("a") + struct.pack("<IIQ", 9, 9, 1), r"'a' has values of type 9"),
        (head(keys=1) + text("a") + struct.pack("<IIQ", 9, 4, 1 << 62), r"is damaged or truncated"),
        (head(keys=1) + text("a") + struct.pack("<IIQ", 9, 8, 1 << 62), r"is damaged or truncated"),
        (head(keys=1) + struct.pack("<Q", 2) + b"\xff\xff", r"is damaged: a key or name in it is not UTF-8"),
        (head(keys=1) + text("general.alignment") + struct.pack("<II", 4, 0), r"general\.alignment must be .*, got 0"),
        (head(tensors=1) + tensor(widths=(1,) * 9), r"is damaged: 'a' has 9 dimensions"),
        (head(tensors=2) + tensor(), r"is damaged or truncated"),
    ],
)
def test_what_no_file_may_say(tmp_path, content, message):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as error:
        read_header(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_header_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_header, "MOST_HEADER_BYTES", 1 << 10)
    write_tiny_gguf(tmp_path / "a.gguf", tiny_weights())
    with pytest.raises(ModelError, match="has more than 0 MiB of keys and names"):
        read_header(tmp_path / "a.gguf")


def test_a_file_that_is_gone(tmp_path):
    with pytest.raises(ModelError, match=r"a\.gguf cannot be read \(No such file"):
        read_header(tmp_path / "a.gguf")
