"""Studies: our row, its slots and the Optuna study of the same name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sqlalchemy import Row, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert

from was_search.errors import StudyError
from was_search.process.close_names import did_you_mean
from was_search.studies.names import check_name
from was_search.studies.slots import Slot, SlotState
from was_storage.server.database import Database
from was_storage.server.plain import plain
from was_storage.server.schema import artifact
from was_storage.server.schema import slot as slot_table
from was_storage.server.schema import study as study_table
from was_storage.studies import control_rows, optuna_study
from was_storage.studies.coordinator_lock import free, held
from was_storage.studies.session import CoordinatorSession
from was_storage.studies.slot_rows import add_slots, read_slots

PLAN_KIND = "plan"
"""Kind of the artifacts that are a study's exported plans; their meta names the study."""

_VERSIONED = ("was-search", "optuna", "torch", "transformers", "triton")
_COUNTS = (
    func.count().label("n_slots"),
    *(func.count().filter(slot_table.c.state == str(state)).label(str(state)) for state in SlotState),
    func.min(slot_table.c.loss_nats).filter(slot_table.c.state == str(SlotState.COMPLETE)).label("best"),
)


@dataclass(frozen=True)
class StudyRecord:
    """A study as the database holds it.

    Attributes:
        identity: what decides its losses (model, data, protocol, budget); never changes.
        config: the settings of the latest run; may change.
        shape: the model's shape, as :meth:`was_search.shape.ModelShape.to_json` gives it.
        epoch: how often a coordinator has taken it over.
        n_slots: its number of trials, N.
        counts: slots by state; all five states are present.
        best_loss_nats: lowest loss of a complete slot, the study's fitness in nats per token; None before the first.
        report: figures of the report data, {} before it was made.
        versions: of the packages that created it.
    """

    id: int
    name: str
    optuna_study_id: int | None
    identity: dict[str, Any]
    config: dict[str, Any]
    shape: dict[str, Any]
    epoch: int
    created_at: datetime
    n_slots: int
    counts: dict[SlotState, int]
    best_loss_nats: float | None
    report: dict[str, Any]
    versions: dict[str, str]


Records = list[StudyRecord]
Slots = list[Slot]


class StudyStore:
    """All studies of a database.

    Every method is safe to call from several processes at once, leaves nothing half-made when its process
    dies, and may be repeated. Thread-safe. Raises TransientError where the connection is lost.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def open_or_create(
        self,
        name: str,
        *,
        identity: Mapping[str, Any],
        config: Mapping[str, Any],
        shape: Mapping[str, Any],
        n_slots: int,
    ) -> StudyRecord:
        """The study ``name``, made with ``n_slots`` waiting slots, or taken up again.

        An existing study gets ``config``, and more slots where it has fewer than ``n_slots``; never fewer. What
        ``was-search set`` has said about an option holds until a run comes with another value of that option in
        its ``config``; so the same command again does not take back what was set.

        Raises:
            StudyError: a name that :func:`was_search.studies.names.check_name` refuses; no slots; an existing study
                whose ``identity`` or ``shape`` differs (each differing key is listed); an Optuna study of that
                name that is not ours.
        """
        check_name(name)
        if n_slots < 1:
            raise StudyError(f"n_slots: a study needs at least 1 trial, got {n_slots}")
        asked = {"identity": plain(dict(identity)), "shape": plain(dict(shape))}
        values = {"name": name, "config": plain(dict(config)), "versions": _versions(), **asked}
        storage = self._database.optuna_storage()
        with self._database.begin() as connection:
            connection.execute(insert(study_table).values(**values).on_conflict_do_nothing())
            row = connection.execute(select(study_table).where(study_table.c.name == name).with_for_update()).one()
            _check_same(row, asked)
            connection.execute(update(study_table).where(study_table.c.id == row.id).values(config=values["config"]))
            overrides = control_rows.settle_overrides(connection, row.id, row.config, values["config"])
            add_slots(connection, row.id, overrides.trials or n_slots)
            optuna_study.ensure(connection, storage, row.id, name, row.optuna_study_id)
        return self.get(name)

    def get(self, name: str) -> StudyRecord:
        """The study ``name``.

        Raises:
            StudyError: there is none; the message lists the studies that exist.
        """
        found = self._read(name) if name.isprintable() else []  # other names cannot be made, nor sent to the database
        if not found:
            names = [record.name for record in self.list()]
            known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise StudyError(
                f"study {name!r} does not exist; this database has "
                f"{known or 'no studies yet, was-search run makes one'}{did_you_mean(name, names)}"
            )
        return found[0]

    def id_of(self, name: str) -> int:
        """The study's id in our tables, without counting its slots.

        Raises:
            StudyError: there is none.
        """
        if not name.isprintable():
            return self.get(name).id
        with self._database.begin() as connection:
            found = connection.execute(select(study_table.c.id).where(study_table.c.name == name)).scalar()
        return self.get(name).id if found is None else int(found)

    def require_free_or_same(self, name: str, *, identity: Mapping[str, Any]) -> None:
        """Refuse at once what :meth:`open_or_create` would refuse of a name and an identity; makes nothing.

        Raises:
            StudyError: as :meth:`open_or_create`, but for the shape and an Optuna study that is not ours.
        """
        check_name(name)
        for record in self._read(name):
            _check_same(record, {"identity": plain(dict(identity))})

    def require_same(self, name: str, *, identity: Mapping[str, Any], shape: Mapping[str, Any]) -> StudyRecord:
        """The study ``name``, if it is of this ``identity`` and ``shape``.

        Raises:
            StudyError: there is none, or it differs (each differing key is listed).
        """
        record = self.get(name)
        _check_same(record, {"identity": plain(dict(identity)), "shape": plain(dict(shape))})
        return record

    def list(self) -> Records:
        """All studies, oldest first."""
        return self._read(None)

    def slots(self, name: str) -> Slots:
        """All slots of the study, by number, as they stand now; needs no coordinator's lock.

        Raises:
            StudyError: there is no such study.
        """
        record = self.get(name)
        with self._database.begin() as connection:
            return read_slots(connection, record.id)

    def set_report(self, name: str, report: Mapping[str, Any]) -> None:
        """Replace the study's report.

        Raises:
            StudyError: there is no such study.
        """
        statement = update(study_table).where(study_table.c.name == name).values(report=plain(dict(report)))
        with self._database.begin() as connection:
            changed = connection.execute(statement).rowcount
        if not changed:
            self.get(name)

    def require_idle(self, name: str) -> StudyRecord:
        """The study ``name``, if no coordinator runs it.

        Raises:
            StudyError: there is no such study, or a coordinator is running it.
        """
        record = self.get(name)
        with self._database.begin() as connection:
            if held(connection, record.id):
                raise _being_run(name)
        return record

    def delete(self, name: str) -> None:
        """Delete the study, its slots, its plan and its Optuna study.

        Raises:
            StudyError: there is no such study, or a coordinator is running it.
        """
        record = self.get(name)
        storage = self._database.optuna_storage()
        with self._database.begin() as connection:
            if not free(connection, record.id):
                raise _being_run(name)
            query = select(study_table.c.optuna_study_id).where(study_table.c.id == record.id).with_for_update()
            optuna_study.drop(storage, connection.execute(query).scalar())
            plans = (artifact.c.kind == PLAN_KIND) & (artifact.c.meta["study"].astext == name)
            connection.execute(delete(artifact).where(plans))
            connection.execute(delete(study_table).where(study_table.c.id == record.id))

    def coordinate(self, name: str) -> CoordinatorSession:
        """The one coordinator's session on the study (:class:`CoordinatorSession`); entering it takes the lock.

        Raises:
            StudyError: there is no such study.
        """
        record = self.get(name)
        return CoordinatorSession(self._database, record.id, name)

    def _read(self, name: str | None) -> Records:
        counts = select(slot_table.c.study_id, *_COUNTS).group_by(slot_table.c.study_id).subquery()
        query = select(study_table, *(c for c in counts.c if c.name != "study_id"))
        query = query.outerjoin(counts, counts.c.study_id == study_table.c.id).order_by(study_table.c.id)
        if name is not None:
            query = query.where(study_table.c.name == name)
        with self._database.begin() as connection:
            return [_record(row) for row in connection.execute(query)]


def _being_run(name: str) -> StudyError:
    return StudyError(f"study {name!r} is being run by a coordinator; stop it before deleting the study")


def _check_same(row: Row[Any] | StudyRecord, asked: dict[str, dict[str, Any]]) -> None:
    differences = [line for part, wanted in asked.items() for line in _differences(getattr(row, part), wanted)]
    if differences:
        raise StudyError(
            f"study {row.name!r} exists with other settings; choose another name or the same settings:\n  "
            + "\n  ".join(differences)
        )


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], under: str = "") -> Iterator[str]:
    """A line for each key that differs; where the values are mappings, a line for each of their keys that does."""
    missing = object()
    for key in sorted({*stored, *wanted}):
        has, want = stored.get(key, missing), wanted.get(key, missing)
        if isinstance(has, dict) and isinstance(want, dict):
            yield from _differences(has, want, f"{under}{key}, ")
        elif has != want:
            shown = ["nothing" if value is missing else _short(value) for value in (has, want)]
            yield f"{under}{key}: study has {shown[0]}, asked for {shown[1]}"


def _short(value: Any) -> str:
    shown = value if isinstance(value, str) else repr(value)
    return shown if len(shown) <= 120 else shown[:117] + "..."


def _versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _record(row: Row[Any]) -> StudyRecord:
    fields = row._mapping
    return StudyRecord(
        id=row.id,
        name=row.name,
        optuna_study_id=row.optuna_study_id,
        identity=row.identity,
        config=row.config,
        shape=row.shape,
        epoch=row.epoch,
        created_at=row.created_at,
        n_slots=row.n_slots or 0,
        counts={state: fields[str(state)] or 0 for state in SlotState},
        best_loss_nats=row.best,
        report=row.report,
        versions=row.versions,
    )
