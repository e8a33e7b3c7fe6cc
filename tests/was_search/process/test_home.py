"""Paths with a tilde, under a user with a home and under one without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from was_search.checkpoints.files import is_on_the_hub, resolve_model
from was_search.errors import DataError, ModelError
from was_search.process.home import expanded, no_home
from was_search.texts.named import load_named
from was_search.texts.splits import is_named, load_text


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user id: no HOME, no entry in passwd."""

    def nobody(*args: Any) -> None:
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr("pwd.getpwnam", nobody)


def test_a_tilde_is_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/x") == tmp_path / "x" and expanded("~") == tmp_path
    assert expanded("a/~x") == Path("a/~x")
    assert no_home("~/x") == no_home("a/~x") == no_home("") == ""
    (tmp_path / "text.txt").write_text("some words of text\n" * 60)
    assert load_text("~/text.txt", "test").name == "text.txt"


WORDS = r"\('~' stands for no folder here: set HOME, or give the whole path\)"


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize("path", ["~/x", "~", "~somebody/x"])
def test_without_a_home_it_stays(path: str) -> None:
    assert expanded(path) == Path(path)
    assert "stands for no folder here" in no_home(path)


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize(
    ("use", "error"),
    [(lambda: resolve_model("~/model"), ModelError), (lambda: load_text("~/texts", "test"), DataError)],
)
def test_a_path_of_nobodys_home_is_a_line(use: Callable[[], Any], error: type[Exception]) -> None:
    """Before, RuntimeError: Could not determine home directory."""
    with pytest.raises(error, match=f"which does not exist {WORDS}"):
        use()


@pytest.mark.usefixtures("homeless")
def test_so_is_the_folder_of_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAS_SEARCH_DATASETS", "~/sets")
    with pytest.raises(DataError, match=f"~/sets/wikitext2 is no folder {WORDS}; put"):
        load_named("wikitext2", "test")


def test_what_has_to_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_on_the_hub("org/model") and is_named("wikitext2")
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "wikitext2").touch()
    assert not is_on_the_hub("org/model") and not is_named("wikitext2"), "a file or folder of that name comes first"
    assert not is_on_the_hub("/no/such/folder") and not is_named("other")
