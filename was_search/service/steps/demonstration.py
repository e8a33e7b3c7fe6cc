"""The whole main job on the packaged demo checkpoint, on CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from was_search.plan import Plan
from was_search.service.context import Context
from was_search.service.reports.comparison import next_commands
from was_search.service.settings import Settings
from was_search.service.steps.decoding import generate
from was_search.service.steps.evaluation import load_for
from was_search.service.steps.main_job import RunResult, run

DEMO_FOLDER = Path(__file__).resolve().parents[2] / "demo_data"

DEMO_OPTIONS: dict[str, Any] = {
    "model": str(DEMO_FOLDER / "model"),
    "data": str(DEMO_FOLDER / "text"),
    "target": 0.6,
    "trials": 48,
    "workers": 2,
    "ray": "local",
    "device": "cpu",
    "sequence_length": 256,
    "calibration_sequences": 96,
    "pricing_sequences": 32,
    "greedy_sequences": 4,
    "descent_epochs": 1,
    "descent_rounds": 16,
    "search_sequences": 64,
    "test_sequences": 192,
    "batch_size": 8,
    "compensation_steps": 60,
    "compensation_tokens": 2048,
}
"""Options that the demo sets; others have their defaults. Descent and compensation are short: it takes minutes."""


def demo_settings(**overrides: Any) -> Settings:
    """The demo's settings with ``overrides``."""
    return Settings(**{**DEMO_OPTIONS, **overrides})


def decoding_speed(context: Context, plan: Plan, prompt: str, *, new_tokens: int = 48, rounds: int = 3) -> str:
    """A sentence on how fast this machine decodes, dense beside ``plan``, by turns and through ``generate``.

    What the runtime's own code gains is told apart from what skipping does by a plan that skips nothing.
    """
    import torch

    from was_kernels.timing.generate import beside_each_other
    from was_search.checkpoints.load import load_tokenizer
    from was_search.texts.tokens import prompt_ids

    model, _ = load_for(context, plan)
    ids = torch.from_numpy(prompt_ids(prompt, load_tokenizer(context.model.source)))[None]
    whole = replace(plan, thresholds=np.full_like(plan.thresholds, np.finfo(np.float32).tiny))
    runs = [(model, each) for each in (None, whole, plan)]
    dense, unskipped, sparse = beside_each_other(runs, ids, new_tokens=new_tokens, rounds=rounds)
    return (
        f"On {torch.get_num_threads()} thread(s) here: dense {dense.tokens_per_s:.0f} tokens/s, with the plan "
        f"{sparse.tokens_per_s:.0f} tokens/s ({dense.median / sparse.median:.2f}x; with every channel kept "
        f"{dense.median / unskipped.median:.2f}x), by turns through generate"
    )


def demo(context: Context, *, prompt: str = "def read_lines(path):\n", max_new_tokens: int = 48) -> RunResult:
    """Run everything, decode a few tokens with the plan and print what to try next."""
    result = run(context)
    if result.plan is None:
        return result
    plan = Plan.load(result.plan)
    context.reporter.note("\nDecoding with the plan:")
    generate(context, plan, prompt, max_new_tokens=max_new_tokens)
    context.reporter.note(decoding_speed(context, plan, prompt))
    context.reporter.note(f"\nPlan: {result.plan}\nNext:")
    for command in next_commands(context.settings.storage, result.search.study, result.plan):
        context.reporter.text(f"  {command}")
    return result
