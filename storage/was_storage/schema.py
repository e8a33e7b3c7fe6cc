"""Our tables, in a schema of their own beside Optuna's."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
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

from was_search.slots import SlotState

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
)

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
