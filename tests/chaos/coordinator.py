"""`python -m tests.chaos.coordinator ...` is `was-search ...` with workers that count their evaluations."""

from __future__ import annotations

import was_workers.pool
from tests.chaos.counted_worker import CountedWorker
from was_search.service.cli.main import main

if __name__ == "__main__":
    was_workers.pool.Worker = CountedWorker  # type: ignore[misc]
    main()
