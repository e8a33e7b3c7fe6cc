"""Our tables, in a schema of their own beside Optuna's."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from was_search.studies.control import Wish
from was_search.studies.slots import SlotState

SCHEMA = "was"
HEAD = "0002"
"""The newest revision in ``migrations/versions``."""

STATES = tuple(str(state) for state in SlotState)

metadata = MetaData(schema=SCHEMA)

study = Table(
    "study",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("optuna_study_id", Integer),
    Column("identity", JSONB, nullable=False),
    Column("config", JSONB, nullable=False),
    Column("shape", JSONB, nullable=False),
    Column("epoch", Integer, nullable=False, server_default=text("0")),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("versions", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    Column("report", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    Column("seen_at", DateTime(timezone=True)),
)
"""``seen_at``, when its coordinator was last seen, tells a dead one also where a pooler keeps its lock."""

slot = Table(
    "slot",
    metadata,
    Column("study_id", Integer, ForeignKey(study.c.id, ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("state", Text, nullable=False, server_default=text(f"'{SlotState.WAITING}'")),
    Column("attempt", Integer, nullable=False, server_default=text("0")),
    Column("epoch", Integer, nullable=False, server_default=text("0")),
    Column("origin", Text, nullable=False, server_default=text("''")),
    Column("params", JSONB(none_as_null=True)),
    Column("distributions", JSONB(none_as_null=True)),
    Column("attrs", JSONB(none_as_null=True)),
    Column("levels", ARRAY(Double)),
    Column("sparsities", ARRAY(Double)),
    Column("losses", ARRAY(Double)),
    Column("loss_nats", Double),
    Column("nll_nats", Double),
    Column("tokens", BigInteger, nullable=False, server_default=text("0")),
    Column("seconds", Double, nullable=False, server_default=text("0")),
    Column("achieved", Double),
    Column("worker", Text, nullable=False, server_default=text("''")),
    Column("lease_expires_at", DateTime(timezone=True)),
    Column("trial_id", Integer),
    Column("error", Text, nullable=False, server_default=text("''")),
    Column("started_at", DateTime(timezone=True)),
    Column("finished_at", DateTime(timezone=True)),
    CheckConstraint("state IN ({})".format(", ".join(f"'{state}'" for state in STATES)), name="slot_state"),
)

control = Table(
    "control",
    metadata,
    Column("study_id", Integer, ForeignKey(study.c.id, ondelete="CASCADE"), primary_key=True),
    Column("wish", Text, nullable=False, server_default=text(f"'{Wish.RUN}'")),
    Column("wished_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("trials", Integer),
    Column("workers", Text),
    Column("max_seconds", Double),
    Column("max_gpu_seconds", Double),
    Column("max_failures", Integer),
    Column("patience", Integer),
    CheckConstraint("wish IN ({})".format(", ".join(f"'{wish}'" for wish in Wish)), name="control_wish"),
)
"""One row a study, written by whoever asks something of it, read by its coordinator. NULL leaves the run's setting."""

run = Table(
    "run",
    metadata,
    Column("study_id", Integer, ForeignKey(study.c.id, ondelete="CASCADE"), primary_key=True),
    Column("epoch", Integer, primary_key=True, autoincrement=False),
    Column("coordinator", Text, nullable=False),
    Column("started_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("seen_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("ended_at", DateTime(timezone=True)),
    Column("ending", Text, nullable=False, server_default=text("''")),
    Column("detail", Text, nullable=False, server_default=text("''")),
    Column("paused", Boolean, nullable=False, server_default=text("false")),
    Column("workers", Integer, nullable=False, server_default=text("0")),
    Column("gpus_per_worker", Double, nullable=False, server_default=text("0")),
    Column("seconds", Double, nullable=False, server_default=text("0")),
    Column("worker_seconds", Double, nullable=False, server_default=text("0")),
    Column("gpu_seconds", Double, nullable=False, server_default=text("0")),
    Column("pool", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
)
"""One row for every coordinator's turn at a study, written by that coordinator alone."""

artifact = Table(
    "artifact",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("meta", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    Column("payload", LargeBinary, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)
