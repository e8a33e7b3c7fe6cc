"""``was-search db``: what a database's owner does."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

db = typer.Typer(no_args_is_help=True, help="Set a database up, as its owner.")


@db.callback()
def group() -> None:
    """Set a database up, as its owner."""


@db.command()
def init(
    storage: Annotated[
        str, typer.Option(envvar="WAS_SEARCH_STORAGE", help="The owner's Postgres URL, or embedded.")
    ] = "embedded",
    coordinator: Annotated[str, typer.Option(help="Role of those who run searches.")] = "was_search_coordinator",
    reader: Annotated[str, typer.Option(help="Role of those who look.")] = "was_search_reader",
) -> None:
    """Make or upgrade all tables, and two roles that can do no more than they need."""
    from was_storage.database import Database
    from was_storage.roles import init_roles

    with Database.open(storage) as database:
        done = init_roles(database, coordinator, reader)
    sys.stdout.write("".join(f"{statement};\n" for statement in done))
