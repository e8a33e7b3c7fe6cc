"""Commands as Ray jobs: what is refused before anything is sent, and one real job on a head of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.workers.small_run import environment
from was_search.cli import app
from was_search.errors import ConfigError, ResourceError
from was_workers import jobs
from was_workers.jobs import Jobs, refuse_secrets


def test_a_password_is_not_sent() -> None:
    with pytest.raises(ConfigError, match="storage: a job's command is shown in Ray's dashboard"):
        refuse_secrets(["run", "--storage", "postgresql://me:secret@host/db"])
    for arguments in (
        ["run", "--storage=postgresql://host/db?user=me&password=secret"],
        ["run", "--storage", "postgresql://host/db"],
        ["run", "--notify", "https://hooks.example/T0/secret"],
        ["run", "--model", "https://me:secret@hub/model"],
        ["run", "--data", "password=secret"],
    ):
        with pytest.raises(ConfigError, match="a job's command is shown") as caught:
            refuse_secrets(arguments)
        assert "secret" not in str(caught.value).replace("looks like a secret", "")
    refuse_secrets(["run", "--ray", "auto", "--model", "org/model", "--storage", "embedded"])


def test_an_address_where_nothing_answers() -> None:
    with pytest.raises(ResourceError, match=r"ray: jobs at http://127\.0\.0\.1:1: Failed to connect.*head's dashboard"):
        Jobs("http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="address: must be Ray's dashboard, http://HOST:8265, got 'ray://x:10001'"):
        Jobs("ray://x:10001")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "a command to run is needed behind --"),
        (["dashboard"], "got 'dashboard'"),
        (["run", "--storage", "postgresql://a:b@c/d"], "a job's command is shown"),
    ],
)
def test_what_cannot_be_submitted_is_refused_here(arguments, words) -> None:
    result = CliRunner().invoke(app, ["submit", "--", *arguments])
    assert isinstance(result.exception, ConfigError)
    assert words in str(result.exception)


def test_wrong_flags_are_refused_here() -> None:
    result = CliRunner().invoke(app, ["submit", "--", "run", "--modell", "x"])
    assert result.exit_code == 2


class Client:
    """Ray's client, refusing jobs until its agent is there."""

    def __init__(self, address: str) -> None:
        self.refusals = 2
        self.jobs: list[dict] = []

    def submit_job(self, **job) -> str:
        if self.refusals:
            self.refusals -= 1
            raise RuntimeError("Request failed with status code 500: No available agent to submit job")
        self.jobs.append(job)
        return job["submission_id"] or "made-up"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    import ray.job_submission

    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", Client)
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    return Jobs("http://head:8265")


def test_a_head_that_is_just_starting_is_waited_for(client) -> None:
    assert client.submit(["run", "--model", "a b"]) == "made-up"
    (job,) = client._client.jobs
    assert job["entrypoint"] == "python -m was_search run --model 'a b'"
    folders = [Path(folder) for folder in job["runtime_env"]["py_modules"]]
    assert [folder.name for folder in folders] == ["was_search", "was_storage", "was_workers", "was_kernels"]
    assert client.submit(["doctor"], name="mine") == "mine"
    assert "env_vars" not in job["runtime_env"]  # Ray's dashboard shows them


def test_it_is_not_waited_for_longer_than_asked(client) -> None:
    with pytest.raises(ResourceError, match="No available agent"):
        client.submit(["doctor"], patience_seconds=-1.0)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def head(tmp_path: Path, postgres_url: str) -> Iterator[str]:
    """A Ray head in processes of its own, whose environment knows the database; the address of its dashboard."""
    import shutil
    import tempfile

    port, agent, gcs = free_port(), free_port(), free_port()
    folder = tempfile.mkdtemp(prefix="ray-job-", dir="/tmp")  # Unix sockets: a short path
    bin_folder = str(Path(sys.executable).parent)
    env = {**environment(), "RAY_AUTH_MODE": "disabled", "WAS_SEARCH_STORAGE": postgres_url}
    env.pop("PYTHONPATH")  # the job brings its packages
    command = [
        f"{bin_folder}/ray", "start", "--head", f"--port={gcs}", f"--dashboard-port={port}", "--num-cpus=1",
        f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}", "--disable-usage-stats", "--block",
    ]  # fmt: skip
    log = tmp_path / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env={**env, "PATH": f"{bin_folder}{os.pathsep}{env['PATH']}"},
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.postgres
def test_a_job_runs_on_the_head_with_the_heads_environment(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    end = time.monotonic() + 90
    while True:
        try:
            client = Jobs(head)
            break
        except ResourceError:
            assert time.monotonic() < end
            time.sleep(1.0)
    lines: list[str] = []
    job = client.submit(["doctor", "--ray", "auto", "--json"], patience_seconds=90)
    status = client.follow(job, lines.append)
    text = "".join(lines)
    assert status == "SUCCEEDED", text
    assert '"Postgres"' in text
    assert "cluster at" in text
