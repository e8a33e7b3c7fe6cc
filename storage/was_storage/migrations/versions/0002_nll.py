"""The NLL beside the loss of a slot, which may be another fitness from now on."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("slot", sa.Column("nll_nats", sa.Double), schema="was")
    # Until now every loss was the NLL.
    op.execute("UPDATE was.slot SET nll_nats = loss_nats")
