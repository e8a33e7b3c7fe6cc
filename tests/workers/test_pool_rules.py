"""The real pool keeps the contract ``WorkerPool`` as the tests' double does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

import was_workers.pool as pool_module
from tests.doubles.bowl_worker import bowl_worker
from tests.doubles.pool_rules import PATIENCE, PoolRules, settled, until
from was_search.coordinator.health import QuarantinePolicy
from was_workers.cluster import connect
from was_workers.pool import Pool
from was_workers.worker import WorkerSpec

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """One pool for all rules: each leaves two workers."""
    policy = QuarantinePolicy(slowdown=0.0, failures=0)
    with pytest.MonkeyPatch.context() as patch, connect("local", workers=3) as cluster:
        patch.setattr(pool_module, "Worker", bowl_worker(tmp_path_factory.mktemp("workers")))
        spec = WorkerSpec("m", "", "float32", "cpu", "l2")
        with Pool(cluster, spec, n_workers=2, gpus_per_worker=0.0, policy=policy) as pool:
            yield pool


class TestPool(PoolRules):
    @pytest.fixture
    def pool(self, workers: Pool) -> Pool:
        until(workers, lambda: settled(workers))
        return workers

    def reply_is_there(self, pool: Pool) -> None:  # type: ignore[override]
        ((reference, _),) = pool._calls._by_reference.items()
        assert ray.wait([reference], timeout=PATIENCE)[0]
