"""Ports for servers of tests."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """One below those that the system gives to clients: a server that restarts must find it free again."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no free port between 20000 and 32000")
