"""What commands are made of: the application, options that several share, and how a function becomes a command."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from was_search.column_layout import COLUMNS_NAME
from was_search.logs import configure
from was_search.plan import Plan
from was_search.progress import JsonReporter, QuietReporter, Reporter, RichReporter
from was_search.settings import Settings, load_settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find how much of each layer's input an LLM can skip while decoding, and export it as a plan.",
)

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
EXIT_DRAINED = 3
"""The study was interrupted and has slots left; the same command goes on with it."""


def option(annotation: Any, help_text: str, *names: str, **extra: Any) -> Any:
    return Annotated[annotation, typer.Option(*names, help=help_text, **extra)]


SHARED: dict[str, Any] = {
    "config": option(Path | None, "TOML file with options by their long names.", rich_help_panel="General"),
    "quiet": option(bool, "Show results and errors only, no progress.", "--quiet", "-q", rich_help_panel="General"),
    "log_format": option(
        str | None,
        "Write events and warnings as text or json lines to standard error.",
        envvar="WAS_SEARCH_LOG_FORMAT",
        rich_help_panel="General",
    ),
    "as_json": option(bool, "One JSON object a line instead of bars and tables.", "--json", rich_help_panel="General"),
}
STORAGE: dict[str, Any] = {
    "storage": option(str | None, "Postgres URL, or embedded.", envvar="WAS_SEARCH_STORAGE", rich_help_panel="General"),
}

MODEL: dict[str, Any] = {
    "model": option(str | None, "Local folder or hub id."),
    "revision": option(str | None, "Hub revision."),
    "data": option(str | None, "Text file, folder, or wikitext2, c4, alpaca."),
    "device": option(str | None, "auto, cpu or cuda."),
    "dtype": option(str | None, "auto, float32, bfloat16 or float16."),
    "weights": option(str | None, "none (as stored), int8 or int4; int4:64 with a group of 64 outputs."),
    "sequence_length": option(int | None, "Tokens of one sequence."),
    "stride": option(int | None, "Tokens between windows; 0 means no overlap."),
    "test_sequences": option(int | None, "At most so many sequences of the test split."),
    "batch_size": option(int | None, "Sequences per forward."),
    "seed": option(int | None, "Of the samplers and of the order of sequences."),
}
Gpus = Annotated[int, typer.Option("--gpus", help="GPUs that the model is spread over, whole blocks on each.")]
PlanIn = Annotated[
    Path | None,
    typer.Option(
        "--plan", help="Folder of a plan, alone or with its weights; the settings it was made with are the defaults."
    ),
]


@dataclass(frozen=True)
class Call:
    """What the shared options of a command were."""

    config: Path | None
    reporter: Reporter
    flags: dict[str, Any]

    def settings(self, base: Settings | None = None) -> Settings:
        return load_settings(self.config, self.flags, base)

    def run(self, step: Callable[[Any], Any], base: Settings | None = None) -> Any:
        """Run ``step`` on a context made of the options over ``base``."""
        from was_search.api import Context

        with Context(self.settings(base), self.reporter) as context:
            return step(context)


def command(*groups: dict[str, Any], panel: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command: its options are the groups' and the function's own keyword-only ones.

    ``panel`` is the help's heading that it stands under.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        shared: dict[str, Any] = {}
        for group in (*groups, SHARED):
            shared.update(group)
        for parameter in own:
            shared.pop(parameter.name, None)
        parameters = own + [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=False if name in ("quiet", "as_json") else None,
                annotation=annotation,
            )
            for name, annotation in shared.items()
        ]

        def wrapper(**options: Any) -> None:
            mine = {parameter.name: options.pop(parameter.name) for parameter in own}
            as_json, quiet = options.pop("as_json"), options.pop("quiet")
            configure(options.pop("log_format") or "")
            reporter = JsonReporter() if as_json else QuietReporter() if quiet else RichReporter()
            try:
                function(Call(options.pop("config"), reporter, options), **mine)
            except KeyboardInterrupt:
                # Click would end silently; phases that were finished are cached, and slots wait for the next run.
                stderr().print(
                    f"interrupted; go on with\n  was-search {escape(shlex.join(sys.argv[1:]))}", soft_wrap=True
                )
                raise typer.Exit(EXIT_INTERRUPTED) from None

        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        wrapper.__doc__ = function.__doc__
        wrapper.__name__ = function.__name__
        app.command(function.__name__.strip("_"), rich_help_panel=panel)(wrapper)
        return function

    return register


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


def load_plan(folder: Path | None) -> tuple[Plan | None, Settings | None]:
    """A plan and the settings that it was made with."""
    if folder is None:
        return None, None
    plan = Plan.load(folder)
    recorded = plan.provenance.get("settings")
    made_with = {name: recorded[name] for name in _OF_A_PLAN if name in recorded} if isinstance(recorded, dict) else {}
    if (folder / COLUMNS_NAME).is_file():
        made_with |= {"model": str(folder), "dtype": "auto"}
        return plan, load_settings(None, made_with)
    return plan, load_settings(None, {**made_with, "revision": plan.revision, "weights": plan.weights})


_OF_A_PLAN = (
    *("model", "data", "device", "dtype", "score", "masks", "seed", "sequence_length", "stride", "batch_size"),
    *("dense_prefix", "calibration_sequences", "search_sequences", "test_sequences"),
)
"""Settings that a plan may bring along. A plan comes from anywhere: it names no database, cluster, address or file."""
