"""Studies, slots, what is asked of a study, the runs of its coordinators, and cached artifacts."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    now = sa.func.now()
    zero = sa.text("0")
    empty = sa.text("'{}'::jsonb")
    op.create_table(
        "study",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, nullable=False, unique=True),
        sa.Column("optuna_study_id", sa.Integer),
        sa.Column("identity", JSONB, nullable=False),
        sa.Column("config", JSONB, nullable=False),
        sa.Column("shape", JSONB, nullable=False),
        sa.Column("epoch", sa.Integer, nullable=False, server_default=zero),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=now),
        sa.Column("versions", JSONB, nullable=False, server_default=empty),
        sa.Column("report", JSONB, nullable=False, server_default=empty),
        schema="was",
    )
    op.create_table(
        "slot",
        sa.Column("study_id", sa.Integer, sa.ForeignKey("was.study.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("state", sa.Text, nullable=False, server_default=sa.text("'waiting'")),
        sa.Column("attempt", sa.Integer, nullable=False, server_default=zero),
        sa.Column("epoch", sa.Integer, nullable=False, server_default=zero),
        sa.Column("origin", sa.Text, nullable=False, server_default=sa.text("''")),
        sa.Column("params", JSONB),
        sa.Column("distributions", JSONB),
        sa.Column("attrs", JSONB),
        sa.Column("levels", ARRAY(sa.Double)),
        sa.Column("sparsities", ARRAY(sa.Double)),
        sa.Column("losses", ARRAY(sa.Double)),
        sa.Column("loss_nats", sa.Double),
        sa.Column("nll_nats", sa.Double),
        sa.Column("tokens", sa.BigInteger, nullable=False, server_default=zero),
        sa.Column("seconds", sa.Double, nullable=False, server_default=zero),
        sa.Column("achieved", sa.Double),
        sa.Column("worker", sa.Text, nullable=False, server_default=sa.text("''")),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True)),
        sa.Column("trial_id", sa.Integer),
        sa.Column("error", sa.Text, nullable=False, server_default=sa.text("''")),
        sa.Column("started_at", sa.DateTime(timezone=True)),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.CheckConstraint("state IN ('waiting', 'running', 'complete', 'stopped', 'failed')", name="slot_state"),
        schema="was",
    )
    op.create_table(
        "control",
        sa.Column("study_id", sa.Integer, sa.ForeignKey("was.study.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("wish", sa.Text, nullable=False, server_default=sa.text("'run'")),
        sa.Column("wished_at", sa.DateTime(timezone=True), nullable=False, server_default=now),
        sa.Column("trials", sa.Integer),
        sa.Column("workers", sa.Text),
        sa.Column("max_seconds", sa.Double),
        sa.Column("max_gpu_seconds", sa.Double),
        sa.Column("max_failures", sa.Integer),
        sa.Column("patience", sa.Integer),
        sa.CheckConstraint("wish IN ('run', 'pause', 'drain', 'cancel')", name="control_wish"),
        schema="was",
    )
    op.create_table(
        "run",
        sa.Column("study_id", sa.Integer, sa.ForeignKey("was.study.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("epoch", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("coordinator", sa.Text, nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False, server_default=now),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False, server_default=now),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.Column("ending", sa.Text, nullable=False, server_default=sa.text("''")),
        sa.Column("detail", sa.Text, nullable=False, server_default=sa.text("''")),
        sa.Column("paused", sa.Boolean, nullable=False, server_default=sa.text("false")),
        sa.Column("workers", sa.Integer, nullable=False, server_default=zero),
        sa.Column("gpus_per_worker", sa.Double, nullable=False, server_default=zero),
        sa.Column("seconds", sa.Double, nullable=False, server_default=zero),
        sa.Column("worker_seconds", sa.Double, nullable=False, server_default=zero),
        sa.Column("gpu_seconds", sa.Double, nullable=False, server_default=zero),
        sa.Column("pool", JSONB, nullable=False, server_default=empty),
        schema="was",
    )
    op.create_table(
        "artifact",
        sa.Column("kind", sa.Text, primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("meta", JSONB, nullable=False, server_default=empty),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=now),
        schema="was",
    )
    # Payloads are compressed already: keep Postgres from trying again.
    op.execute("ALTER TABLE was.artifact ALTER COLUMN payload SET STORAGE EXTERNAL")
