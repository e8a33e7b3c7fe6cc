"""Measure what a compensation keeps of its gain on text of another kind than it was learned from.

    python -m benchmarks.foreign_text --model FOLDER --data FOLDER --foreign FOLDER --targets 0.5 0.6
    python -m benchmarks.foreign_text --model FOLDER --data FOLDER --foreign FOLDER --written 80

For each target the search's descents find a vector on the texts of ``--data``; compensations of it are learned from
those texts, and from the texts of each ``--foreign`` folder in their place. Thresholds are always calibrated on
``--data``, whose test split every one is evaluated on. The gain is what a compensation takes off the loss there; a row
says which share of the gain from the model's own kind of text is kept. With ``--written`` so many sequences that the
dense model writes itself, each from a random token on, are learned from as well: alone, and beside either text.
Settings are those of the standing real problem. One process; a row a line in benchmarks/results/foreign_text.jsonl.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import StaticCache

from benchmarks.harness.conditions import conditions, now
from benchmarks.harness.problem import Engine, Setup, learning_text, prepare
from benchmarks.harness.rows import append_row
from benchmarks.harness.runs import Job, run_job
from benchmarks.harness.standing import RESULTS, STANDING
from was_kernels.runtime.positions import CACHES
from was_search.masks.compensating import CompensationOptions
from was_search.shape import IntArray
from was_search.texts.protocol import TokenSet

OUTPUT = RESULTS / "foreign_text.jsonl"


@torch.inference_mode()
def written(model: Any, n: int, length: int, seed: int, *, piece: int = 256, temperature: float = 1.0) -> IntArray:
    """``n`` sequences of pieces that the model samples, each from a random token on, int64 [n, length]."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    pieces = n * -(-length // piece)
    found = torch.randint(model.config.vocab_size, (pieces, 1), device=device, generator=generator)
    cache = StaticCache(config=model.config, max_cache_len=piece)
    name = next(name for name in CACHES if name in signature(model.forward).parameters)  # transformers renamed it
    attention = model.config._attn_implementation
    model.set_attn_implementation("sdpa")  # the engine's attends to whole texts only
    for _ in range(piece - 1):
        logits = model(input_ids=found[:, -1:], use_cache=True, **{name: cache}).logits[:, -1]
        drawn = torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)
        found = torch.cat([found, drawn], 1)
    model.set_attn_implementation(attention)
    return np.asarray(found.view(n, -1)[:, :length].cpu().numpy(), np.int64)


def learning_texts(engine: Engine, options: argparse.Namespace) -> dict[str, TokenSet]:
    """What is learned from, by name; the model's own kind of text comes first."""
    own = learning_text(engine.data, engine.setup.order_seed)
    texts = {"own": own}
    for folder in options.foreign:
        foreign = _setup(options, folder).tokens()
        texts[Path(folder).name] = learning_text(foreign, engine.setup.order_seed)
    if options.written:
        tokens = written(engine.model.model, options.written, engine.setup.sequence_length, options.seed)
        beside = {f"{name} and written": np.concatenate([text.tokens, tokens]) for name, text in texts.items()} | {
            "written": tokens
        }
        texts |= {name: TokenSet.of(own.protocol, each) for name, each in beside.items()}
    return texts


def _setup(options: argparse.Namespace, data: str) -> Setup:
    given = {name: getattr(options, name) for name in ("device", "dtype", "sequence_length", "cache")}
    usual = STANDING["real"].setup | {name: value for name, value in given.items() if value}
    return Setup(**(usual | {"model": options.model, "data": data}))


def rows(engine: Engine, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Learn and evaluate all; one row a target and text."""
    learnt = {name: engine.learnt_from(text) for name, text in learning_texts(engine, options).items()}
    move = {"move": 0.0} if options.still else {}
    dense, learning = engine.dense()["test_nats"], CompensationOptions(steps=options.steps, **move)
    found = []
    for problem in prepare(engine, options.targets):
        job = Job("", options.method, "-", problem.target, options.seed, 0.05, (120.0,))
        searched = run_job(engine, problem, job)
        before, start = searched["checkpoints"][-1]["test_nats"], np.asarray(searched["sparsities"])
        gains: dict[str, float] = {}
        for name, text in learnt.items():
            sparsities, compensation, _ = engine.compensate(problem, start, learning, options.seed, text)
            after = engine.confirm_compensated(problem, sparsities, compensation)
            gains[name] = before - after["test_nats"]
            found.append(
                {
                    "target": problem.target,
                    "text": name,
                    "sequences": len(text[0].tokens),
                    "dense_nats": dense,
                    "descents_nats": before,
                    "test_nats": after["test_nats"],
                    "achieved": after["achieved"]["test"],
                    "kept": gains[name] / gains["own"],
                    "compensation": asdict(learning),
                    "seed": options.seed,
                }
            )
            print(
                f"{problem.target:g}, learned from {name}: {after['test_nats']:.4f} nats, "
                f"{found[-1]['kept']:.2f} of the gain",
                flush=True,
            )
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--data", required=True, help="folder of the texts that the model is to be good at")
    parser.add_argument("--foreign", nargs="*", default=[], metavar="FOLDER", help="of texts of another kind")
    parser.add_argument("--targets", nargs="+", type=float, default=[0.5, 0.6])
    parser.add_argument("--written", type=int, default=0, help="sequences that the model writes itself")
    parser.add_argument("--steps", type=int, default=CompensationOptions.steps, help="of each compensation")
    parser.add_argument("--still", action="store_true", help="leave the sparsities where they are")
    parser.add_argument("--method", default="descent-9", help="of benchmarks.search_quality, without a space")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="", help="the standing problem's if not given")
    parser.add_argument("--sequence-length", type=int, default=0, help="likewise")
    parser.add_argument("--cache", default="", help="folder of greedy tables and the ends of descents")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    engine = Engine(_setup(options, options.data))
    measured = conditions(engine.info.device)
    shared = {
        "model": engine.setup.fingerprint(),
        "data": {name: tokens.protocol.to_json() for name, tokens in engine.data.items()},
        "setup": engine.setup.identity(),
        **{name: value for name, value in measured.items() if name != "when"},
    }
    for row in rows(engine, options):
        append_row(options.output, row | {"when": now()}, shared)


if __name__ == "__main__":
    main()
