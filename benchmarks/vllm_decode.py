"""Time vLLM's own decoding of one request: a dense checkpoint beside the same one with a plan, by turns.

    make test-vllm                                                          # makes the environment
    python scripts/make_random_model.py llama-1b FOLDER
    .venv-vllm/bin/python -m benchmarks.vllm_decode --model FOLDER --sparsities 0.5 0.75

Plans have one sparsity everywhere, read from random tokens, and lie in folders as ``was-search export --with-plan``
leaves them. Every measurement is an engine of its own in a process of its own; the folders take turns. Milliseconds a
token are the difference between texts of many tokens and of one, divided by the tokens between; the least of some
texts counts, as other processes only ever add time. One JSON line a row is appended to
benchmarks/results/vllm_decode.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.conditions import conditions
from benchmarks.harness.rows import append_row

RESULTS = Path(__file__).parent / "results" / "vllm_decode.jsonl"
PROMPT = 32


@dataclass(frozen=True)
class Row:
    """One folder's time; ``speedup`` is over the dense one's in the same run."""

    model: str
    dtype: str
    sparsity: float
    tokens: int
    token_ms: float
    tokens_per_s: float
    speedup: float
    vllm: str


def folders(model: Path, sparsities: list[float], dtype: str, to: Path) -> dict[float, Path]:
    """The checkpoint, and a folder with a plan for each sparsity."""
    from benchmarks.harness.random_models import build, plan_at
    from was_search.checkpoints.files import resolve_model
    from was_search.checkpoints.fingerprint import fingerprint
    from was_search.checkpoints.plan_checkpoint import save_with_plan

    source = resolve_model(str(model))
    loaded = build(str(model), getattr(torch, dtype), device="cpu")
    found = {0.0: model}
    for sparsity in sparsities:
        plan = replace(plan_at(loaded, sparsity), fingerprint=fingerprint(source))
        found[sparsity] = save_with_plan(source, plan, to / f"{100 * sparsity:g}")
    return found


def token_seconds(folder: str, dtype: str, tokens: int, texts: int) -> float:
    """Seconds of a token of one request, in this process."""
    from vllm import LLM, SamplingParams

    llm: Any = LLM(folder, dtype=dtype, max_model_len=PROMPT + tokens + 8, max_num_seqs=1, skip_tokenizer_init=True)
    prompt = {"prompt_token_ids": torch.randint(5, 250, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()}

    def least(new: int) -> float:
        how = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        seconds = []
        for _ in range(texts):
            started = time.perf_counter()
            llm.generate([prompt], how, use_tqdm=False)
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    least(2)
    return (least(tokens) - least(1)) / (tokens - 1)


def measured(folder: Path, options: argparse.Namespace) -> float:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.vllm_decode", "--child", "--model", str(folder)]
    command += ["--dtype", options.dtype, "--tokens", str(options.tokens), "--texts", str(options.texts)]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return float(json.loads(done.stdout.strip().split("\n")[-1]))


def rows(options: argparse.Namespace) -> list[Row]:
    """Dense and each sparsity, by turns."""
    with tempfile.TemporaryDirectory(prefix="was-vllm-") as work:
        places = folders(options.model, options.sparsities, options.dtype, Path(work))
        least = dict.fromkeys(places, float("inf"))
        for _ in range(options.rounds):
            for sparsity, folder in places.items():
                least[sparsity] = min(least[sparsity], measured(folder, options))
                print(f"{sparsity:.0%}: {1e3 * least[sparsity]:.2f} ms a token", flush=True)
    return [
        Row(
            model=options.model.name,
            dtype=options.dtype,
            sparsity=sparsity,
            tokens=options.tokens,
            token_ms=1e3 * seconds,
            tokens_per_s=1.0 / seconds,
            speedup=least[0.0] / seconds,
            vllm=engine_version(),
        )
        for sparsity, seconds in least.items()
    ]


def engine_version() -> str:
    return version("vllm-cpu")


def line(row: Row) -> str:
    """A row as a line of text."""
    name = "dense" if row.sparsity == 0.0 else f"plan of {row.sparsity:.0%}"
    rate = f"{row.tokens_per_s:6.1f}/s  x{row.speedup:.2f}"
    return f"{row.model} {row.dtype} {name:12s} {row.token_ms:8.2f} ms a token  {rate}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint folder")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.75])
    parser.add_argument("--tokens", type=int, default=48, help="of a long text")
    parser.add_argument("--texts", type=int, default=3, help="of each length in each process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each folder")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.child:
        print(json.dumps(token_seconds(str(options.model), options.dtype, options.tokens, options.texts)))
        return
    for row in rows(options):
        append_row(options.output, asdict(row) | conditions("cpu"))
        print(line(row), flush=True)


if __name__ == "__main__":
    main()
