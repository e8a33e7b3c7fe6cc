"""Measure what rows of a batch have in common: the share of weights that any row of a decode step keeps.

    python -m benchmarks.live_union [--model FOLDER] [--targets 0.4 0.5 0.6 0.75]

A sparse GEMV for several rows reads a weight column if any row keeps its channel. Were masks independent, the share
at sparsity s and k rows would be 1 - s^k; if rows kept the same channels it would stay at 1 - s. Rows are tokens at the
same position of different sequences, masked at uniform sparsities with thresholds of their own operating point.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness.problem import Engine, Setup
from was_search.masks.calibration import operating_point
from was_search.shape import N_PROJECTIONS, FloatArray

ROWS = (1, 2, 4, 8, 16)
POSITIONS = 16
SEQUENCES = 32


def unions(engine: Engine, thresholds: FloatArray, tokens: Tensor) -> list[float]:
    """Parameter-weighted live share for each number of rows of :data:`ROWS`."""
    positions = torch.linspace(16, tokens.shape[1] - 1, POSITIONS).long()
    live = np.zeros((len(ROWS), engine.shape.n_blocks, N_PROJECTIONS))
    hooks = []
    for block, projection, linear in engine.model.structure.linears():
        norms, threshold = engine.model.norms[block][projection], float(thresholds[block, projection])

        def mask(
            _: nn.Module,
            args: tuple[Tensor, ...],
            at: tuple[int, int] = (block, projection),
            norms: Tensor = norms,
            threshold: float = threshold,
        ) -> tuple[Tensor]:
            (x,) = args
            keep = x.abs().float() * norms >= threshold
            seen = keep[:, positions]
            for number, rows in enumerate(ROWS):
                together = seen.reshape(-1, rows, *seen.shape[1:]).any(dim=1)
                live[number, *at] = float(together.float().mean())
            keep[:, :1] = True
            return (x * keep,)

        hooks.append(linear.register_forward_pre_hook(mask))
    try:
        with torch.inference_mode():
            engine.model.model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return [1.0 - engine.shape.sparsity(1.0 - shares) for shares in live]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.live_union", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=Setup.model)
    parser.add_argument("--data", default=Setup.data)
    parser.add_argument("--targets", nargs="+", type=float, default=[0.4, 0.5, 0.6, 0.75])
    options = parser.parse_args()
    engine = Engine(
        Setup(
            options.model, options.data, calibration_sequences=SEQUENCES, test_sequences=SEQUENCES, search_sequences=1
        )
    )
    dense, _ = engine.run_pass(None)
    tokens = torch.as_tensor(engine.data["test"].tokens, dtype=torch.long, device=engine.info.device)
    print("| sparsity | " + " | ".join(f"{rows} rows" for rows in ROWS) + " |")
    print("|---" * (1 + len(ROWS)) + "|")
    for target in options.targets:
        vector = np.full((engine.shape.n_blocks, N_PROJECTIONS), target)
        _, thresholds, _, _ = operating_point(engine.run_pass, dense, vector, engine.shape)
        found = unions(engine, thresholds, tokens)
        cells = [f"{live:.3f} ({1.0 - target**rows:.3f})" for live, rows in zip(found, ROWS, strict=True)]
        print(f"| {target:.0%} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
