"""Compare ways to choose the sparsities: equal evaluation tokens, equal achieved sparsity, several seeds.

    python -m benchmarks.search_quality --targets 0.5 0.6 0.7 0.8 --seeds 5 --evaluations 500 --processes 14
    python -m benchmarks.search_quality --methods cmaes:levels cmaes:full evolution --targets 0.6
    python -m benchmarks.search_quality --problem real --model FOLDER --data FOLDER --processes 6
    python -m benchmarks.search_quality --problem real --summary

There are two problems: the packaged demo, and SmolLM2-135M-Instruct on WikiText-2. Of the latter, without a network,
``scripts/real_model.py`` writes the model and ``scripts/wikitext_articles.py`` divides a text that is at hand.

One full evaluation is the whole search split. All methods share tables, seeds and thresholds (of one operating
point per target). At each checkpoint the vector that a method then has, the best that it has evaluated in full, is
re-calibrated at its own operating point and evaluated on the test split. Rows are appended to a results file by this
process alone; what is there already is skipped, so a killed run is repeated with the same command.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from benchmarks.harness.conditions import conditions, now
from benchmarks.harness.methods import METHODS
from benchmarks.harness.problem import Engine, Setup, prepare
from benchmarks.harness.rows import append_row, read_rows
from benchmarks.harness.runs import jobs, pairs, results
from benchmarks.harness.standing import STANDING
from was_search.errors import ConfigError, WasError


def benchmark(options: argparse.Namespace, setup: Setup) -> int:
    """Run what is not yet in the results file; returns the number of jobs that are still left."""
    began = time.time()
    deadline = began + options.deadline if options.deadline else float("inf")
    data, fingerprint = setup.tokens(), setup.fingerprint()
    protocols = {split: tokens.protocol.to_json() for split, tokens in data.items()}
    identity = {"model": fingerprint, "protocols": protocols, "setup": setup.identity()}
    checkpoints = (*(c for c in options.checkpoints if c < options.evaluations), options.evaluations)
    methods = options.methods or STANDING[options.problem].methods or METHODS
    every = jobs(pairs(list(methods)), options.targets, options.seeds, options.radius, checkpoints, identity)
    there = {row.get("key") for row in read_rows(options.output)}
    todo = [job for job in every if job.key not in there]
    print(f"{len(every)} runs, {len(every) - len(todo)} of them done", flush=True)
    if not todo:
        return 0
    engine = Engine(setup, data)
    problems = prepare(engine, sorted({job.target for job in todo}))
    dense = engine.dense()
    print(
        f"prepared in {time.time() - began:.0f} s on {engine.info.device}; dense {dense['test_nats']:.4f} nats on the "
        "test split",
        flush=True,
    )
    measured = conditions(engine.info.device)
    shared = {
        "model": {"name": options.name, "fingerprint": fingerprint},
        "dense": dense,
        "protocols": protocols,
        "setup": setup.identity(),
        "processes": options.processes,
        "graphs": engine.graphs,
        **{name: value for name, value in measured.items() if name != "when"},
    }
    left = len(todo)
    for job, found in results(engine, problems, todo, options.processes, deadline):
        row = {
            "key": job.key,
            "method": job.method,
            "space": job.space,
            "target": job.target,
            "seed": job.seed,
            "radius": job.radius,
            "settings": METHODS[job.method].settings,
            "fitness": METHODS[job.method].fitness,
            "tokens_per_evaluation": data["search"].protocol.n_sequences * setup.sequence_length,
            **found,
            "when": now(),
        }
        append_row(options.output, row, shared)
        left -= 1
        nats = found["checkpoints"][-1]["test_nats"] if found["checkpoints"] else float("nan")
        print(
            f"{time.time() - began:7.0f} s  {job.name}: {nats:.4f} nats on the test split, "
            f"{found['seconds']['search']:.1f} + {found['seconds']['confirm']:.1f} s, {left} left",
            flush=True,
        )
    return left


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--problem", choices=list(STANDING), default="demo", help="whose settings are the defaults")
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD[:SPACE]", help=f"of {', '.join(METHODS)}; demo: all, real: ten of them"
    )
    parser.add_argument("--targets", nargs="+", type=float)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each random method, seeds 0, 1, ...")
    parser.add_argument("--evaluations", type=float, help="budget of each run, in full evaluations")
    parser.add_argument(
        "--checkpoints", nargs="*", type=float, help="evaluations after which vectors are confirmed too"
    )
    parser.add_argument("--radius", type=float, default=0.05, help="of the spaces")
    parser.add_argument("--processes", type=int, default=1, help="each holds the model, on the next GPU in turn")
    parser.add_argument("--deadline", type=float, default=0.0, help="seconds after which nothing more is run")
    parser.add_argument("--output", type=Path, help="file of rows; if not given, the problem's in benchmarks/results")
    parser.add_argument("--name", help="what rows call the model; its fingerprint is what counts")
    parser.add_argument("--summary", action="store_true", help="print and plot what the results file holds")
    parser.add_argument("--markdown", action="store_true", help="print the summary as Markdown, last checkpoints only")
    parser.add_argument("--plot", type=Path, help="HTML file of the summary's plot; beside the results if not given")
    group = parser.add_argument_group("model and data", "the problem's by default")
    hints = get_type_hints(Setup)
    for field in fields(Setup):
        flag, kind = f"--{field.name.replace('_', '-')}", hints[field.name]
        if kind is bool:
            group.add_argument(flag, action="store_true", default=None)
        else:
            group.add_argument(flag, type=kind if kind in (int, float) else str)
    options = _filled(parser.parse_args(arguments))
    for name in ("seeds", "evaluations", "processes"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name}: must be at least 1, got {getattr(options, name)}")
    for target in options.targets:
        if not 0.0 < target < 0.95:
            raise ConfigError(f"targets: must be above 0 and below 0.95, got {target}")
    if not 0.0 < options.radius <= 1.0:
        raise ConfigError(f"radius: must be in (0, 1], got {options.radius}")
    if options.deadline < 0:
        raise ConfigError(f"deadline: must not be negative, got {options.deadline}")
    return options


def _filled(options: argparse.Namespace) -> argparse.Namespace:
    """``options`` with the problem's values for what was not given."""
    problem = STANDING[options.problem]
    usual = {field.name: field.default for field in fields(Setup)} | problem.setup
    usual |= {
        "targets": list(problem.targets),
        "evaluations": problem.evaluations,
        "checkpoints": list(problem.checkpoints),
        "output": problem.results,
        "name": problem.model,
    }
    given = {name: value for name, value in vars(options).items() if value is not None}
    return argparse.Namespace(**{**vars(options), **usual, **given})


def main(arguments: list[str] | None = None) -> int:
    try:
        options = parse(arguments)
        if options.summary or options.markdown:
            from benchmarks.harness.search_summary import excess, groups, markdown, summarise

            rows = read_rows(options.output)
            if options.methods:  # the file also holds rows of methods that are gone from the code
                names = {name.partition(":")[0] for name in options.methods}
                rows = [row for row in rows if row["method"] in names]
            if options.markdown:
                for conditions, targets in groups(rows).items():
                    tables = [table for table in (excess(targets), markdown(targets)) if table]
                    print("\n\n".join([conditions, *tables]), end="\n\n")
                return 0
            summarise(rows, options.plot or options.output.with_suffix(".html"))
            return 0
        setup = Setup(**{field.name: getattr(options, field.name) for field in fields(Setup)})
        left = benchmark(options, setup)
    except WasError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print("error: a process died (out of memory?); finished rows are kept, run again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; finished rows are kept, the same command goes on", file=sys.stderr)
        return 130
    if left:
        print(f"{left} runs left; the same command goes on with them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
