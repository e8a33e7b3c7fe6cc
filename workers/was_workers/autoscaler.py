"""Whether a cluster may get nodes by itself."""

from __future__ import annotations

import json
import logging
from typing import Any

_STATUS_KEY = b"__autoscaling_status"
"""Where the first autoscaler leaves its report; the second one writes into the cluster's status instead."""

_BY_HAND = "node_"
"""What the reports put before a node's id where no autoscaler has a kind of node for it."""

_ANSWER_SECONDS = 10.0

_logger = logging.getLogger(__name__)


def may_grow() -> bool:
    """Whether an autoscaler may add nodes to the cluster; True where that cannot be told.

    A head that was started by hand has an autoscaler's process too, which adds no nodes and only reports them. Ray has
    no public name for the difference: it shows in the kinds of nodes, which only an autoscaler that adds them knows.
    """
    import ray
    from ray.util.client import ray as client

    try:
        if not client.is_connected():  # type: ignore[no-untyped-call]
            return _asked()
        return bool(ray.get(ray.remote(num_cpus=0)(_asked).remote(), timeout=_ANSWER_SECONDS))
    except Exception as error:  # whatever Ray raises from its private parts
        _logger.info("whether the cluster has an autoscaler cannot be told: %s: %s", type(error).__name__, error)
        return True


def _asked() -> bool:
    """Ask from within the cluster."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2

    asked = GcsClient(address=ray.get_runtime_context().gcs_address)
    status = autoscaler_pb2.GetClusterStatusReply()  # type: ignore[attr-defined]
    status.ParseFromString(asked.get_cluster_status())
    return adds_nodes(asked.internal_kv_get(_STATUS_KEY, None), status)


def adds_nodes(report: bytes | None, status: Any) -> bool:
    """Whether an autoscaler that adds nodes has left ``report`` (JSON) or its part of the cluster's ``status``."""
    if report:
        kinds = ((json.loads(report).get("autoscaler_report") or {}).get("node_type_mapping") or {}).values()
        if any(not kind.startswith(_BY_HAND) for kind in kinds):
            return True
    reports = status.autoscaling_state.autoscaler_state_version > 0
    return reports and any(node.ray_node_type_name for node in status.cluster_resource_state.node_states)
