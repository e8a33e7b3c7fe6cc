"""Plans as artifacts: read back with Optuna's own functions, replaced, and gone with their study."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.artifacts import download_artifact, get_all_artifact_meta, upload_artifact
from optuna.artifacts.exceptions import ArtifactNotFound

from tests.doubles.small_study import SHAPE, new_study
from was_search.errors import StorageError, StudyError
from was_search.plan import Plan
from was_storage.dashboard.plan_files import PlanFiles, archive, attach_plan
from was_storage.server.database import Database
from was_storage.studies.cache import ArtifactCache
from was_storage.studies.store import PLAN_KIND, StudyStore

pytestmark = pytest.mark.postgres


def plan_in(folder: Path, budget: float = 0.5) -> Path:
    return Plan(
        model="tiny",
        revision="",
        fingerprint="a" * 64,
        shape=SHAPE,
        score="l2",
        budget=budget,
        dense_prefix=1,
        sparsities=np.full((2, 7), budget),
        thresholds=np.ones((2, 7), np.float32),
        norms=tuple(tuple(np.ones(w, np.float32) for w in row) for row in SHAPE.in_features),
    ).save(folder)


def listed(database: Database, study: str) -> list[optuna.artifacts.ArtifactMeta]:
    return get_all_artifact_meta(optuna.load_study(study_name=study, storage=database.optuna_storage()))


def test_optuna_reads_what_was_attached(database: Database, tmp_path: Path) -> None:
    record = new_study(database, name="a/study")
    folder = plan_in(tmp_path / "plan")
    new = attach_plan(database, record.name, folder)
    (meta,) = listed(database, record.name)
    assert (meta.artifact_id, meta.filename, meta.mimetype) == (new, "a%2Fstudy-plan.zip", "application/zip")
    assert meta.encoding is None
    target = tmp_path / "got.zip"
    download_artifact(artifact_store=PlanFiles(database), file_path=str(target), artifact_id=new)
    with zipfile.ZipFile(target) as packed:
        assert packed.testzip() is None
        packed.extractall(tmp_path / "again")
    assert Plan.load(tmp_path / "again").budget == 0.5
    assert archive(folder) == target.read_bytes()
    StudyStore(database).delete(record.name)


def test_the_same_plan_again_changes_nothing_and_another_takes_its_place(database: Database, tmp_path: Path) -> None:
    record = new_study(database)
    first = attach_plan(database, record.name, plan_in(tmp_path / "plan"))
    assert attach_plan(database, record.name, tmp_path / "plan") == first
    assert attach_plan(database, record.name, plan_in(tmp_path / "plan", 0.6)) == first
    assert [meta.artifact_id for meta in listed(database, record.name)] == [first]
    assert PlanFiles(database).open_reader(first).read() == archive(tmp_path / "plan")
    other = new_study(database)
    assert attach_plan(database, other.name, tmp_path / "plan") != first
    StudyStore(database).delete(record.name)
    assert len(ArtifactCache(database).list(PLAN_KIND)) == 1  # the other's
    StudyStore(database).delete(other.name)
    assert ArtifactCache(database).list(PLAN_KIND) == []


def test_a_plan_that_was_deleted_in_the_dashboard_comes_back(database: Database, tmp_path: Path) -> None:
    record = new_study(database)
    new = attach_plan(database, record.name, plan_in(tmp_path / "plan"))
    PlanFiles(database).remove(new)  # as the dashboard does it
    database.optuna_storage().set_study_system_attr(record.optuna_study_id, f"artifacts:{new}", "null")
    assert attach_plan(database, record.name, tmp_path / "plan") == new
    assert [meta.artifact_id for meta in listed(database, record.name)] == [new]
    StudyStore(database).delete(record.name)


def test_what_people_have_attached_themselves_stays(database: Database, tmp_path: Path) -> None:
    record = new_study(database)
    (tmp_path / "notes.txt").write_text("mine")
    study = optuna.load_study(study_name=record.name, storage=database.optuna_storage())
    upload_artifact(artifact_store=PlanFiles(database), file_path=str(tmp_path / "notes.txt"), study_or_trial=study)
    for budget in (0.5, 0.6):
        attach_plan(database, record.name, plan_in(tmp_path / "plan", budget))
    assert {meta.filename for meta in listed(database, record.name)} >= {"notes.txt"}
    assert len(listed(database, record.name)) == 2


def test_what_is_not_there(database: Database, tmp_path: Path) -> None:
    store = PlanFiles(database)
    with pytest.raises(ArtifactNotFound):
        store.open_reader("0" * 8)
    with pytest.raises(ArtifactNotFound):
        store.remove("0" * 8)
    with pytest.raises(StudyError, match="study 'nope' has no Optuna study"):
        attach_plan(database, "nope", plan_in(tmp_path / "plan"))


def test_a_damaged_plan_is_not_given_out(database: Database, tmp_path: Path) -> None:
    from sqlalchemy import text

    new = attach_plan(database, new_study(database).name, plan_in(tmp_path / "plan"))
    with database.begin() as connection:
        connection.execute(text("UPDATE was.artifact SET payload = 'x' WHERE key = :key"), {"key": new})
    with pytest.raises(ArtifactNotFound):
        PlanFiles(database).open_reader(new)


def test_a_database_that_can_only_be_read(database: Database, tmp_path: Path) -> None:
    new = attach_plan(database, new_study(database).name, plan_in(tmp_path / "plan"))
    with database.read_only() as reading:
        store = PlanFiles(reading)
        assert store.open_reader(new).read() == archive(tmp_path / "plan")
        with pytest.raises(StorageError, match="read-only"):
            store.remove(new)
        with pytest.raises(StorageError, match="read-only"):
            store.write("1" * 8, io.BytesIO(b"x"))
    assert PlanFiles(database).open_reader(new).read()
