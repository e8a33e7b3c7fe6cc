"""Words and command lines without their secrets."""

from __future__ import annotations

import sys

import pytest

from was_search.process.redaction import hide_arguments, out_of_the_arguments, redacted, secret_of

URL = "postgresql://me:s3cret@host/db"


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (f"cannot reach {URL}?password=s3cret&x=1", "cannot reach postgresql://***@host/db?password=***&x=1"),
        ("at 'postgres://me:s3/cr@et@h:1/d', again", "at 'postgres://***@h:1/d', again"),
        ('{"password": "s3cret", "x": 1}', '{"password": "***", "x": 1}'),
        ("{'password': 's3 cr\\'et', 'x': 1}", "{'password': '***', 'x': 1}"),
        ("host=h password = 's3 cr\\'et' user=u", "host=h password = '***' user=u"),
        ("host=h password='s3cret", "host=h password=***"),
        ("scram_client_key=s3cret", "scram_client_key=***"),
        ("postgres://me:s3cret@h1:1,h2:2/d", "postgres://***@h1:1,h2:2/d"),
        ("postgres://me:s3cret@%2Ftmp%2Fx/d", "postgres://***@%2Ftmp%2Fx/d"),
        ("sslpassword=s3cret PGPASSWORD=s3cret", "sslpassword=*** PGPASSWORD=***"),
        ("RAY_AUTH_TOKEN=s3cret", "RAY_AUTH_TOKEN=***"),
        ("api_key: s3cret, done", "api_key: ***, done"),
        ("see https://example.org/a?b=c and tokens: 96", "see https://example.org/a?b=c and tokens: 96"),
        ("postgresql://host/db at 10:20", "postgresql://host/db at 10:20"),
        ("password authentication failed for user", "password authentication failed for user"),
    ],
)
def test_words(words: str, left: str) -> None:
    assert redacted(words) == left
    assert redacted(left) == left


@pytest.mark.parametrize(
    ("url", "has"),
    [
        (URL, True),
        ("postgresql://host/db?user=me&password=x", True),
        ("postgresql://host/db?sslpassword=x", True),
        ("postgresql://me@host/db", False),
        ("postgresql://host:5432/db?sslmode=verify-full", False),
        ("postgresql://me:s3/cr?et@host/db", True),
        ("postgresql://me:s3cret@[::1/db", True),
        ("postgresql://me:s3cret@%2Ftmp%2Fx:5432/db", True),
        ("host=h password='s3 cret'", True),
        ("postgresql:/me:s3cret@host/db", True),
        ("me:s3cret@host/db", True),
        ("host=h password=;s3cret", True),
        ("a prompt: write to me@host", False),
        ("postgresql://me@%2Ftmp%2Fx:5432/db", False),
        ("postgresql://me@h1:1,h2:2/db", False),
        ("service=searches", False),
        ("embedded", False),
    ],
)
def test_what_holds_a_password(url: str, has: bool) -> None:
    assert secret_of(url) is has


@pytest.mark.parametrize(
    ("arguments", "kept", "moved"),
    [
        (["status", "--storage", URL, "x"], ["status", "x"], {"WAS_SEARCH_STORAGE": URL}),
        (["status", f"--storage={URL}"], ["status"], {"WAS_SEARCH_STORAGE": URL}),
        (["run", "--storage", "embedded", "--storage", URL], ["run"], {"WAS_SEARCH_STORAGE": URL}),
        (["run", "--storage", URL, "--storage=embedded"], ["run", "--storage", "embedded"], {}),
        (["run", "--notify", "https://a:b@h/x"], ["run"], {"WAS_SEARCH_NOTIFY": "https://a:b@h/x"}),
        (["run", "--storage"], ["run", "--storage"], {}),
        (["submit", "--", "run", "--storage", URL], ["submit", "--", "run", "--storage", URL], {}),
        (["run", "--model", "x", "-q"], ["run", "--model", "x", "-q"], {}),
    ],
)
def test_passwords_leave_the_command_line(arguments: list[str], kept: list[str], moved: dict[str, str]) -> None:
    assert out_of_the_arguments(arguments) == (kept, moved)


def test_a_program_that_calls_ours_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("os.execve", lambda program, arguments, environment: started.append(arguments))
    monkeypatch.setattr(sys, "argv", ["was-search", "status", "--storage", URL])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "pytest"])
    hide_arguments()
    assert started == []
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "utf8", "/bin/was-search", *sys.argv[1:]])
    hide_arguments()
    assert started == [[sys.executable, "-X", "utf8", "/bin/was-search", "status"]]
