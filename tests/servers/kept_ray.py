"""One local Ray for the tests of a process, one after another: starting it takes seconds, and few want a fresh one.

Tests marked ``own_ray`` get one of their own, which ends with them.
"""

from __future__ import annotations

from typing import Any

import ray


class KeptRay:
    """Takes the place of ``ray.init`` and ``ray.shutdown``: a local Ray stays for who asks for the same next."""

    def __init__(self) -> None:
        self.keep = True
        self._init, self._shutdown = ray.init, ray.shutdown
        self._kept: dict[str, Any] | None = None
        ray.init, ray.shutdown = self.init, self.shutdown

    def init(self, **options: Any) -> Any:
        if self.keep and options == self._kept:
            return None
        self.end()
        context = self._init(**options)
        if self.keep and options.get("address") == "local":
            self._kept = options
        return context

    def shutdown(self) -> None:
        if self._kept is None:
            self._shutdown()

    def end(self) -> None:
        if self._kept is not None:
            self._kept = None
            self._shutdown()
