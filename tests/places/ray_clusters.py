"""What clusters of Ray 2.60 tell of themselves: nodes, and what their autoscalers have left."""

from __future__ import annotations

import json
from typing import Any

from ray.core.generated import autoscaler_pb2

_ID = "eb718f56223ea0de74aa2721969295690a14deece991d70afab40ef5"


def nodes(*sizes: tuple[float, float]) -> list[dict[str, Any]]:
    """``ray.nodes()`` of a cluster whose nodes have so many CPUs and GPUs."""
    return [{"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus, "memory": 1.0}} for cpus, gpus in sizes]


def started_by_hand() -> tuple[bytes | None, Any]:
    """``ray start --head``: the process of the autoscaler reports nodes, and adds none."""
    return _report({_ID: f"node_{_ID}"}), _status("", version=0)


def started_by_hand_second() -> tuple[bytes | None, Any]:
    """The same with ``RAY_enable_autoscaler_v2=1``."""
    return None, _status("", version=5)


def launched() -> tuple[bytes | None, Any]:
    """``ray up``, or ``ray start --head --autoscaling-config=...``: no node is there but the head."""
    return _report({"f" * 51 + "00000": "ray.head.default"}), _status("ray.head.default", version=0)


def on_kubernetes() -> tuple[bytes | None, Any]:
    """KubeRay with its autoscaler (version 2), whose groups are kinds of nodes."""
    return None, _status("headgroup", version=7)


def on_kubernetes_fixed() -> tuple[bytes | None, Any]:
    """KubeRay without an autoscaler: its head runs with ``--no-monitor``."""
    return None, _status("headgroup", version=0)


def just_started() -> tuple[bytes | None, Any]:
    """A head whose autoscaler has not reported yet."""
    return _report(None), _status("", version=0)


def _report(kinds: dict[str, str] | None) -> bytes:
    report = None if kinds is None else {"active_nodes": {}, "node_type_mapping": kinds, "legacy": True}
    return json.dumps({"monitor_pid": 7, "autoscaler_report": report}).encode()


def _status(kind: str, *, version: int) -> Any:
    reply = autoscaler_pb2.GetClusterStatusReply()
    reply.cluster_resource_state.node_states.add(ray_node_type_name=kind)
    if version:
        reply.autoscaling_state.autoscaler_state_version = version
    return reply
