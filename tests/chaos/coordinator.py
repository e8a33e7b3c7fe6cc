"""`python -m tests.chaos.coordinator ...` is `was-search ...` with workers that count their evaluations.

It also writes down when it looks for calls past their deadline.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import was_workers.pool
from tests.chaos.counted_worker import FOLDER, CountedWorker, append
from was_search.service.cli.main import main
from was_workers.calls_in_flight import CallInFlight, CallsInFlight


class WatchedCalls(CallsInFlight):
    """Tells the run's log which workers have a call at a look for those past their deadline."""

    def overdue(self) -> list[CallInFlight]:
        workers = [call.member.place.pid for call in self.running if call.member.place is not None]
        at, found = time.monotonic(), super().overdue()
        if workers:
            append(Path(os.environ[FOLDER]), {"event": "looked", "at": at, "workers": workers})
        return found


if __name__ == "__main__":
    was_workers.pool.Worker = CountedWorker  # type: ignore[misc]
    was_workers.pool.CallsInFlight = WatchedCalls  # type: ignore[misc]
    main()
