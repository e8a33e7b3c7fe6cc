"""The script that divides WikiText: whole articles, in order, each in one split."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from was_search.texts.splits import load_text

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("wikitext_articles")


def article(title: str, length: int) -> str:
    return f" = {title} = \n \n = = Early = = \n {'x' * length} \n = = = A = B = = = \n y = z = \n"


def test_an_article_belongs_to_where_it_begins(script, tmp_path, capsys):
    articles = [article(f"T {i}", 100) for i in range(10)]
    (tmp_path / "wiki.raw").write_bytes("".join(articles).replace("\n", "\r\n").encode())
    script.main([str(tmp_path / "wiki.raw"), str(tmp_path / "out")])
    assert capsys.readouterr().out.endswith("calibration 3 articles, search 2 articles, test 5 articles\n")
    found = [load_text(str(tmp_path / "out"), split).text for split in ("calibration", "search", "test")]
    assert found == ["".join(articles[:3]), "".join(articles[3:5]), "".join(articles[5:])]


def test_an_article_over_a_border_stays_whole(script):
    parts = script.divide(article("a", 400) + article("b", 10) + article("c", 500) + article("d", 1))
    assert [part.count(" = \n \n") for part in parts.values()] == [1, 2, 1]
    assert parts["search"].startswith(" = b = ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "no titles\n = = Early = = \n",
            r"0 article\(s\) found, lines ' = Title = ': none begins in calibration's share",
        ),
        (article("a", 10) + article("b", 90), r"2 article\(s\) found.* none begins in test's share"),
    ],
)
def test_too_few_articles_are_one_line(script, tmp_path, text, message):
    (tmp_path / "wiki.raw").write_text(text)
    with pytest.raises(SystemExit, match=f"error: {message}"):
        script.main([str(tmp_path / "wiki.raw"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_what_is_no_text_is_one_line(script, tmp_path, content):
    if content is not None:
        (tmp_path / "wiki.raw").write_bytes(content)
    with pytest.raises(SystemExit, match=r"error: .*wiki\.raw: cannot be read as UTF-8 text"):
        script.main([str(tmp_path / "wiki.raw"), str(tmp_path / "out")])
