"""Says every few seconds that a coordinator is alive, whatever else it does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from was_search.errors import TransientError, WasError

BEAT_SECONDS = 5.0
_logger = logging.getLogger(__name__)


class Pulse:
    """A thread that calls ``beat`` every :data:`BEAT_SECONDS` from :meth:`start` to :meth:`stop`.

    A beat that fails for a moment is left out; after one that fails for good there are no more, since whoever writes
    next meets the same error.
    """

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat = beat
        self._stopped = threading.Event()

    def start(self) -> None:
        self._stopped.clear()
        threading.Thread(target=self._run, args=(self._stopped,), name="coordinator's pulse", daemon=True).start()

    def stop(self) -> None:
        """No beat begins after this, but one may be under way. Idempotent."""
        self._stopped.set()

    def _run(self, stopped: threading.Event) -> None:
        while not stopped.wait(BEAT_SECONDS):
            try:
                self._beat()
            except TransientError:
                continue
            except WasError as error:
                _logger.info("the coordinator's pulse has ended: %s", error)
                return
