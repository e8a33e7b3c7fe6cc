"""Ranges of workers, and the state of a run's pool."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.alter_column("control", "workers", type_=sa.Text, postgresql_using="workers::text", schema="was")
    op.add_column("run", sa.Column("pool", JSONB, nullable=False, server_default=sa.text("'{}'::jsonb")), schema="was")
