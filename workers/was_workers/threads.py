"""CPU threads of the workers on one machine."""

from __future__ import annotations

import os
from collections.abc import Iterable

from was_workers.member import Member


class ThreadShare:
    """CPU threads of a worker: a fixed number, or with ``divided`` an equal share of this machine's processors.

    Attributes:
        each: threads of one worker; 0 leaves torch's own choice.
    """

    def __init__(self, each: int, *, divided: bool) -> None:
        self.each = each
        self._divided = divided

    def divide(self, n: int, members: Iterable[Member]) -> None:
        """Divide the processors among ``n`` workers, and tell the ready ones if that changes their share."""
        share = max(1, (os.cpu_count() or 1) // max(1, n))
        if self._divided and share != self.each:
            self.each = share
            for member in members:
                if member.ready:
                    self.tell(member)

    def tell(self, member: Member) -> None:
        """Have a worker use its present share, as it may have been started with another."""
        if self._divided:
            member.actor.set_threads.remote(self.each)
