"""One chaos run: an undisturbed study, the same study under faults, and the checks."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence

from tests.chaos.checks import Summary, Witness, check
from tests.chaos.cluster import UNDISTURBED, Cluster, Plan
from tests.chaos.faults import FAULTS, Hit

_NO_WORK_SECONDS = 400.0
"""The longest that no evaluation may be in flight: coordinator, node and workers may all have to start."""


def chaos(
    plan: Plan, kinds: Sequence[str], rng: random.Random, *, say: Callable[[str], None] = print
) -> tuple[Summary, list[Hit]]:
    """Run the study through the faults named by ``kinds``, in this order, and check the outcome.

    Raises:
        AssertionError: something was lost, doubled or changed, or the run got stuck; the message says what.
    """
    started = time.monotonic()

    def tell(words: str) -> None:
        say(f"[{time.monotonic() - started:6.1f} s] {words}")

    with Cluster(plan) as cluster:
        tell(f"cluster in {cluster.folder}")
        run_undisturbed(cluster)
        tell(f"undisturbed run of {plan.trials} trials finished")
        witness = Witness()
        hits = inject(cluster, kinds, rng, witness, tell)
        tell(f"{len(hits)} faults injected: {dict(Counter(hit.fault for hit in hits))}; {cluster.counts()}")
        finish(cluster)
        summary = check(cluster, hits, witness)
        tell(f"passed: {summary}")
        return summary, hits


def random_kinds(n: int, rng: random.Random) -> list[str]:
    """n faults drawn by their weights."""
    return rng.choices(list(FAULTS), [weight for weight, _ in FAULTS.values()], k=n)


def run_undisturbed(cluster: Cluster) -> None:
    """The same command as under faults, for another study. The one to be disturbed is started towards its end."""
    first = cluster.start_coordinator(UNDISTURBED)
    seconds = 600.0 + cluster.plan.trials

    def ended() -> bool:
        return first.process.poll() is not None

    def nearly_done() -> bool:
        counts = cluster.counts(UNDISTURBED)
        return bool(counts) and counts.get("waiting", 0) < 10

    cluster.wait_until("the undisturbed run is nearly done", lambda: ended() or nearly_done(), seconds)
    cluster.start_coordinator()
    cluster.wait_until("the undisturbed run ends", ended, seconds)
    if first.process.returncode:
        cluster.stuck("the undisturbed run failed")
    cluster.coordinators.remove(first)


def inject(
    cluster: Cluster, kinds: Sequence[str], rng: random.Random, witness: Witness, tell: Callable[[str], None]
) -> list[Hit]:
    """Inject one fault after the other, each once it finds work in flight."""
    hits: list[Hit] = []
    pace = _Pace(cluster, len(kinds))
    rivals_since: float | None = None
    for kind in kinds:
        last_seen = time.monotonic()
        hit: Hit | None = None
        while hit is None:
            cluster.supervise()
            if cluster.finished:
                cluster.stuck(f"the study finished after {len(hits)} of {len(kinds)} faults: give it more trials")
            if len(cluster.coordinators) < 2:
                rivals_since = None
            elif rivals_since is None:
                rivals_since = time.monotonic()
            elif time.monotonic() - rivals_since > _NO_WORK_SECONDS:
                cluster.stuck("two coordinators live side by side")
            if cluster.counts() and cluster.busy():
                pace.keep(len(hits))
                witness.look(cluster)
                time.sleep(rng.uniform(0.0, 1.5))
                hit = FAULTS[kind][1](cluster, rng)
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > _NO_WORK_SECONDS:
                cluster.stuck(f"no evaluation was in flight for {_NO_WORK_SECONDS:.0f} s, before {kind!r}")
            else:
                time.sleep(0.1)
        hits.append(hit)
        tell(f"{len(hits)}/{len(kinds)} {hit.fault}: {hit.what}; {cluster.counts()}")
    return hits


def finish(cluster: Cluster) -> None:
    """Let the study end in peace."""
    cluster.pace(0.0)

    def finished() -> bool:
        cluster.supervise()
        return cluster.finished and not cluster.coordinators

    cluster.wait_until("the study is finished", finished, 900.0 + cluster.plan.trials)


class _Pace:
    """Makes evaluations last longer where trials would run out before the faults."""

    def __init__(self, cluster: Cluster, n_faults: int) -> None:
        self._cluster = cluster
        self._n_faults = n_faults
        self._seconds = 0.0
        self._set(1.0)

    def keep(self, n_hits: int) -> None:
        counts = self._cluster.counts()
        left = counts.get("waiting", 0) + counts.get("running", 0)
        planned = self._cluster.plan.trials * (1 - n_hits / self._n_faults)
        self._set(1.0 if left > 1.1 * planned else 2.0 if left > 0.9 * planned else 4.0)

    def _set(self, seconds: float) -> None:
        if seconds != self._seconds:
            self._seconds = seconds
            self._cluster.pace(seconds)
