"""Measure how many workers one coordinator keeps busy: real loop, session and Postgres, virtual workers.

    python -m benchmarks.coordinator --cases 64x10:1000 512x60:2000 8x0:1000
    python -m benchmarks.coordinator --summary

A case WORKERSxSECONDS:FINISHED is a study of 32 levels with FINISHED finished trials, taken up by a new process that
drives virtual workers (:mod:`benchmarks.harness.virtual_pool`) for a while; 0 seconds measure how many trials a second
pass through. Each case has its own copy of the database. ``stock`` in front (``stock:8x10:1000``) runs stock Optuna in
every worker instead: a process each with its own TPE and RDBStorage, which asks, waits and tells.

busy is the share of the window in which workers evaluated; the window opens once every worker has its first trial.
The study's note and plots are kept fresh meanwhile, as in a search; their first refresh imports plotly. A gap is what
one worker waited between two trials. Resume is from the process's start (its imports included, torch among them) to the
first hand-out; Ray has no part in it. CPU is the coordinator process's own, without Postgres'.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.pool import NullPool

from benchmarks.harness.conditions import conditions
from benchmarks.harness.rows import append_row, read_rows

RESULTS = Path(__file__).parent / "results" / "coordinator.jsonl"


@dataclass(frozen=True)
class Case:
    """A case: ``window`` is in seconds, ``stock`` runs Optuna in every worker, ``page`` refreshes the study's page."""

    workers: int
    seconds: float
    finished: int
    window: float = 0.0
    stock: bool = False
    page: bool = True

    @classmethod
    def parse(cls, words: str, window: float, *, page: bool = True) -> Case:
        """Read ``[stock:]WORKERSxSECONDS:FINISHED``; a window of 0 takes three evaluations, 20 seconds at least."""
        stock, words = words.startswith("stock:"), words.removeprefix("stock:")
        size, _, finished = words.partition(":")
        workers, _, seconds = size.partition("x")
        return cls(int(workers), float(seconds), int(finished), window or max(20.0, 3.0 * float(seconds)), stock, page)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[], metavar="WORKERSxSECONDS:FINISHED")
    parser.add_argument("--window", type=float, default=0.0, help="seconds measured; 0 chooses by the case")
    parser.add_argument("--no-page", action="store_true", help="leave the study's note and plots unwritten")
    parser.add_argument("--home", type=Path, help="folder of the Postgres server, kept; default a new one")
    parser.add_argument("--label", default="", help="kept in the rows")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--summary", action="store_true", help="print the table of the output file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        given = json.loads(options.child)
        case = Case(**given["case"])
        row = (run_stock if case.stock else run_case)(case, given["url"], given["spawned_at"])
        print(json.dumps(row))
        return
    if options.summary:
        print(summary(read_rows(options.output)))
        return
    from was_storage.server.embedded import EmbeddedServer

    with tempfile.TemporaryDirectory(prefix="was-scale-") as made:
        home = options.home or Path(made)
        home.mkdir(parents=True, exist_ok=True)
        home.chmod(0o755)
        with EmbeddedServer.start(home / "postgres") as server:
            for words in options.cases:
                case = Case.parse(words, options.window, page=not options.no_page)
                about = {"label": options.label, **conditions("cpu"), "load_average": os.getloadavg()[0]}
                row = {**measure(server, case), **about}
                append_row(options.output, row)
                print(summary([row]), flush=True)


def measure(server: Any, case: Case) -> dict[str, Any]:
    """Measure one case in a process of its own, on a copy of the database with its finished trials."""
    name = f"history_{case.finished}"
    url = server.url("postgres")
    with _autocommit(url) as connection:
        known = connection.execute(text("SELECT 1 FROM pg_database WHERE datname = :name"), {"name": name}).scalar()
    if known is None:
        from benchmarks.harness.coordinator_study import make_history
        from was_storage.server.database import Database

        with Database.open(server.url(f"{name}_new")) as database:
            make_history(database, case.finished)
        with _autocommit(url) as connection:
            connection.execute(text(f"ALTER DATABASE {name}_new RENAME TO {name}"))
    copy = f"case_{os.getpid()}"
    with _autocommit(url) as connection:
        connection.execute(text(f"CREATE DATABASE {copy} TEMPLATE {name}"))
    given = {"case": vars(case), "url": server.url(copy), "spawned_at": time.time()}
    command = [sys.executable, "-m", "benchmarks.coordinator", "--child", json.dumps(given)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        with _autocommit(url) as connection:
            connection.execute(text(f"DROP DATABASE {copy} WITH (FORCE)"))
    row: dict[str, Any] = json.loads(done.stdout.strip().split("\n")[-1])
    return row


def run_case(case: Case, url: str, spawned_at: float) -> dict[str, Any]:
    """Run the coordinator with virtual workers, in this process."""
    from benchmarks.harness.coordinator_study import BUDGET, RADIUS, SHAPE, STUDY, open_study, page, seed
    from benchmarks.harness.virtual_pool import VirtualPool, Window
    from was_search.coordinator.loop import SearchLoop
    from was_search.coordinator.options import SearchOptions
    from was_search.process.refresher import Refresher
    from was_search.service.watching.live_page import LivePage
    from was_search.studies.sampling import Suggester
    from was_storage.server.database import Database

    marks = {"imports": time.time() - spawned_at}
    statements: Counter[str] = Counter()
    event.listen(Engine, "before_cursor_execute", lambda *_: statements.update(["statements"]))
    event.listen(Engine, "commit", lambda *_: statements.update(["commits"]))
    suggesting: list[float] = []
    stock_suggest = Suggester.suggest

    def timed_suggest(self: Suggester, number: int) -> dict[str, float]:
        started = time.perf_counter()
        found = stock_suggest(self, number)
        suggesting.append(time.perf_counter() - started)
        return found

    pool = VirtualPool(case.workers, case.seconds)
    drain = threading.Event()
    measured: dict[str, Any] = {}

    def watch() -> None:
        """Opens the window once all workers have had a trial, and closes it."""
        now = time.monotonic()
        if pool.window is None and not measured and pool.n_submitted >= case.workers:
            measured.update(before=dict(statements), cpu=time.process_time(), suggested=len(suggesting))
            measured["fill_seconds"] = now - (pool.first_submit or now)
            pool.window = Window(now)
        elif pool.window is not None and now - pool.window.start >= case.window:
            measured["cpu"] = time.process_time() - measured["cpu"]
            measured["counts"] = {k: statements[k] - measured["before"].get(k, 0) for k in statements}
            measured["suggested_until"] = len(suggesting)
            measured["window"] = pool.close_window()
            drain.set()

    patched_wait = pool.wait

    def wait(timeout_seconds: float) -> Any:
        watch()
        monitor.look()
        return patched_wait(timeout_seconds)

    pool.wait = wait  # type: ignore[method-assign]
    refreshes: list[tuple[float, float]] = []
    with (
        Monitor(url) as monitor,
        mock.patch.object(Suggester, "suggest", timed_suggest),
        Database.open(url) as database,
    ):
        room = 200_000 if case.seconds == 0 else round(4 * case.workers * (2 + case.window / case.seconds))
        store = open_study(database, case.finished + min(room, 20_000))
        marks["opened"] = time.time() - spawned_at
        with store.coordinate(STUDY) as session:
            marks["coordinating"] = time.time() - spawned_at
            options = SearchOptions(
                budget=BUDGET,
                sampler="tpe",
                radius=RADIUS,
                seed=0,
                early_stopping=True,
                significance=0.1,
                rung_keep=0.5,
                trial_timeout=3600.0,
                max_attempts=3,
            )
            live = LivePage(session, page(), session.slots(), {})

            def write() -> None:
                wall, processor = time.monotonic(), time.thread_time()
                live.write()
                refreshes.append((time.monotonic() - wall, time.thread_time() - processor))

            refresher = Refresher(write, "the page")
            data = mock.Mock()
            data.protocol.predicted_tokens = 1
            loop = SearchLoop(
                session,
                pool,
                data,
                None,  # type: ignore[arg-type]
                shape=SHAPE,
                seeds=[seed()],
                options=options,
                drain=drain,
                progress=lambda progress: live.update(progress) and refresher.changed(),
            )
            marks["loaded"] = time.time() - spawned_at
            started = time.monotonic()
            with refresher if case.page else nullcontext():
                loop.run()
        resumed = marks["loaded"] + ((pool.first_submit or started) - started)
    window = measured["window"]
    length = window.end - window.start
    gaps = np.array(window.gaps or [np.nan])
    inside = suggesting[measured["suggested"] : measured["suggested_until"]] or [float("nan")]
    trials = max(window.ended, 1)
    return {
        "case": vars(case),
        "busy": 1.0 - window.idle / (case.workers * length),
        "trials_per_second": window.ended / length,
        "window_seconds": length,
        "trials": window.ended,
        "gap_seconds": {f"p{q}": float(np.quantile(gaps, q / 100)) for q in (50, 95, 100)},
        "fill_seconds": measured["fill_seconds"],
        "suggest_seconds": {f"p{q}": float(np.quantile(inside, q / 100)) for q in (20, 50, 80)},
        "cpu_seconds_per_trial": measured["cpu"] / trials,
        "statements_per_trial": measured["counts"].get("statements", 0) / trials,
        "commits_per_trial": measured["counts"].get("commits", 0) / trials,
        "connections": monitor.most,
        "page_refreshes": [{"seconds": wall, "cpu_seconds": cpu} for wall, cpu in refreshes],
        "resume_seconds": resumed,
        "resume_marks": marks,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


class Monitor:
    """Counts the most connections that the database had, once a second, from a connection to another database."""

    def __init__(self, url: str) -> None:
        self.most = 0
        self._engine = create_engine(url).engine.url
        self._at = 0.0

    def __enter__(self) -> Monitor:
        self._database = self._engine.database
        engine = create_engine(self._engine.set(database="postgres"), poolclass=NullPool)
        self._connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        # A raw cursor: statements of SQLAlchemy's engines are counted.
        self._cursor = self._connection.connection.cursor()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def look(self) -> None:
        if time.monotonic() - self._at < 1.0:
            return
        self._at = time.monotonic()
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND backend_type = 'client backend'"
        self._cursor.execute(query, (self._database,))
        found = self._cursor.fetchone()
        self.most = max(self.most, int(found[0]) if found else 0)


def _ask_and_tell(index: int, case: Case, url: str, ready: Any, queue: Any) -> None:
    """One worker of :func:`run_stock`."""
    import optuna

    from benchmarks.harness.coordinator_study import STUDY, space

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = space().distributions
    rng = np.random.default_rng(index)
    sampler = optuna.samplers.TPESampler(seed=index, multivariate=True, constant_liar=True, n_startup_trials=0)
    try:
        study = optuna.load_study(study_name=STUDY, storage=optuna.storages.RDBStorage(url), sampler=sampler)
        study.get_trials(deepcopy=False)  # the workers' start is not measured
    except Exception:
        ready.abort()
        raise
    ready.wait()
    start = time.monotonic()
    time.sleep(rng.uniform(0.0, max(case.seconds, 0.001)))  # out of step, as in a study that has run for a while
    busy = asked = 0.0
    trials = 0
    begun = time.monotonic()
    while time.monotonic() - start < case.window:
        before = time.monotonic()
        trial = study.ask(distributions)
        asked += time.monotonic() - before
        takes = case.seconds * rng.uniform(0.8, 1.2)
        time.sleep(takes)
        busy += takes
        study.tell(trial, float(np.square(np.array(list(trial.params.values())) - 0.6).sum()))
        trials += 1
    queue.put((busy, time.monotonic() - begun, asked, trials))


def run_stock(case: Case, url: str, spawned_at: float) -> dict[str, Any]:
    """Run stock Optuna in every worker: processes that ask, wait and tell, all at once."""
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    ready = context.Barrier(case.workers + 1)
    processes = [
        context.Process(target=_ask_and_tell, args=(index, case, url, ready, queue)) for index in range(case.workers)
    ]
    for process in processes:
        process.start()
    with Monitor(url) as monitor:
        try:
            ready.wait()
        except threading.BrokenBarrierError:
            raise SystemExit("not all workers reached the database: each holds two connections") from None
        commits = _committed(monitor)
        started = time.monotonic()
        while any(process.is_alive() for process in processes) and queue.qsize() < case.workers:
            monitor.look()
            time.sleep(0.2)
        length = time.monotonic() - started
        found = np.array([queue.get() for _ in processes])
        time.sleep(1.5)  # Postgres' counters lag
        commits = _committed(monitor) - commits
    for process in processes:
        process.join()
    trials = max(float(found[:, 3].sum()), 1.0)
    return {
        "case": vars(case),
        "busy": float(found[:, 0].sum() / found[:, 1].sum()),
        "trials_per_second": trials / length,
        "window_seconds": length,
        "trials": int(trials),
        "suggest_seconds": {"mean": float(found[:, 2].sum() / trials)},
        "commits_per_trial": commits / trials,
        "connections": monitor.most,
    }


def _committed(monitor: Monitor) -> int:
    query = "SELECT xact_commit FROM pg_stat_database WHERE datname = %s"
    monitor._cursor.execute(query, (monitor._database,))
    return int(monitor._cursor.fetchone()[0])


def _autocommit(url: str) -> Any:
    return create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT").connect()


def summary(rows: list[dict[str, Any]]) -> str:
    """The rows as text, one line each, oldest first."""
    head = "| label | workers x s | finished | busy | trials/s | gap p50 / p95 / max | suggest | CPU/trial | statements | commits | connections | page: refreshes, CPU of the last | resume | RSS |"  # noqa: E501
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for row in rows:
        case, gap, suggest = row["case"], row.get("gap_seconds"), row["suggest_seconds"]
        cells = [
            row.get("label", "") + (" stock Optuna" if case["stock"] else ""),
            f"{case['workers']} x {case['seconds']:g}",
            str(case["finished"]),
            f"{100 * row['busy']:.2f} %" if case["seconds"] else "",
            f"{row['trials_per_second']:.2f}",
            " / ".join(_ms(gap[q]) for q in ("p50", "p95", "p100")) if gap else "",
            _ms(suggest.get("p50", suggest.get("mean"))),
            _ms(row.get("cpu_seconds_per_trial")),
            f"{row['statements_per_trial']:.1f}" if "statements_per_trial" in row else "",
            f"{row['commits_per_trial']:.1f}",
            str(row["connections"]),
            _page(row.get("page_refreshes", [])),
            f"{row['resume_seconds']:.1f} s" if "resume_seconds" in row else "",
            f"{row['peak_rss_mib']:.0f} MiB" if "peak_rss_mib" in row else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _page(refreshes: list[dict[str, float]]) -> str:
    return f"{len(refreshes)}, {_ms(refreshes[-1]['cpu_seconds'])}" if refreshes else ""


def _ms(seconds: float | None) -> str:
    return "" if seconds is None or seconds != seconds else f"{1000 * seconds:.0f} ms"


if __name__ == "__main__":
    main()
