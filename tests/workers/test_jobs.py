"""Commands as Ray jobs: what is refused before anything is sent, and one real job on a head of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from tests.doubles.small_run import environment
from tests.servers.ray_head import START_SECONDS, jobs_at, ray_head
from was_search.errors import ConfigError, ResourceError
from was_search.service.cli.cluster import SUBMITTED
from was_search.service.cli.main import app
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
    with pytest.raises(ResourceError, match=r"ray: jobs at http://127\.0\.0\.1:1: nothing answers .*http://HOST:8265"):
        Jobs("http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="address: must be Ray's dashboard, http://HOST:8265, got 'ray://x:10001'"):
        Jobs("ray://x:10001")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "a command to run is needed after --"),
        (["dashboard"], "got 'dashboard'"),
        (["run", "--storage", "postgresql://a:b@c/d"], "a job's command is shown"),
    ],
)
def test_what_cannot_be_submitted_is_refused_here(arguments, words) -> None:
    result = CliRunner().invoke(app, ["submit", "--", *arguments])
    assert isinstance(result.exception, ConfigError)
    assert words in str(result.exception)


def test_whatever_runs_on_workers_can_be_submitted() -> None:
    """Before, ``compensate`` was refused as no command for a cluster."""
    commands = get_command(app).commands  # type: ignore[attr-defined]
    on_workers = {name for name, it in commands.items() if {"ray", "workers"} <= {each.name for each in it.params}}
    assert "compensate" in on_workers and on_workers <= set(SUBMITTED) <= commands.keys()


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
    monkeypatch.setattr(jobs, "require_http", lambda address: None)
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


@pytest.fixture
def head(tmp_path: Path, postgres_url: str) -> Iterator[str]:
    """A Ray head whose environment knows the database; the address of its dashboard."""
    env = {**environment(), "RAY_AUTH_MODE": "disabled", "WAS_SEARCH_STORAGE": postgres_url}
    env.pop("PYTHONPATH")  # the job brings its packages
    with ray_head(tmp_path / "head.log", env) as address:
        yield address


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.postgres
def test_a_job_runs_on_the_head_with_the_heads_environment(head: str) -> None:
    client = jobs_at(head)
    lines: list[str] = []
    job = client.submit(["doctor", "--ray", "auto", "--json"], patience_seconds=START_SECONDS)
    status = client.follow(job, lines.append)
    text = "".join(lines)
    assert status == "SUCCEEDED", text
    assert '"Postgres"' in text
    assert "cluster at" in text
