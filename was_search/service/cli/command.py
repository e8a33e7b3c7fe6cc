"""Turns a function into a command with its own options, the settings that it needs, and every command's options."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from was_search.process.logs import configure
from was_search.service.options import Group, Option
from was_search.service.reports.progress import JsonReporter, QuietReporter, Reporter, RichReporter
from was_search.service.settings import OPTIONS, Settings
from was_search.service.settings_file import load_settings

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
EXIT_DRAINED = 3
"""Exit status when the study was interrupted and has slots left; the same command goes on with it."""


def _option(annotation: Any, help_text: str, *names: str, **extra: Any) -> Any:
    return Annotated[annotation, typer.Option(*names, help=help_text, **extra)]


EVERY_COMMAND: dict[str, Any] = {
    "config": _option(Path | None, "TOML file with options by their long names.", rich_help_panel=Group.STORAGE),
    "quiet": _option(
        bool, "Show results and errors only, no progress.", "--quiet", "-q", rich_help_panel=Group.STORAGE
    ),
    "log_format": _option(
        str | None,
        "Write events and warnings as text or json lines to standard error.",
        envvar="WAS_SEARCH_LOG_FORMAT",
        rich_help_panel=Group.STORAGE,
    ),
    "as_json": _option(
        bool, "One JSON object a line instead of bars and tables.", "--json", rich_help_panel=Group.STORAGE
    ),
}
"""Options that every command has and that are no settings."""


def _flag(option: Option) -> Any:
    """A setting as typer's flag; None where it is not given, so that a file or the default counts."""
    kind = str if option.kind is None else option.kind
    names = (f"{option.flag}/--no-{option.flag[2:]}",) if kind is bool else ()
    return _option(kind | None, option.help, *names, envvar=option.env or None, rich_help_panel=option.group)


@dataclass(frozen=True)
class Invocation:
    """The settings and common options that a command was called with."""

    config: Path | None
    reporter: Reporter
    flags: dict[str, Any]

    def settings(self, base: Settings | None = None) -> Settings:
        return load_settings(self.config, self.flags, base)

    def run(self, step: Callable[[Any], Any], base: Settings | None = None) -> Any:
        """Run ``step`` on a context made of the options over ``base``."""
        from was_search.service.context import Context

        with Context(self.settings(base), self.reporter) as context:
            return step(context)


@dataclass(frozen=True)
class Commands:
    """A group of commands, under one heading of the help; ``typer`` is what the application takes in."""

    panel: str
    typer: typer.Typer = field(default_factory=typer.Typer)

    def command(self, *settings: Group | str) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Make a function a command: its options are its own keyword-only ones and the ``settings``.

        Args:
            settings: what it takes into :meth:`Invocation.settings`: whole groups, or single options by name.
        """

        def register(function: Callable[..., None]) -> Callable[..., None]:
            run = _command(function, _flags(settings) | EVERY_COMMAND)
            self.typer.command(function.__name__.strip("_"), rich_help_panel=self.panel)(run)
            return function

        return register


def _flags(settings: tuple[Group | str, ...]) -> dict[str, Any]:
    single = {OPTIONS[name].name for name in settings if not isinstance(name, Group)}
    return {name: _flag(option) for name, option in OPTIONS.items() if option.group in settings or name in single}


def _command(function: Callable[..., None], shared: dict[str, Any]) -> Callable[..., None]:
    """``function`` as typer calls it, with ``shared`` options beside its own, which replace those of the same name."""
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    names = [parameter.name for parameter in own]
    parameters = own + [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if name in ("quiet", "as_json") else None,
            annotation=annotation,
        )
        for name, annotation in shared.items()
        if name not in names
    ]

    def run(**options: Any) -> None:
        mine = {name: options.pop(name) for name in names}
        as_json, quiet = options.pop("as_json"), options.pop("quiet")
        configure(options.pop("log_format") or "")
        reporter = JsonReporter() if as_json else QuietReporter() if quiet else RichReporter()
        try:
            function(Invocation(options.pop("config"), reporter, options), **mine)
        except KeyboardInterrupt:
            # Click would end silently; phases that were finished are cached, and slots wait for the next run.
            stderr().print(f"interrupted; go on with\n  was-search {escape(shlex.join(sys.argv[1:]))}", soft_wrap=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = function.__doc__
    run.__name__ = function.__name__
    return run


def stderr() -> Console:
    return Console(stderr=True, highlight=False)
