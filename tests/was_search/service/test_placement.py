"""Where workers run on a cluster, by what it has and by what may come."""

from __future__ import annotations

import pytest

import was_workers.autoscaler as autoscaler
from was_search.errors import ResourceError
from was_search.service.placement import Placement, placed_on_workers
from was_search.service.settings import Settings
from was_workers.cluster import Cluster

WITHOUT = Cluster(False, "10.0.0.1:6379", 16.0, 0.0)


def placed(cluster: Cluster = WITHOUT, **settings: object) -> Placement:
    return placed_on_workers(Settings(ray=cluster.address, dtype="float32", **settings), lambda: cluster)  # type: ignore[arg-type]


@pytest.fixture
def grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoscaler, "may_grow", lambda: True)


@pytest.fixture
def stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoscaler, "may_grow", lambda: False)


@pytest.mark.parametrize("asked", [{"device": "cuda"}, {"gpus_per_worker": 0.5}])
def test_gpus_that_an_autoscaler_may_add_are_waited_for(grows, caplog, asked: dict[str, object]) -> None:
    """Before, groups of nodes that start from none were refused."""
    assert placed(**asked) == Placement("cuda", 0.5 if "gpus_per_worker" in asked else 1.0, "float32")
    assert not caplog.records


def test_workers_without_gpus_where_some_may_come_are_said(grows, caplog) -> None:
    """Before, a whole run was made on the CPUs of nodes that have GPUs, without a word."""
    assert placed() == Placement("cpu", 0.0, "float32")
    (record,) = caplog.records
    assert record.getMessage().startswith("the workers run without GPUs: no node of the cluster at '10.0.0.1:6379' has")
    assert "--device cuda waits" in record.getMessage()


@pytest.mark.parametrize("asked", [{"device": "cpu"}, {"gpus_per_worker": 0.0}])
def test_who_wants_no_gpu_is_told_nothing(grows, caplog, asked: dict[str, object]) -> None:
    assert placed(**asked).device == "cpu"
    assert not caplog.records


@pytest.mark.parametrize(
    ("asked", "option"), [({"device": "cuda"}, "--device cuda"), ({"gpus_per_worker": 2.0}, "--gpus-per-worker 2")]
)
def test_a_cluster_that_stays_without_gpus_is_refused_as_that(stays, asked: dict[str, object], option: str) -> None:
    """Before, doctor was to look at this machine."""
    with pytest.raises(
        ResourceError, match=f"{option} was asked for and no node of the cluster .* has a GPU .it has 16"
    ):
        placed(**asked)


def test_a_cluster_with_gpus_takes_them(stays, caplog) -> None:
    cluster = Cluster(False, "10.0.0.1:6379", 16.0, 4.0)
    assert placed(cluster) == Placement("cuda", 1.0, "float32")
    assert placed(cluster, gpus_per_worker=0.0) == Placement("cpu", 0.0, "float32")
    assert placed() == Placement("cpu", 0.0, "float32")
    assert not caplog.records
