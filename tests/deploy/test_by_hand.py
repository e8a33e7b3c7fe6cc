"""A new user follows "By hand" of deploy/README.md on one machine, from nothing to a plan: the page's own commands.

What differs from the page is in the substitutions below: addresses, ports, passwords, a small model. A command that the
page gets and nobody follows here fails the test, and so does a substitution that no longer meets anything.
"""

from __future__ import annotations

import json
import secrets
import shlex
import shutil
import signal
import tempfile
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chaos import processes
from tests.deploy.guide import Block, Chapter, chapter
from tests.deploy.shells import ROOT, Machine, Terminal
from tests.doubles.small_run import SMALL, small_model
from tests.servers.ports import free_port
from tests.servers.postgres import TcpServer
from was_search.errors import StorageError
from was_search.plan import Plan
from was_search.service.steps.demonstration import DEMO_FOLDER

GUIDE: Chapter = chapter(ROOT / "deploy" / "README.md", "By hand")
RAY_HERE = (
    "--node-ip-address=127.0.0.1 --num-cpus=1 --object-store-memory=80000000 --min-worker-port=0 --max-worker-port=0"
)
"""Several Ray nodes on one machine share its address and its memory."""

TOO_SLOW = GUIDE.said("node timed out during startup")
"""What Ray says of a node that it did not see in time."""

SMALL_RUN = {**SMALL, "device": "cpu", "study": "by-hand"}


def typed(text: str, substitutions: dict[str, str]) -> str:
    """``text`` with the substitutions, each of which must meet something."""
    for old, new in substitutions.items():
        assert old in text, f"the guide no longer says {old!r} in\n{text}"
        text = text.replace(old, new)
    return text


def local(text: str) -> str:
    return text.replace("10.0.0.", "127.0.0.")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the server's account can enter; whatever was started in it ends with it."""
    if shutil.which("bash") is None:
        pytest.skip("the guide's commands are typed into bash, which is missing")
    made = Path(tempfile.mkdtemp(prefix="was-guide-"))
    made.chmod(0o755)
    yield made
    left = processes.end_all(made)
    shutil.rmtree(made, ignore_errors=True)
    assert not left, f"these processes could not be ended: {left}"


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> TcpServer:
    """The Postgres that the guide's first command installs, set up for another machine as it says."""
    monkeypatch.setenv("WAS_CHAOS_FOLDER", str(folder))  # the mark by which its processes are found
    listen = GUIDE.said(r"listen_addresses = .*")
    rule = GUIDE.said(r"host was_search .*")
    try:
        return TcpServer(folder, listen=typed(listen, {"listen_addresses = '*'": "127.0.0.1"}), host_rule=local(rule))
    except StorageError as error:
        pytest.skip(f"no Postgres server can be started here: {error}")


class Reader:
    """Whoever follows the guide: takes the blocks one after another, each once."""

    def __init__(self) -> None:
        self._left = list(GUIDE.blocks)

    def next(self, heading: str, language: str = "bash") -> str:
        block = self._left.pop(0)
        assert (block.heading, block.language) == (heading, language), f"the guide goes on with {block}"
        return local(block.text)

    def assert_through(self) -> None:
        assert self._left == []


def get(url: str, seconds: float = 300.0) -> Any:
    end = time.monotonic() + seconds
    while True:
        with suppress(OSError), urllib.request.urlopen(url, timeout=10) as reply:
            return reply.read().decode()
        assert time.monotonic() < end, f"nothing answers at {url}"
        time.sleep(0.25)


def start(terminal: Terminal, text: str) -> None:
    """Start a node of Ray; as the guide says, again where a busy machine did not keep Ray's 30 s."""
    for left in reversed(range(3)):
        before = processes.of_run(terminal.folder)
        try:
            terminal.type(text)
            return
        except AssertionError as error:
            if not left or TOO_SLOW not in str(error):
                raise
        for pid in {*processes.of_run(terminal.folder)} - {*before}:  # `ray stop` would end every Ray on this machine
            processes.send(pid, signal.SIGKILL)


def test_a_node_that_was_too_slow_is_started_again(folder: Path) -> None:
    machine = Machine(folder, Path("/nowhere"), {})
    terminal = Terminal(machine, "node")
    slow = f"sleep 600 &\n[ -e there ] || {{ touch there; echo 'The current {TOO_SLOW}'; exit 1; }}"
    start(terminal, slow)
    (left,) = (pid for pid in processes.of_run(folder) if "sleep" in processes.command(pid))
    with pytest.raises(AssertionError, match="exit code 1 of"):
        start(terminal, "exit 1")
    assert processes.alive(left), "what was there before stays"


@pytest.mark.postgres
@pytest.mark.ray
@pytest.mark.slow(seconds=75)
@pytest.mark.timeout(1800)
def test_the_guide_leads_from_nothing_to_a_plan(folder: Path, server: TcpServer) -> None:
    reader = Reader()
    superuser = {"PGUSER": "postgres", "PGHOST": str(server.data), "PGPORT": str(server.port)}
    machine = Machine(folder, server.programs, superuser)
    passwords = {login: secrets.token_hex(12) for login in ("was_search", "searches", "looks")}
    database_port, ray_port, page_port = str(server.port), str(free_port()), str(free_port())

    def url_of(login: str) -> dict[str, str]:
        return {f"{login}:PASSWORD@127.0.0.1:5432": f"{login}:{passwords[login]}@127.0.0.1:{database_port}"}

    postgres = "1. Postgres"
    owner = Terminal(machine, "owner")
    owner.type(reader.next(postgres), answers=2 * f"{passwords['was_search']}\n")
    owner.type(typed(reader.next(postgres), url_of("was_search")))
    printed = owner.type(reader.next(postgres))
    assert "CREATE ROLE was_search_coordinator NOLOGIN" in printed
    logins = reader.next(postgres, "sql")
    for login in ("searches", "looks"):
        logins = typed(logins, {f"{login} LOGIN PASSWORD '...'": f"{login} LOGIN PASSWORD '{passwords[login]}'"})
    psql = GUIDE.said(r"psql .*")
    owner.type(f"{psql} --set=ON_ERROR_STOP=1 <<'END'\n{logins}END")

    head = Terminal(machine, "head")
    ray_start = {"ray start": f"ray start {RAY_HERE}", "6379": ray_port}
    start(head, typed(reader.next("2. Ray"), ray_start))
    assert (machine.home / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
    node = typed(reader.next("2. Ray"), ray_start)
    for name in ("node-1", "node-2"):
        start(Terminal(machine, name), node)
    status = f"{GUIDE.said('ray status')} --address=127.0.0.1:{ray_port}"
    end = time.monotonic() + 300
    while "/3.0 CPU" not in (shown := head.type(status)):  # the head and two nodes, with a processor each
        assert time.monotonic() < end, shown

    options = folder / "small.toml"
    options.write_text(
        "".join(f"{name} = {json.dumps(value)}\n" for name, value in SMALL_RUN.items() if name != "trials")
    )
    assert set(tomllib.loads(options.read_text())) < set(SMALL_RUN)
    coordinator = Terminal(machine, "coordinator")
    printed = coordinator.type(
        typed(
            reader.next("4. Run"),
            {
                **url_of("searches"),
                ":6379": f":{ray_port}",
                "/models/Llama-3.2-1B": small_model(),
                "wikitext2": str(DEMO_FOLDER / "text"),
                "--trials 200": "--trials 6",
                "--workers 8": f"--workers 1:2 --config {options}",
            },
        ),
        seconds=900.0,
    )
    assert f"cluster at 127.0.0.1:{ray_port}: 3 CPUs" in " ".join(printed.split()), printed
    plan_folder = typed(GUIDE.said("was-runs/.*/plan"), {"STUDY": "by-hand"})
    plan = Plan.load(machine.home / plan_folder)
    assert plan.budget == 0.6

    block = typed(reader.next("5. Watch"), {**url_of("looks"), "8080": page_port})
    *lines, page = block.strip().splitlines()
    watcher = Terminal(machine, "watcher")
    printed = watcher.type("\n".join(lines))
    assert "6 of 6 finished" in " ".join(printed.split())
    watcher.leave_running(page)
    studies = json.loads(get(f"http://127.0.0.1:{page_port}/api/studies"))
    assert [study["study_name"] for study in studies["study_summaries"]] == ["by-hand"]
    assert "<html" in get(f"http://127.0.0.1:{page_port}/dashboard/")
    # The proxy is tried by tests/security/test_proxy.py; then comes what a line of the log looks like.
    assert "nginx" in reader.next("5. Watch", "bash")
    assert "slot" in reader.next("6. Logs", "json")
    reader.assert_through()
    for path in folder.glob("*.log"):
        assert not any(password in path.read_text(errors="replace") for password in passwords.values()), path.name


def test_compose_starts_ray_as_the_guide_does() -> None:
    """What one types by hand, compose types as well; it may add flags."""
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))["services"]
    by_hand = [b for b in GUIDE.blocks if b.heading == "2. Ray"]
    for block, service, address in ((by_hand[0], "ray-head", ""), (by_hand[1], "worker", "ray-head")):
        words = _ray_start(block)
        if address:
            words = [word.replace("10.0.0.1", address) for word in words]
        missing = set(words) - set(services[service]["command"])
        assert not missing, f"compose's {service} lacks {missing}"


def _ray_start(block: Block) -> list[str]:
    (line,) = (line for line in block.text.splitlines() if line.startswith("ray start"))
    return shlex.split(line)
