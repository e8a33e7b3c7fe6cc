"""What to say where no worker finds a place on a cluster."""

from __future__ import annotations


def no_room(gpus_per_worker: float) -> str:
    """Why no worker has a place yet, as far as the nodes' resources tell, and what helps."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    sizes = [(float(found.get("CPU", 0)), float(found.get("GPU", 0))) for found in nodes]
    fits = any(cpus >= 1 and gpus >= gpus_per_worker for cpus, gpus in sizes)
    needs = f"1 CPU and {gpus_per_worker:g} GPU" if gpus_per_worker else "1 CPU"
    shown = ", ".join(f"{cpus:g} CPU and {gpus:g} GPU" for cpus, gpus in sorted(set(sizes), reverse=True)[:4])
    why = "all nodes that have that are taken" if fits else "no node has that"
    return (
        f"no worker has a place yet: each needs {needs}, and {why} (nodes: {shown or 'none'}); waiting for room, 'ray "
        "status' shows demand; start nodes with 'ray start --address=...', or lower --gpus-per-worker"
    )
