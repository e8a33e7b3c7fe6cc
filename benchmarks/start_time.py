"""Measure time and memory from nothing to a sparse model: from a plain checkpoint, or from a folder laid out for it.

    python -m benchmarks.start_time /tmp/start --gigabytes 1

Makes a random Llama in bfloat16 of about the given size once, saves it with a uniform plan, and starts it in a
process of its own each time, the two ways by turns. Modules are imported before the clock starts; each start ends
with a short forward, so that what was only mapped has been read. Seconds are of the clock and of the processor (user
and system).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.conditions import conditions
from benchmarks.harness.rows import append_row
from scripts import make_random_model as maker
from was_search.checkpoints.column_layout import save_columns
from was_search.checkpoints.fingerprint import fingerprint
from was_search.checkpoints.load import load_model, resolve_model
from was_search.checkpoints.structure import find_structure
from was_search.masks.masked_model import structure_norms
from was_search.plan import Plan

RESULTS = Path(__file__).parent / "results" / "start_time.jsonl"
WAYS = ("transposed", "laid out")


def make(folder: Path, gigabytes: float) -> None:
    """Write a checkpoint, its plan, and a folder with both laid out for decoding."""
    width, ff = 2048, 5504
    block = 2 * (4 * width * width + 3 * width * ff)
    maker.SHAPES["start"] = {
        "hidden_size": width,
        "intermediate_size": ff,
        "num_hidden_layers": max(1, round(gigabytes * 1e9 / block)),
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 2048,
        "vocab_size": 8000,
    }
    maker.make_random_model(folder / "checkpoint", "start")
    source = resolve_model(str(folder / "checkpoint"))
    model = load_model(source, dtype="bfloat16")
    structure = find_structure(model)
    norms = structure_norms(structure, "l2")
    shape = (len(structure.blocks), 7)
    plan = Plan(
        model="random",
        revision="",
        fingerprint=fingerprint(source),
        shape=structure.shape,
        score="l2",
        budget=0.5,
        dense_prefix=1,
        sparsities=np.full(shape, 0.5),
        thresholds=np.full(shape, 0.1, np.float32),
        norms=tuple(tuple(norm.numpy() for norm in row) for row in norms),
    )
    plan.save(folder / "plan")
    save_columns(model, plan, source, folder / "laid-out")


def start(folder: Path, way: str) -> dict[str, Any]:
    """Start a model in this process; returns seconds to it and to its first token, and peak memory."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    from was_kernels import load_sparse, sparsify

    started, worked = time.perf_counter(), time.process_time()
    if way == "laid out":
        model = load_sparse(folder / "laid-out", device="cpu").model
    else:
        model = load_model(str(folder / "checkpoint"), dtype="bfloat16")
        sparsify(model, Plan.load(folder / "plan"))
    ready, ready_worked = time.perf_counter(), time.process_time()
    after_load = memory()
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3]]))
    return {
        "ready_s": ready - started,
        "ready_cpu_s": ready_worked - worked,
        "first_token_s": time.perf_counter() - started,
        "first_token_cpu_s": time.process_time() - worked,
        "ready": after_load,
        "peak": memory(),
    }


def memory() -> dict[str, float]:
    """This process's memory in GB: its own, that mapped from files, and the most of both together."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) * 1024 / 1e9 for name, key in _MEMORY.items()}


_MEMORY = {"own_gb": "RssAnon", "mapped_gb": "RssFile", "peak_gb": "VmHWM"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--start", choices=WAYS, help="start once in this process and print what it took")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(options.folder, options.start)))
        return
    if not (options.folder / "laid-out" / "columns.json").exists():
        make(options.folder, options.gigabytes)
    size = sum(path.stat().st_size for path in (options.folder / "laid-out").glob("columns-*.safetensors"))
    for _ in range(options.repeats):
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.start_time", str(options.folder), "--start", way]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            row = {
                "way": way,
                "weights_gb": size / 1e9,
                **found,
                **conditions("cpu"),
            }
            append_row(options.output, row)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
