"""When a study's coordinator was last seen alive."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("study", sa.Column("seen_at", sa.DateTime(timezone=True)), schema="was")
