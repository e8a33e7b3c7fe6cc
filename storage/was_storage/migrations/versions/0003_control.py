"""What is asked of a study while it runs, and the runs of its coordinators."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    now = sa.func.now()
    zero = sa.text("0")
    op.create_table(
        "control",
        sa.Column("study_id", sa.Integer, sa.ForeignKey("was.study.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("wish", sa.Text, nullable=False, server_default=sa.text("'run'")),
        sa.Column("wished_at", sa.DateTime(timezone=True), nullable=False, server_default=now),
        sa.Column("trials", sa.Integer),
        sa.Column("workers", sa.Integer),
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
        schema="was",
    )
    op.execute("INSERT INTO was.control (study_id) SELECT id FROM was.study")
