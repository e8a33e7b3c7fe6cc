"""The named data sets from small copies in the hub's own file formats, through datasets.load_dataset."""

from __future__ import annotations

import gzip
import json

import datasets.config
import huggingface_hub.constants
import pandas as pd
import pytest

from was_search.errors import DataError
from was_search.texts import named
from was_search.texts.named import FOLDER_VARIABLE, alpaca_record, load_named
from was_search.texts.protocol import SPLITS
from was_search.texts.splits import load_text


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path_factory):
    """Neither what another test loaded nor the machine's own copies and caches."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    named._load.cache_clear()


@pytest.fixture
def copies(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


def write_wikitext(folder, configuration="wikitext-2-raw-v1", text="article"):
    inner = folder / "wikitext2" / configuration
    inner.mkdir(parents=True)
    for part in ("train", "validation", "test"):
        rows = ["", f" = {part} {text} = \n", "", f" Words of {part} . \n"]
        pd.DataFrame({"text": rows}).to_parquet(inner / f"{part}-00000-of-00001.parquet")


def write_c4(folder, count):
    inner = folder / "c4" / "en"
    inner.mkdir(parents=True)
    for part, shards in (("train", 1024), ("validation", 8)):
        with gzip.open(inner / f"c4-{part}.00000-of-{shards:05d}.json.gz", "wt", encoding="utf-8") as file:
            for i in range(count):
                row = {"text": f"{part} {i}", "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org"}
                file.write(json.dumps(row) + "\n")


RECORDS = [
    {"instruction": f"Do {i}.", "input": "" if i % 2 else f"with {i}", "output": f"Done {i}.", "text": "unused"}
    for i in range(25)
]


def test_wikitext_maps_its_parts_to_the_splits(copies):
    write_wikitext(copies)
    for split, part in (("calibration", "train"), ("search", "validation"), ("test", "test")):
        expected = f"\n\n = {part} article = \n\n\n\n\n Words of {part} . \n"
        assert load_named("wikitext2", split) == expected
        assert load_text("wikitext2", split).text == expected
        assert load_text("wikitext2", split).name == "wikitext2"


def test_wikitext_103_beside_it_is_not_mixed_in(copies):
    write_wikitext(copies)
    write_wikitext(copies, "wikitext-103-raw-v1", "other")
    assert "other" not in load_named("wikitext2", "test")


def test_c4_takes_disjoint_documents(copies, monkeypatch):
    monkeypatch.setattr(named, "C4_DOCUMENTS", 6)
    write_c4(copies, 9)
    assert load_named("c4", "calibration") == "train 0\n\ntrain 1\n\ntrain 2"
    assert load_named("c4", "search") == "train 3\n\ntrain 4\n\ntrain 5"
    assert load_named("c4", "test") == "\n\n".join(f"validation {i}" for i in range(6))


def test_c4_with_fewer_documents_stays_disjoint(copies):
    write_c4(copies, 5)
    assert load_named("c4", "calibration") == "train 0\n\ntrain 1"
    assert load_named("c4", "search") == "train 2\n\ntrain 3\n\ntrain 4"


@pytest.mark.parametrize("name", ["data/train-00000-of-00001-a09b74b3ef9c3b56.parquet", "alpaca_data.json"])
def test_alpaca_records_are_split_by_index(copies, name):
    path = copies / "alpaca" / name
    path.parent.mkdir(parents=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(RECORDS))
    else:
        pd.DataFrame(RECORDS).to_parquet(path)
    wanted = {"calibration": (0, 1, 2, 3, 4, 5), "search": (6, 7), "test": (8, 9)}
    for split in SPLITS:
        expected = [alpaca_record(row) for i, row in enumerate(RECORDS) if i % 10 in wanted[split]]
        assert load_named("alpaca", split) == "\n\n".join(expected)


def test_alpaca_prompt():
    assert alpaca_record({"instruction": "Add.", "input": "1 2", "output": "3"}) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3"
    )
    assert alpaca_record({"instruction": "Hi.", "input": "", "output": "Ho."}) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nHi.\n\n### Response:\nHo."
    )


def test_a_set_is_loaded_once_a_process(copies):
    write_wikitext(copies)
    first = load_text("wikitext2", "test")
    for path in (copies / "wikitext2").rglob("*.parquet"):
        path.unlink()
    assert load_text("wikitext2", "test") == first


@pytest.mark.parametrize("name", ["wikitext2", "c4", "alpaca"])
def test_no_network_says_what_to_download_and_where_to_put_it(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    repository = named.REPOSITORIES[name]
    message = f"{name} could not be loaded .* of the data set {repository} .* FOLDER/{name}/ and set {FOLDER_VARIABLE}="
    with pytest.raises(DataError, match=message):
        load_named(name, "calibration")


def test_a_local_folder_without_the_set(copies):
    with pytest.raises(DataError, match=r"WAS_SEARCH_DATASETS is set, but .*c4 is no folder; put en/c4-train"):
        load_named("c4", "test")


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("wikitext2", r"test-\*\.parquet"),
        ("c4", r"c4-validation\.00000-of-\*\.json\.gz"),
        ("alpaca", r"train-\*\.parquet or alpaca_data\*\.json"),
    ],
)
def test_a_local_folder_without_the_files(copies, name, pattern):
    (copies / name).mkdir()
    with pytest.raises(DataError, match=f"{name} has no file {pattern}"):
        load_named(name, "test")


def test_a_damaged_local_file(copies):
    write_wikitext(copies)
    (copies / "wikitext2" / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"the local copy .*wikitext2 cannot be read .* Salesforce/wikitext again"):
        load_named("wikitext2", "test")


def test_an_empty_split(copies):
    write_c4(copies, 0)
    with pytest.raises(DataError, match="c4"):
        load_named("c4", "test")


def test_an_unknown_name():
    with pytest.raises(DataError, match="must be one of wikitext2, c4, alpaca, got 'ptb'"):
        load_named("ptb", "test")
