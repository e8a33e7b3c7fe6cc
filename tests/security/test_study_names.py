"""Names of studies that try to be something else: SQL, control characters, paths, markup, lookalikes."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text
from typer.testing import CliRunner

from tests.doubles.small_study import new_study
from was_search.errors import StudyError
from was_search.service.cli.main import app
from was_search.studies.control import Wish
from was_search.studies.names import check_name, folder_name
from was_storage.server.database import Database
from was_storage.studies.control import ControlStore
from was_storage.studies.store import StudyStore

NAMES = [
    "x'; DROP TABLE was.study; --",
    'x"; DELETE FROM was.slot; --',
    "x') OR ('1'='1",
    "%(name)s :name {name} %s \\' \\",
    "$(touch /tmp/was-search-touched) `id` ; rm -rf / &",
    "../../../etc/passwd",
    "/etc/passwd",
    "..",
    "a/b/../../c",
    "[red]x[/red] [link=file:///etc/passwd]y[/link]",
    "<script>alert(1)</script>",
    "-rf --storage=x",
    "Ἀθῆναι 北京 مرحبا",
    "x" * 200,
    "ü" * 200,
]


@pytest.mark.postgres
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_only_a_name(coordinator: Database, name: str) -> None:
    store = StudyStore(coordinator)
    other = new_study(coordinator, 2)
    record = new_study(coordinator, 2, name)
    assert store.get(name).id == record.id == store.id_of(name)
    ControlStore(coordinator).wish(name, Wish.PAUSE)
    store.set_report(name, {"x": 1})
    with store.coordinate(name) as session:
        assert len(session.slots()) == 2
    assert ControlStore(coordinator).read(other.name).wish is Wish.RUN
    assert store.get(other.name).report == {}
    command = ["status", "--json", "--", name]
    shown = CliRunner().invoke(app, command, env={"WAS_SEARCH_STORAGE": coordinator.url})
    assert shown.exit_code == 0, shown.output
    store.delete(name)
    assert [record.name for record in store.list() if record.name == other.name] == [other.name]
    store.delete(other.name)


@pytest.mark.postgres
@pytest.mark.parametrize(
    "name",
    [
        "a\x1b[2Jb", "a\x07b", "a\rb", "a\nb", "a\0b", "a\x7fb", "a\x9bb", "a\u202eb", "a\u200bb", "a\ufeffb",
        "a\u00a0b", "a\ud800b", "\tx", "x" * 201, "ｓｔｕｄｙ", "ﬁsher", "e\u0301", "①",
    ],
)  # fmt: skip
def test_what_is_no_name_is_refused_and_never_sent(coordinator: Database, name: str) -> None:
    with pytest.raises(StudyError, match="study name: ") as caught:
        new_study(coordinator, 1, name)
    assert str(caught.value).isprintable() or name in ("ｓｔｕｄｙ", "ﬁsher", "e\u0301", "①")
    for act in (StudyStore(coordinator).get, StudyStore(coordinator).id_of, ControlStore(coordinator).read):
        with pytest.raises(StudyError, match="does not exist"):
            act(name)


@pytest.mark.postgres
def test_lookalikes_are_studies_of_their_own(coordinator: Database) -> None:
    latin, cyrillic = "study-a", "study-\u0430"
    first, second = (new_study(coordinator, 1, name) for name in (latin, cyrillic))
    assert first.id != second.id
    StudyStore(coordinator).delete(cyrillic)
    assert StudyStore(coordinator).get(latin).id == first.id
    assert folder_name(latin) != folder_name(cyrillic)


@pytest.mark.postgres
def test_nothing_was_dropped(coordinator: Database) -> None:
    with coordinator.begin() as connection:
        assert connection.execute(text("SELECT count(*) FROM was.study")).scalar() is not None
    assert not Path("/tmp/was-search-touched").exists()


@pytest.mark.parametrize("name", [*NAMES, ".hidden", "~", "a\\b", "a%2Fb", "\x00"])
def test_a_name_is_one_folder_below(tmp_path: Path, name: str) -> None:
    folder = tmp_path / folder_name(name)
    assert folder.resolve().parent == tmp_path.resolve()
    assert folder.name not in ("", ".", "..")
    folder.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [folder_name(name)]


def test_ordinary_names_stay_as_they_are() -> None:
    for name in ("llama-60-tpe-1a2b3c4d", "My study 2", "é"):
        assert folder_name(name) == name


@given(st.text(max_size=250), st.text(max_size=250))
def test_no_two_names_share_a_folder(one: str, other: str) -> None:
    assert (folder_name(one) == folder_name(other)) == (one == other)
    assert "/" not in folder_name(one) and len(folder_name(one).encode()) < 256


@given(st.text(min_size=1, max_size=200))
def test_what_is_taken_is_printable_and_normal(name: str) -> None:
    try:
        check_name(name)
    except StudyError:
        return
    assert name.isprintable() and unicodedata.normalize("NFKC", name) == name
