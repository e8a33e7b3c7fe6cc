"""Exported plans kept beside their studies: optuna-dashboard lists them and lets people download them.

Optuna's artifact store is a folder or a bucket; ours is a table of the same database, so that a dashboard on another
machine needs nothing more, and one that can only read can change nothing.
"""

from __future__ import annotations

import io
import json
import uuid
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from optuna.artifacts import ArtifactMeta
from optuna.artifacts.exceptions import ArtifactNotFound

from was_search.errors import StudyError
from was_search.plan import JSON_NAME, TENSORS_NAME
from was_search.studies.names import folder_name
from was_storage.server.database import Database
from was_storage.studies.cache import Artifact, ArtifactCache
from was_storage.studies.store import PLAN_KIND

_ATTRIBUTE = "artifacts:"
"""Prefix of the study attribute in which Optuna describes an artifact; tests compare it with Optuna's own reader."""

_FIRST_DAY = (1980, 1, 1, 0, 0, 0)


class PlanFiles:
    """Optuna's ``ArtifactStore`` on our table. Thread-safe; raises StorageError where the login may not write."""

    def __init__(self, database: Database) -> None:
        self._cache = ArtifactCache(database)

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """The bytes; raises Optuna's ArtifactNotFound where there are none."""
        found = self._cache.get(PLAN_KIND, artifact_id, _whole)
        if found is None:
            raise ArtifactNotFound(f"no artifact {artifact_id}")
        return io.BytesIO(found.payload)

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Store the bytes under ``artifact_id``."""
        self._cache.put(PLAN_KIND, artifact_id, content_body.read())

    def remove(self, artifact_id: str) -> None:
        """Remove the bytes; raises Optuna's ArtifactNotFound where there are none."""
        if not self._cache.delete(PLAN_KIND, artifact_id):
            raise ArtifactNotFound(f"no artifact {artifact_id}")


def attach_plan(database: Database, study: str, folder: Path) -> str:
    """Show the plan in ``folder`` as the study's, in the place of an earlier one; returns its artifact's id.

    A zip archive of the plan's two files; the same plan again changes nothing.

    Raises:
        StudyError: there is no such study.
        StorageError: the plan is larger than the database takes.
        OSError: a file of the plan cannot be read.
    """
    storage = database.optuna_storage()
    try:
        study_id = storage.get_study_id_from_name(study)
    except KeyError as error:
        raise StudyError(f"study {study!r} has no Optuna study in this database") from error
    name = f"{folder_name(study)}-plan.zip"
    # Always the same id: what Optuna knows of an artifact can be replaced, but not removed.
    artifact_id = str(uuid.uuid5(uuid.NAMESPACE_URL, f"was-search/{study}"))
    ArtifactCache(database).replace(PLAN_KIND, artifact_id, archive(folder), {"study": study})
    known = json.dumps(asdict(ArtifactMeta(artifact_id, name, "application/zip", None)))
    if storage.get_study_system_attrs(study_id).get(_ATTRIBUTE + artifact_id) != known:
        storage.set_study_system_attr(study_id, _ATTRIBUTE + artifact_id, known)
    return artifact_id


def archive(folder: Path) -> bytes:
    """The plan's two files as a zip archive: the same bytes for the same plan."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in (JSON_NAME, TENSORS_NAME):
            entry = zipfile.ZipInfo(name, _FIRST_DAY)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            packed.writestr(entry, (folder / name).read_bytes())
    return buffer.getvalue()


def _whole(found: Artifact) -> Artifact:
    return found
