"""Measure what more workers bring: whole jobs with 1, 2, 4, 8 workers, and the time of each of their phases.

    python -m benchmarks.scaling --workers 1 2                              # the packaged demo
    python -m benchmarks.scaling --problem real --model FOLDER --data FOLDER --workers 1 2 4 8
    python scripts/make_random_model.py llama-2-7b FOLDER --device cuda
    python -m benchmarks.scaling --problem llama-2-7b --model FOLDER --workers 1 2
    python -m benchmarks.scaling --problem llama-2-7b --model FOLDER --workers 1 --gpus-per-worker 2
    python -m benchmarks.scaling --summary

A job calibrates, makes seeds, searches (descents, then trials), learns a compensation, confirms and writes the plan. A
worker has a GPU of its own, or one thread of a CPU. Each job runs in a new process, on a local Ray of its own and a
database of its own in an embedded Postgres, so that nothing comes from a cache. Rows are appended to a results file;
what is there already is skipped, so a killed run is repeated with the same command.

The plan must be the same, bit for bit, whatever the number of workers, and the status is 1 where it is not. With more
than half as many workers as the sampler's lag only the vectors of seeds and descents must be.

Seconds are those that the job reports (``--json``, the run's record, the log of descents). busy is the share of the
workers' time, from the first one's readiness to the end, in which they were at calls; processor seconds are the
coordinator process's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.conditions import conditions
from benchmarks.harness.rows import append_row, read_rows
from benchmarks.harness.standing import STANDING
from was_search.checkpoints.file_hashes import file_hashes
from was_search.checkpoints.load import pick_device
from was_search.errors import ConfigError, WasError
from was_search.service.model import Model
from was_search.service.settings import OPTIONS, Settings
from was_search.service.settings_file import load_settings
from was_search.service.steps.demonstration import DEMO_FOLDER, demo_settings
from was_search.texts.protocol import content_hash

RESULTS = Path(__file__).resolve().parent / "results" / "scaling.jsonl"

OWN = ("model", "data", "workers", "gpus_per_worker", "storage", "plan", "study", "ray", "metrics", "notify", "profile")
"""Settings that do not say which job it is: the model and the data count by what they hold."""

NOT_ASKED = ("workers", "storage", "plan", "study", "ray", "metrics", "notify", "profile")
"""Settings that are no options here."""

SEVEN_BILLION: dict[str, Any] = {
    "data": str(DEMO_FOLDER / "text"),
    "target": 0.5,
    "trials": 96,
    "sequence_length": 1024,
    "calibration_sequences": 32,
    "pricing_sequences": 16,
    "slope_sequences": 64,
    "seed_rounds": 4,
    "descent_rounds": 16,
    "search_sequences": 24,
    "test_sequences": 32,
    "compensation_steps": 100,
}
"""A random model has no text that suits it: any will do, and a tenth of the usual tokens show where the time goes."""

PROBLEMS: dict[str, Callable[[], Settings]] = {
    "demo": demo_settings,
    "real": lambda: Settings(**STANDING["real"].setup, target=0.5, ray="local"),
    "llama-2-7b": lambda: Settings(**SEVEN_BILLION, ray="local"),
}

Job = Callable[[Settings, Path], dict[str, Any]]


def benchmark(
    problem: str, settings: Settings, workers: list[int], output: Path, url: Callable[[str], str], job: Job
) -> None:
    """Run the jobs that are not in ``output`` yet, and append their rows.

    Args:
        problem: what rows call it.
        settings: of the job; workers, database and plan's folder are this function's.
        workers: how many, a job each.
        output: the file of rows.
        url: makes a new database of a name and gives its URL.
        job: runs a job, in a folder for its files.
    """
    settings.require("model", "data")
    identity = job_hash(settings)
    there = {row["key"] for row in read_rows(output)}
    gpus = abs(settings.gpus_per_worker)  # -1 is one of each worker
    keys = {n: content_hash(identity, n, gpus)[:16] for n in workers}
    print(f"{len(keys)} run(s), {sum(key in there for key in keys.values())} of them done", flush=True)
    for n, key in keys.items():
        if key in there:
            continue
        with tempfile.TemporaryDirectory(prefix="was-scaling-") as folder:
            plan = str(Path(folder) / "plan")
            asked = dataclasses.replace(settings, workers=str(n), storage=url(f"scaling_{key}"), plan=plan)
            found = job(asked, Path(folder))
        row = {
            "key": key,
            "job": identity,
            "problem": problem,
            "workers": n,
            **found,
            "settings": {name: value for name, value in settings.to_json().items() if name not in OWN},
        }
        append_row(output, {**row, **conditions(found["device"])})
        times = ", ".join(f"{name} {seconds:.1f}" for name, seconds in found["seconds"].items())
        print(f"{n} worker(s): {times} s", flush=True)


def job_hash(settings: Settings) -> str:
    """Names the job on this kind of device, whatever its number of workers and wherever its files lie."""
    device = pick_device(settings.device)
    name = torch.cuda.get_device_name() if device == "cuda" else device
    own = {key: value for key, value in settings.to_json().items() if key not in OWN}
    return content_hash("scaling", 1, Model.of(settings).fingerprint, text_hash(settings.data), own, name)[:16]


def text_hash(data: str) -> str:
    """Names the texts of a file or a folder by what they hold, and data sets of the hub by their names."""
    path = Path(data)
    if not path.exists():
        return data
    files = sorted(found for found in path.rglob("*") if found.is_file()) if path.is_dir() else [path]
    return content_hash(*file_hashes(files))


def in_a_process(settings: Settings, folder: Path) -> dict[str, Any]:
    """The figures of a job that runs in a new process.

    Raises:
        SystemExit: the job failed; it has said why.
    """
    given = {"settings": {name: getattr(settings, name) for name in Settings.__dataclass_fields__}}
    command = [sys.executable, "-m", "benchmarks.scaling", "--child", str(folder)]
    done = subprocess.run(command, input=json.dumps(given), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    figures: dict[str, Any] = json.loads(done.stdout.strip().split("\n")[-1])
    return figures


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problem", choices=list(PROBLEMS), default="demo", help="whose settings are the defaults")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4, 8], help="a job for each number")
    parser.add_argument("--config", type=Path, help="TOML file of settings")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--summary", action="store_true", help="print and plot what the results file holds")
    parser.add_argument("--plot", type=Path, help="HTML file of the plot; beside the results if not given")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    group = parser.add_argument_group("settings of the job", "the problem's by default; as was-search run has them")
    for name, field in Settings.__dataclass_fields__.items():
        if name not in NOT_ASKED and type(field.default) is not bool:
            group.add_argument(f"--{name.replace('_', '-')}", type=type(field.default))
    options = parser.parse_args(arguments)
    if min(options.workers) < 1:
        raise ConfigError(f"workers: must be at least 1, got {min(options.workers)}")
    return options


def main(arguments: list[str] | None = None, job: Job = in_a_process) -> int:
    try:
        options = parse(arguments)
        if options.child:
            from benchmarks.harness.scaling_job import run_job

            print(json.dumps(run_job(Settings(**json.load(sys.stdin)["settings"]), options.child)))
            return 0
        if not options.summary:
            flags = {name: getattr(options, name, None) for name in OPTIONS if name not in NOT_ASKED}
            settings = load_settings(options.config, flags, PROBLEMS[options.problem]())
            _run(options, settings, job)
    except WasError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from benchmarks.harness.scaling_summary import summarise

    return summarise(read_rows(options.output), options.plot or options.output.with_suffix(".html"))


def _run(options: argparse.Namespace, settings: Settings, job: Job) -> None:
    from was_storage.server.embedded import EmbeddedServer

    with tempfile.TemporaryDirectory(prefix="was-scaling-") as home:
        Path(home).chmod(0o755)  # the server's own account enters it
        with EmbeddedServer.start(Path(home) / "postgres") as server:
            benchmark(options.problem, settings, options.workers, options.output, server.url, job)


if __name__ == "__main__":
    sys.exit(main())
