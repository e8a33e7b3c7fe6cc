"""The application of the command line: all groups of commands, and how errors end it."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import Annotated, NoReturn

import typer
from rich.markup import escape

from was_search import __version__
from was_search.errors import WasError
from was_search.process.plain_json import dumps
from was_search.process.redaction import hide_arguments, redacted
from was_search.process.signals import Terminated, terminable
from was_search.process.streams import forgiving
from was_search.service.cli import cluster, plan, run, study
from was_search.service.cli.command import EXIT_ERROR, stderr

_LONGEST = 300
"""Characters of a path that are shown."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find how much of each layer's input an LLM can skip while decoding, and export it as a plan.",
)
for group in (run, plan, study, cluster):
    app.add_typer(group.commands.typer)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        sys.stdout.write(f"was-search {__version__}\n")
        raise typer.Exit


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)
"""Errors of the file system that often name no file."""


def about_file(error: OSError) -> str | None:
    """What to say where a file, a folder or a disk is the reason; None for other errors, as of connections."""
    if error.filename is None and error.errno not in _FULL:
        return None
    named = "a file" if error.filename is None else repr(os.fsdecode(error.filename))
    named = named if len(named) <= _LONGEST else f"{named[: _LONGEST - 3]}..."
    return f"{named} cannot be used: {error.strerror}"


def main() -> None:
    """Entry point: errors that a user can mend are one line, never a traceback, and no password is shown.

    Whatever is written finds its way through the streams' encoding (:func:`forgiving`).
    """
    forgiving()
    hide_arguments()
    try:
        with terminable():
            app()
    except Terminated as ending:
        with suppress(OSError):  # the terminal may have gone
            stderr().print(str(ending))
        sys.exit(ending.code)
    except WasError as error:
        _end(error, str(error))
    except OSError as error:
        if (words := about_file(error)) is None:
            raise
        _end(error, words)
    except MemoryError as error:
        _end(error, f"out of memory; use a smaller --batch-size ({error})")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's error: importing torch takes seconds
            raise
        _end(error, f"GPU out of memory; use a smaller --batch-size or --sequence-length ({error})")


def _end(error: BaseException, words: str) -> NoReturn:
    """Say in one line, and as an event where those are asked for, why the command ends."""
    message = redacted(words)
    if "--json" in sys.argv:
        sys.stdout.write(dumps({"event": "error", "kind": type(error).__name__, "message": message}) + "\n")
    stderr().print(f"[red]error:[/] {escape(message)}", soft_wrap=True)
    sys.exit(EXIT_ERROR)


if __name__ == "__main__":
    main()
