from __future__ import annotations

import socket
import urllib.request
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.servers.ports import free_port
from tests.was_search.service.reports.test_progress import State
from was_search.errors import ResourceError
from was_search.service.reports.metrics import StudyMetrics, served
from was_search.studies.pool_state import PoolState, Quarantined
from was_search.studies.slots import Slot, SlotState

COMPLETE = Slot(3, SlotState.COMPLETE, loss_nats=1.25, tokens=1000, seconds=2.0)
STOPPED = Slot(4, SlotState.STOPPED, loss_nats=1.5, tokens=200, seconds=0.5)
POOL = PoolState("2:64", ready=2, pending=61, quarantined=(Quarantined("worker-3@h:7", "slow", "2026-01-01"),))
STATES = [
    State(),
    State(finished=1, best=COMPLETE, current=COMPLETE),
    State(finished=2, stopped=1, saved=0.4, best=COMPLETE, current=STOPPED),
    State(finished=3, stopped=1, failed=1, saved=0.4, best=COMPLETE, current=Slot(5, SlotState.FAILED), pool=POOL),
]


def scrape(port: int) -> dict[tuple[str, str], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as reply:
        text = reply.read().decode()
    return {
        (sample.name, sample.labels.get("state", sample.labels.get("le", ""))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("study") == 'llama "60" \\ %'
    }


def test_what_is_scraped_is_the_studys_state():
    port = free_port()
    with served(str(port), 'llama "60" \\ %') as show:
        for state in STATES:
            show(state)
        found = scrape(port)
    workers = {state: value for (name, state), value in found.items() if name == "was_search_workers"}
    assert workers == {"ready": 2, "loading": 0, "pending": 61, "draining": 0, "quarantined": 1}
    slots = {state: value for (name, state), value in found.items() if name == "was_search_slots"}
    assert slots == {"complete": 1, "stopped": 1, "failed": 1, "unfinished": 17}
    assert found["was_search_best_loss_nats", ""] == 1.25
    assert found["was_search_tokens_saved_ratio", ""] == 0.4
    assert found["was_search_evaluations_total", "stopped"] == 1
    assert found["was_search_tokens_total", ""] == 1200
    assert found["was_search_evaluation_seconds_count", ""] == 3
    assert found["was_search_evaluation_seconds_bucket", "1.0"] == 2  # the failed slot took no time
    with pytest.raises(OSError, match="refused"):
        scrape(port)  # it ends with the search


def test_before_the_first_complete_slot_there_is_no_best():
    metrics = StudyMetrics("s")
    metrics.update(replace(STATES[0], current=None))
    assert metrics.registry.get_sample_value("was_search_best_loss_nats", {"study": "s"}) is None


def test_no_address_serves_nothing():
    with served("", "s") as show:
        show(STATES[0])


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(ResourceError, match=rf"metrics: cannot listen on 127\.0\.0\.1:{port}"),
            served(str(port), "s"),
        ):
            pass
