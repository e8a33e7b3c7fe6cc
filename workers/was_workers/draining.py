"""Which of the cluster's nodes are about to be taken away."""

from __future__ import annotations

import logging
import math

_logger = logging.getLogger(__name__)


def draining_nodes() -> dict[str, float]:
    """Nodes that are being drained: their ids, and the seconds since the epoch at which each goes (``inf``: not known).

    A node is drained by Ray's autoscaler before it removes it, by whoever passes a cloud's preemption notice on, and
    by ``ray start --block`` itself when it gets a SIGTERM, as in a pod that is deleted. Ray has no public name for
    this; its own Train and Serve read the same table. {} where it cannot be read, as through Ray's client.
    """
    try:
        from ray._private.state import state

        found = state.get_draining_nodes()
    except Exception as error:
        _tell_once(f"{type(error).__name__}: {error}")
        return {}
    return {node: deadline / 1000.0 if deadline else math.inf for node, deadline in found.items()}


_told: list[str] = []


def _tell_once(reason: str) -> None:
    if not _told:
        _told.append(reason)
        _logger.warning("nodes that are about to be taken away are not noticed before they go: %s", reason)
