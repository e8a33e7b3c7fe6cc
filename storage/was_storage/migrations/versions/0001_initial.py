"""Studies, slots and cached artifacts."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    now = sa.func.now()
    empty = sa.text("'{}'::jsonb")
    op.create_table(
        "study",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, nullable=False, unique=True),
        sa.Column("optuna_study_id", sa.Integer),
        sa.Column("identity", JSONB, nullable=False),
        sa.Column("config", JSONB, nullable=False),
        sa.Column("shape", JSONB, nullable=False),
        sa.Column("epoch", sa.Integer, nullable=False, server_default=sa.text("0")),
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
        sa.Column("attempt", sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column("epoch", sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column("origin", sa.Text, nullable=False, server_default=sa.text("''")),
        sa.Column("params", JSONB),
        sa.Column("distributions", JSONB),
        sa.Column("attrs", JSONB),
        sa.Column("levels", ARRAY(sa.Double)),
        sa.Column("sparsities", ARRAY(sa.Double)),
        sa.Column("losses", ARRAY(sa.Double)),
        sa.Column("loss_nats", sa.Double),
        sa.Column("tokens", sa.BigInteger, nullable=False, server_default=sa.text("0")),
        sa.Column("seconds", sa.Double, nullable=False, server_default=sa.text("0")),
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
