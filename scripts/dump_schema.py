"""Write a dump of a small study as this version stores it: what later versions must be able to read.

`python scripts/dump_schema.py` writes `tests/storage/dumps/REVISION.sql`. Run it once for every new revision of the
schema or of Optuna's tables; dumps of older revisions stay as they are, and `tests/storage/test_upgrades.py` reads them
all.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in (".", "storage", "workers", "kernels")]

from tests.storage.small_study import new_study, vector  # noqa: E402
from was_search.slots import SlotState  # noqa: E402
from was_storage.cache import ArtifactCache  # noqa: E402
from was_storage.database import Database  # noqa: E402
from was_storage.embedded import EmbeddedServer  # noqa: E402
from was_storage.postgres_binaries import bin_folder  # noqa: E402
from was_storage.schema import HEAD  # noqa: E402
from was_storage.studies import StudyStore  # noqa: E402

FOLDER = ROOT / "tests" / "storage" / "dumps"
STUDY = "an older study"


def fill(database: Database) -> None:
    """A study with a slot in every state but running (a coordinator that ends puts those back), and an artifact."""
    new_study(database, 6, name=STUDY)
    with StudyStore(database).coordinate(STUDY) as session:
        for number, state in enumerate((SlotState.COMPLETE, SlotState.STOPPED, SlotState.FAILED, SlotState.COMPLETE)):
            session.propose(number, **vector(number))
            attempt = session.start(number, "worker-0", 60)
            losses = None if state is SlotState.FAILED else np.array([2.5, 2.25, 2.0 + number])
            error = "lost 3 times" if state is SlotState.FAILED else ""
            session.finish(
                number,
                attempt,
                state,
                losses=losses,
                tokens=300,
                seconds=1.5,
                achieved=0.6,
                worker="worker-0",
                error=error,
            )
        session.propose(4, **vector(4))
    StudyStore(database).set_report(STUDY, {"exported": {"candidate": "slot 0"}})
    ArtifactCache(database).put("histograms", "key", b"payload", {"blocks": 2})


def dump(url: str, home: Path) -> str:
    """Plain SQL of INSERTs, without owners and psql's own commands."""
    libpq = url.replace("postgresql+psycopg2://", "postgresql://")
    command = [str(bin_folder(home) / "pg_dump"), "--no-owner", "--no-privileges", "--inserts", libpq]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [line for line in text.splitlines() if not line.startswith(("\\", "--")) and line.strip()]
    return "\n".join(lines) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="was-dump-") as folder:
        home = Path(folder)
        home.chmod(0o755)
        with EmbeddedServer.start(home / "postgres") as server:
            url = server.url("dumped")
            with Database.open(url) as database:
                fill(database)
                text = dump(database.url, home / "postgres")
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{HEAD}.sql"
    path.write_text(text, encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {len(text)} characters")


if __name__ == "__main__":
    main()
