"""The cluster under test, all of real processes: Postgres over TCP, a Ray head, nodes, coordinators."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from scripts.make_random_model import make_random_model
from tests.chaos import processes
from tests.chaos.counted_worker import FOLDER, EvaluationLog, vector_name
from tests.servers.ports import free_port
from tests.servers.postgres import TcpServer
from was_search.service.steps.demonstration import DEMO_FOLDER

SEARCH: dict[str, Any] = {
    "target": 0.5,
    "device": "cpu",
    "space": "full",
    "sampler": "qmc",
    "sequence-length": 48,
    "calibration-sequences": 8,
    "pricing-sequences": 4,
    "slope-sequences": 8,
    "search-sequences": 24,
    "test-sequences": 4,
    "seed-rounds": 0,
    "descent-epochs": 0,
    "batch-size": 3,
    "max-attempts": 1000,
}
"""A cheap search. QMC suggests the same vectors whatever happens; nothing is given up, so a failed slot is an error."""

ROOT = Path(__file__).resolve().parents[2]
STUDY = "chaos"
UNDISTURBED = "undisturbed"
PASSWORD_USER = "was_search"
_MOST_NODES = 60
"""Nodes of a run, those that took the place of others included; more say that none can be started."""


class StuckError(AssertionError):
    """Something did not happen in time; the message holds what was waited for and the logs' last lines."""


@dataclass(frozen=True)
class Plan:
    """How large a run is. ``trial_timeout`` is the coordinator's deadline, in seconds, for one evaluation."""

    trials: int
    workers: int = 3
    nodes: int = 2
    trial_timeout: float = 10.0


class Postgres(TcpServer):
    """The server of a chaos run, with the coordinator's login and a database of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._password = secrets.token_urlsafe(12)
        self.as_superuser(
            f"CREATE ROLE {PASSWORD_USER} LOGIN PASSWORD '{self._password}'",
            f"GRANT pg_signal_backend, pg_monitor TO {PASSWORD_USER}",
            f"CREATE DATABASE chaos OWNER {PASSWORD_USER}",
        )
        self._engine = create_engine(self.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")

    @property
    def url(self) -> str:
        return f"postgresql+psycopg2://{PASSWORD_USER}:{self._password}@127.0.0.1:{self.port}/chaos"

    def query(self, statement: str, **values: Any) -> list[Any]:
        """Rows of a query of the harness's own."""
        with self._engine.connect() as connection:
            return list(connection.execute(text(statement), values))

    @contextmanager
    def writes_held(self) -> Iterator[None]:
        """Who writes to the slots inside the block waits in its transaction until the block ends."""
        with self._engine.connect().execution_options(isolation_level="READ COMMITTED") as connection:
            connection.execute(text("LOCK TABLE was.slot IN SHARE MODE"))
            yield


class RayNode:
    """One raylet (with the head's GCS if ``head``) as `ray start --block` runs it."""

    def __init__(self, name: str, folder: Path, environment: dict[str, str], *, address: str, cpus: int) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        head = ["--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false"]
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
            *([*head, f"--temp-dir={folder / 'ray'}"] if name == "head" else [f"--address={address}"]),
            *(f"--num-cpus={cpus}", "--num-gpus=0", f"--object-store-memory={100 * 2**20}"),
            *("--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0"),
            "--include-log-monitor=false",  # a process more on each node, and nobody is shown what it reads
        ]
        self.process = _spawn(command, folder, environment, self.log)

    @property
    def up(self) -> bool:
        return "Ray runtime started" in self.log.read_text(errors="replace")

    @property
    def too_slow(self) -> bool:
        """Whether Ray has given up waiting for it to start."""
        return not self.up and "timed out during startup" in self.log.read_text(errors="replace")

    @property
    def raylet(self) -> int | None:
        """Process id of the raylet, None where it does not run (yet)."""
        found = [pid for pid in processes.children(self.process.pid) if "raylet/raylet" in processes.command(pid)]
        return found[0] if found else None


@dataclass
class Coordinator:
    """One process of the coordinator's command."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path
    killed: bool = False

    def words(self) -> str:
        return self.log.read_text(errors="replace")


@dataclass
class Exit:
    """How a coordinator ended: killed by the run, ``finished``, or with the error in its ``words``."""

    number: int
    code: int
    words: str


@dataclass(frozen=True)
class Running:
    """A slot that is handed out: its attempt, the process of its worker, the name of its vector."""

    number: int
    attempt: int
    pid: int
    vector: str


@dataclass
class Cluster:
    """All processes of a run. A context manager; none of them outlives it.

    :meth:`supervise` is what systemd or Kubernetes would do: a coordinator that has ended is started again by the same
    command, until one reports that the study has finished.

    Attributes:
        folder: of logs, data and model; its path marks the run's processes.
        coordinators: those that live, oldest first.
        exits: how the others ended.
        finished: whether one reported that the study is finished.
        delayed: workers that a fault has frozen for now.
        abandoned: the latest epoch whose coordinator is known to be dead.
    """

    plan: Plan
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="was-chaos-")))
    nodes: list[RayNode] = field(default_factory=list)
    coordinators: list[Coordinator] = field(default_factory=list)
    exits: list[Exit] = field(default_factory=list)
    delayed: set[int] = field(default_factory=set)
    abandoned: int = 0
    finished: bool = False

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.close(keep=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(keep=error is not None)

    def _start(self) -> None:
        self.folder.chmod(0o755)  # the server's account must pass
        self.log = EvaluationLog(self.folder)
        self.pace(0.0)
        self.model = make_random_model(self.folder / "model", "tiny")
        self._environment = self._make_environment()
        os.environ[FOLDER] = str(self.folder)  # of Postgres' programs, whenever it is started again
        self.postgres = Postgres(self.folder)
        self.address = f"127.0.0.1:{free_port()}"
        self._nodes_made = self._coordinators_made = 0
        self.head = RayNode("head", self.folder, self._environment, address=self.address, cpus=0)
        while len(self.nodes) < self.plan.nodes:
            self.nodes.append(self._new_node())

    def close(self, *, keep: bool = False) -> None:
        """End every process; ``keep`` leaves the logs for whoever looks into a failure."""
        os.environ.pop(FOLDER, None)
        left = processes.end_all(self.folder)
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        assert not left, f"these processes of the run could not be ended: {left}"

    def pace(self, seconds: float) -> None:
        """How long every evaluation takes in addition, from the next one on."""
        unfinished = self.folder / "pace_seconds.new"
        unfinished.write_text(str(seconds))
        unfinished.rename(self.folder / "pace_seconds")

    def command(self, study: str) -> list[str]:
        """The coordinator's command; the database's URL, which has a password, is in its environment."""
        options = {
            **SEARCH,
            "model": self.model,
            "data": DEMO_FOLDER / "text",
            "ray": self.address,
            "study": study,
            "trials": self.plan.trials,
            "workers": self.plan.workers,
            "trial-timeout": self.plan.trial_timeout,
        }
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return [sys.executable, "-m", "tests.chaos.coordinator", "search", *flags]

    def start_coordinator(self, study: str = STUDY) -> Coordinator:
        number, self._coordinators_made = self._coordinators_made, self._coordinators_made + 1
        log = self.folder / f"coordinator-{number}.log"
        environment = {**self._environment, "WAS_SEARCH_STORAGE": self.postgres.url}
        made = Coordinator(number, _spawn(self.command(study), self.folder, environment, log), log)
        self.coordinators.append(made)
        return made

    def replace(self, node: RayNode) -> None:
        """A new node in the place of one whose raylet was killed."""
        self.wait_until(f"{node.name} notices that its raylet is dead", lambda: node.process.poll() is not None, 300)
        self.nodes[self.nodes.index(node)] = self._new_node()

    def supervise(self) -> None:
        """Take note of ended coordinators; start one where none is left and the study is unfinished.

        A node that Ray has given up while it started, which takes more than 30 s on a busy machine, is started again.

        Raises:
            StuckError: a node died by itself.
        """
        for coordinator in list(self.coordinators):
            code = coordinator.process.poll()
            if code is not None:
                self.coordinators.remove(coordinator)
                words = "killed" if coordinator.killed else coordinator.words()
                self.exits.append(Exit(coordinator.number, code, words))
                self.finished = self.finished or code == 0
        for node in [self.head, *self.nodes]:
            if node.process.poll() is not None:
                if node is not self.head and node.too_slow and self._nodes_made < _MOST_NODES:
                    self.nodes[self.nodes.index(node)] = self._new_node()
                    continue
                self.stuck(f"{node.name} ended by itself with code {node.process.returncode}")
        if not self.coordinators and not self.finished and self.exits:
            self.abandoned = self.epoch()
            self.start_coordinator()

    def wait_until(self, what: str, condition: Callable[[], Any], seconds: float) -> Any:
        """The condition's first true value.

        Raises:
            StuckError: it was not true within ``seconds``.
        """
        end = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > end:
                self.stuck(f"waited {seconds:.0f} s in vain until {what}")
            time.sleep(0.05)
        return value

    def stuck(self, what: str) -> None:
        """Raise with the last lines of every log."""
        logs = sorted(self.folder.glob("coordinator-*.log"), key=lambda path: path.stat().st_mtime)[-3:]
        logs += sorted(self.folder.glob("*.log"), key=lambda path: path.stat().st_mtime)[-3:]
        logs += sorted((self.folder / "ray").glob("session_2*/logs/raylet*.out"))[-2:]
        logs += sorted((self.folder / "ray").glob("session_2*/logs/gcs_server.out"))[-1:]
        tails = [f"--- {path}\n{_tail(path)}" for path in dict.fromkeys(logs)]
        raise StuckError("\n".join([what, f"slots: {self.counts()}", *tails]))

    def counts(self, study: str = STUDY) -> dict[str, int]:
        """Slots by state; {} before there are any."""
        try:
            rows = self.postgres.query(
                "SELECT state, count(*) FROM was.slot s JOIN was.study t ON t.id = s.study_id WHERE t.name = :study "
                "GROUP BY state",
                study=study,
            )
        except (AttributeError, DBAPIError):
            return {}
        return {row[0]: row[1] for row in rows}

    def epoch(self) -> int:
        """The number of the latest takeover of the study, 0 before the first."""
        rows = self.postgres.query("SELECT epoch FROM was.study WHERE name = :study", study=STUDY)
        return int(rows[0].epoch) if rows else 0

    def running(self) -> list[Running]:
        """Slots that are RUNNING under a coordinator that lives; those that a dead one left are not."""
        rows = self.postgres.query(
            "SELECT number, attempt, worker, sparsities FROM was.slot s JOIN was.study t ON t.id = s.study_id "
            "WHERE t.name = :study AND state = 'running' AND s.epoch > :abandoned ORDER BY number",
            study=STUDY,
            abandoned=self.abandoned,
        )
        return [
            Running(row.number, row.attempt, int(row.worker.rpartition(":")[2]), vector_name(row.sparsities))
            for row in rows
        ]

    def busy(self) -> list[Running]:
        """RUNNING slots whose worker lives and, by its own word, has begun and not ended the evaluation.

        Those that a fault delays are left out: they have been struck.
        """
        running = [slot for slot in self.running() if slot.pid not in self.delayed and processes.alive(slot.pid)]
        return [slot for slot in running if self.log.at_work(slot.pid) == slot.vector]

    def _new_node(self) -> RayNode:
        """Started once the one before is up: two that start at once on one machine take each other's files."""
        for node in [self.head, *self.nodes]:
            self.wait_until(f"{node.name} is up", lambda node=node: node.up or node.process.poll() is not None, 300)
        self._nodes_made += 1
        cpus = -(-self.plan.workers // self.plan.nodes)
        return RayNode(f"node-{self._nodes_made}", self.folder, self._environment, address=self.address, cpus=cpus)

    def _make_environment(self) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "WAS_"))}
        return {
            **environment,
            FOLDER: str(self.folder),
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "storage", "workers", "kernels")),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # Ray's 15 starves workers where the tests share the machine
            "PYTHONUNBUFFERED": "1",
        }


def _spawn(command: list[str], folder: Path, environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
