"""What somebody who mistyped a name may have meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from was_search.process.close_names import did_you_mean, did_you_mean_path


@pytest.mark.parametrize(
    ("got", "answer"),
    [
        ("trails", "; did you mean 'trials'?"),
        ("Max_Seconds", "; did you mean 'max-seconds'?"),
        ("radius", ""),
        ("", ""),
    ],
)
def test_the_closest_name_if_there_is_one(got: str, answer: str) -> None:
    assert did_you_mean(got, ["trials", "max-seconds", "plan"]) == answer


def test_nothing_is_close_to_nothing() -> None:
    assert did_you_mean("trials", []) == ""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "runs" / "study-a" / "plan").mkdir(parents=True)
    (tmp_path / "runs" / "study-b").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_path_is_mended_where_it_went_wrong(folder: Path) -> None:
    meant = folder / "runs" / "study-a" / "plan"
    assert did_you_mean_path(folder / "run" / "study-a" / "plan") == f"; did you mean {str(meant)!r}?"
    assert did_you_mean_path(folder / "runs" / "study_a" / "plan") == f"; did you mean {str(meant)!r}?"


def test_what_is_close_but_leads_nowhere_is_not_meant(folder: Path) -> None:
    assert did_you_mean_path(folder / "runs" / "study-c" / "other") == ""
    assert did_you_mean_path(folder / "runs" / "study-c" / "plan").endswith("study-a/plan'?")
    assert did_you_mean_path(folder / "quite" / "different") == ""


def test_a_relative_path_is_answered_by_one(folder: Path) -> None:
    assert did_you_mean_path(Path("rums/study-a")) == "; did you mean 'runs/study-a'?"


def test_a_path_through_a_file(folder: Path) -> None:
    (folder / "file").write_text("")
    assert did_you_mean_path(folder / "file" / "plan") == ""
