"""Time and peak memory of each phase on a model: calibrate, seed, search.

    python -m benchmarks.phases --model FOLDER --data FOLDER --trials 10 --workers 1 [--config FILE]

Peak memory is torch's on the GPU, the largest of the workers, or the process's on CPU. Appends one JSON row to
``benchmarks/results/phases.jsonl`` and prints it. Run it with an empty database, or phases are cached.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.conditions import conditions
from benchmarks.harness.rows import append_row
from was_search.coordinator.model_calls import PeakBytes
from was_search.service.context import Context
from was_search.service.reports.progress import RichReporter
from was_search.service.settings import Settings
from was_search.service.settings_file import load_settings
from was_search.service.steps.question import Question
from was_search.service.steps.seeding import seed
from was_search.service.steps.study import search

RESULTS = Path(__file__).resolve().parent / "results" / "phases.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS)
    for name, field in Settings.__dataclass_fields__.items():
        kind = type(field.default)
        if kind is not bool:
            parser.add_argument(f"--{name.replace('_', '-')}", type=kind)
    options = vars(parser.parse_args())
    output, config = options.pop("output"), options.pop("config")
    phases: dict[str, Any] = {}
    with Context(load_settings(config, options), RichReporter()) as context:
        question = Question.of(context)
        _timed(phases, "fingerprint", lambda: context.model.fingerprint)
        _timed(phases, "start Ray and load", lambda: context.pool, context)
        calibration = _timed(phases, "calibrate", lambda: question.calibration, context)
        _timed(phases, "seed", lambda: seed(context, question), context)
        result = _timed(phases, "search", lambda: search(context, question), context)
        row = {
            "model": context.model.source.display_name,
            "blocks": calibration.shape.n_blocks,
            "projection_weights": int(calibration.shape.params.sum()),
            "settings": {
                **context.settings.to_json(),
                "model": context.model.source.display_name,
                "data": question.tokens.search.protocol.data,
            },
            "placement": vars(context.placement),
            "phases": phases,
            "trials": [
                {
                    "origin": s.origin,
                    "state": s.state.value,
                    "seconds": round(s.seconds, 3),
                    "tokens": s.tokens,
                    "loss_nats": s.loss_nats,
                    "achieved": s.achieved,
                }
                for s in result.slots
            ],
            **conditions(context.pool.infos[0].device),
        }
    append_row(output, row)
    for name, figures in phases.items():
        print(f"{name:20s} {figures['seconds']:8.1f} s  peak {figures.get('peak_gib', float('nan')):7.2f} GiB")


def _timed(phases: dict[str, Any], name: str, step: Any, context: Context | None = None) -> Any:
    started = time.perf_counter()
    result = step()
    phases[name] = {"seconds": round(time.perf_counter() - started, 2)}
    if context is not None:
        peaks = context.pool.map([PeakBytes()] * context.pool.n_workers)
        phases[name]["peak_gib"] = round(max(peaks) / 2**30, 3)
    return result


if __name__ == "__main__":
    main()
