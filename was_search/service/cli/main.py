"""The application of the command line: all groups of commands, and how errors end it."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Annotated

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
        message = redacted(str(error))
        if "--json" in sys.argv:
            sys.stdout.write(dumps({"event": "error", "kind": type(error).__name__, "message": message}) + "\n")
        stderr().print(f"[red]error:[/] {escape(message)}", soft_wrap=True)
        sys.exit(EXIT_ERROR)
    except MemoryError as error:
        stderr().print(f"[red]error:[/] out of memory; use a smaller --batch-size ({escape(str(error))})")
        sys.exit(EXIT_ERROR)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's error: importing torch takes seconds
            raise
        stderr().print(
            f"[red]error:[/] GPU out of memory; use a smaller --batch-size or --sequence-length ({escape(str(error))})",
            soft_wrap=True,
        )
        sys.exit(EXIT_ERROR)


if __name__ == "__main__":
    main()
