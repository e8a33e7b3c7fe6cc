"""Connecting to Ray, where a signal meets it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest
import ray

from was_search.process.signals import Terminated, terminable
from was_workers.cluster import connect


def test_a_signal_while_ray_starts_is_no_status_of_rays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own handler, which is in place meanwhile, exits with 15."""

    def start(**options: object) -> None:
        signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(signum))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ray, "init", start)
    with pytest.raises(Terminated) as end, terminable(), connect("local", workers=1):
        pytest.fail("it was not ended")
    assert end.value.code == 143


@pytest.mark.ray
@pytest.mark.own_ray
@pytest.mark.slow
def test_a_signal_ends_a_wait_for_workers() -> None:
    """In the middle of Ray's C code, long before what it waits for."""

    def wait() -> None:
        never = ray.remote(lambda: time.sleep(3600)).remote()
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        ray.wait([never], timeout=600)

    with pytest.raises(Terminated) as end, terminable(), connect("local", workers=1):
        wait()
    assert end.value.code == 143


def test_a_signal_after_that_is_ours_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **options: signal.signal(signal.SIGTERM, lambda *_: sys.exit(15)))
    monkeypatch.setattr(ray, "cluster_resources", dict)
    with pytest.raises(Terminated) as end, terminable(), connect("local", workers=1):
        signal.raise_signal(signal.SIGTERM)
    assert end.value.code == 143
