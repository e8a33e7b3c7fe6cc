"""Passwords kept out of what is shown: messages, logs, command lines."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

HIDDEN = "***"
ENVIRONMENT = {"--storage": "WAS_SEARCH_STORAGE", "--notify": "WAS_SEARCH_NOTIFY"}
"""Options that hold a secret, and the variables that they may come from instead."""

SECRET_VARIABLES = (*ENVIRONMENT.values(), "PGPASSWORD")

# "token" alone is left out: a model has tokens too.
_NAMED = r"\b\w*(?:password|passwd|pwd|secret|auth_?token|api_?key|scram_\w+_key)\w*"
# The last @ before a blank or quote: a password that was not quoted for a URL may hold others.
_USER = re.compile(r"(?<=://)[^\s'\"]*@")
_SCHEME = re.compile(r"\s*[A-Za-z][\w+.-]*:/+")
_QUOTED = r"(?P<quote>['\"])(?:\\.|(?!(?P=quote))[^\\])*(?P=quote)"
_GIVEN = re.compile(rf"{_NAMED}[\"']?\s*[=:]\s*\S", re.IGNORECASE)
_VALUE = re.compile(rf"({_NAMED}[\"']?\s*[=:]\s*)(?:{_QUOTED}|[\"']?[^\s&'\",;]+)", re.IGNORECASE)


def redacted(words: str) -> str:
    """``words`` without users and passwords of URLs, and without values called password, secret, auth_token, ..."""
    return _VALUE.sub(_without_value, _USER.sub(f"{HIDDEN}@", words))


def _without_value(found: re.Match[str]) -> str:
    quote = found["quote"] or ""
    return f"{found[1]}{quote}{HIDDEN}{quote}"


def secret_of(url: str) -> bool:
    """Whether a URL holds a password, in the usual place or among its arguments."""
    scheme = _SCHEME.match(url)
    # A password that was not quoted may hold any character; without a scheme a blank means that it is a text.
    place = url[scheme.end() :] if scheme else "".join(url.split(maxsplit=1)[:1])
    return ":" in place.rpartition("@")[0] or bool(_GIVEN.search(url))


def out_of_the_arguments(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """``arguments`` without URLs that hold a password, and these URLs by the variable that takes their place.

    ``--storage URL`` and ``--storage=URL`` of the last such option count, as on the command line. What follows a
    bare ``--`` is left alone: it belongs to another command.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept: list[str] = []
    moved: dict[str, str] = {}
    words = iter(range(end))
    for i in words:
        option, equals, value = arguments[i].partition("=")
        if option not in ENVIRONMENT or (not equals and i + 1 >= end):
            kept.append(arguments[i])
            continue
        if not equals:
            value = arguments[next(words)]
        if secret_of(value):
            kept = _without(kept, option)
            moved[ENVIRONMENT[option]] = value
        else:
            moved.pop(ENVIRONMENT[option], None)
            kept += [option, value]
    return [*kept, *arguments[end:]], moved


def hide_arguments() -> None:
    """Start this program again without passwords on its command line, which every user of the machine can read.

    They go into the environment, which only this user can. Returns where there are none, and where the arguments are
    not those of this process (another program calls ours); else never.
    """
    given = sys.argv[1:]
    kept, moved = out_of_the_arguments(given)
    if not moved or sys.orig_argv[-len(given) :] != given:
        return
    interpreter = sys.orig_argv[1 : len(sys.orig_argv) - len(given)]  # its flags, and the script or module
    sys.stderr.write(
        f"a password on the command line can be read by others and stays in the shell's history: "
        f"put the URL into {' and '.join(moved)} instead\n"
    )
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *interpreter, *kept], {**os.environ, **moved})


def _without(arguments: list[str], option: str) -> list[str]:
    """``arguments`` without the first ``option VALUE``, which a later one overrules."""
    if option not in arguments:
        return arguments
    at = arguments.index(option)
    return [*arguments[:at], *arguments[at + 2 :]]
