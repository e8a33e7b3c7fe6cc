"""Time what masks cost where all weights are read anyway: evaluations of a search, and prompts of a sparse model.

    python -m benchmarks.masked_forward --model llama-2-7b
    python -m benchmarks.masked_forward --model was_search/demo_data/model --dtype bf16

A model is a shape of ``scripts/make_random_model.py`` (random weights) or a folder. Evaluations are the workers':
losses of every token, counts of dropped channels, masks of one sparsity everywhere, made by the fused operation or, to
compare, by plain torch; the dense model is timed beside them. Prompts are forwards that fill a cache and give the
last token's logits: dense, and with a plan applied that masks prompts or leaves them dense. Tokens are random. The
ways are timed by turns; the median of each is kept. One JSON line a way is appended to
benchmarks/results/masked_forward.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.conditions import conditions
from benchmarks.harness.random_models import DTYPES, build, plan_at
from benchmarks.harness.rows import append_row
from scripts.make_random_model import SHAPES
from was_kernels.pass_ops import ops_for
from was_kernels.runtime.sparse_model import sparsify
from was_search.masks.evaluation import evaluate_thresholds
from was_search.masks.masked_model import MaskedModel
from was_search.plan import Plan
from was_search.texts.protocol import EvaluationProtocol, TokenSet

RESULTS = Path(__file__).parent / "results" / "masked_forward.jsonl"

Way = Callable[[], Any]


def evaluations(model: Any, plan: Plan, tokens: Tensor) -> dict[str, Way]:
    """Evaluations of ``tokens`` [n, length] in one batch, by name."""
    masked = MaskedModel.of(model, "l2")
    fused = dataclasses.replace(masked, ops=ops_for(tokens.device))
    protocol = EvaluationProtocol(
        data="random", data_hash="", split="search", sequence_length=tokens.shape[1], stride=tokens.shape[1],
        n_sequences=len(tokens), bos=False, dtype="", batch_size=len(tokens), dense_prefix=1, tokens_hash="",
    )  # fmt: skip
    data = TokenSet.of(protocol, tokens.cpu().numpy())

    def way(model: MaskedModel, thresholds: Any) -> Way:
        return lambda: evaluate_thresholds(model, data, thresholds)

    return {
        "evaluation, dense": way(masked, None),
        "evaluation, masked": way(fused, plan.thresholds),
        "evaluation, masked by plain torch": way(masked, plan.thresholds),
    }


def prompts(model: Any, tokens: Tensor) -> Way:
    """Forwards of ``tokens`` [n, length] that fill a cache."""

    def forward() -> Any:
        with torch.inference_mode():
            return model(tokens, use_cache=True, logits_to_keep=1).logits

    return forward


def medians(ways: dict[str, Way], repeats: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of each way, after a first time that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            _wait(device)
            started = time.perf_counter()
            way()
            _wait(device)
            taken[name].append(1e3 * (time.perf_counter() - started))
    return {name: median(times[1:]) for name, times in taken.items()}


def measure(model: Any, tokens: Tensor, sparsity: float, repeats: int) -> dict[str, float]:
    """Milliseconds of every way."""
    plan = plan_at(model, sparsity)
    found = medians(evaluations(model, plan, tokens), repeats, tokens.device)
    found |= medians({"prompt, dense": prompts(model, tokens)}, repeats, tokens.device)
    for name, prefill in (("masked", "masked"), ("left dense by the plan", "dense")):
        with sparsify(model, dataclasses.replace(plan, prefill=prefill)) as sparse:  # type: ignore[arg-type]
            found |= medians({f"prompt, {name}": prompts(sparse, tokens)}, repeats, tokens.device)
    found |= medians({"prompt, dense again": prompts(model, tokens)}, repeats, tokens.device)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-2-7b", help=f"{', '.join(SHAPES)}, or a folder")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    model = build(options.model, DTYPES[options.dtype])
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.config.vocab_size, (options.batch, options.length))
    found = measure(model, torch.as_tensor(tokens, device="cuda"), options.sparsity, options.repeats)
    for name, ms in found.items():
        dense = found[f"{name.split(',')[0]}, dense"]
        row = {
            "model": Path(options.model).name,
            **{key: getattr(options, key) for key in ("dtype", "batch", "length", "sparsity", "repeats")},
            "way": name,
            "p50_ms": round(ms, 4),
            "over_dense": round(ms / dense, 4),
            **conditions(),
        }
        append_row(options.output, row)
        print(f"{name:36s} {ms:9.2f} ms  x{ms / dense:.3f}", flush=True)


if __name__ == "__main__":
    main()
