"""docs/options.md says what the options are; the help of commands is made of the same table."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from was_search.service.cli.command import EVERY_COMMAND, Commands
from was_search.service.cli.main import app
from was_search.service.cli.options_page import page
from was_search.service.options import Group
from was_search.service.settings import OPTIONS

PAGE = Path(__file__).parents[4] / "docs" / "options.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "docs/options.md is stale: run 'make docs'"


def test_the_page_has_a_row_for_every_setting():
    rows = [line.split(" | ") for line in page().split("## Commands")[0].splitlines() if line.startswith("| `--")]
    flags = {row[0].removeprefix("| ").split("`")[1] for row in rows}
    assert flags == {option.flag for option in OPTIONS.values()} | {"--config", "--quiet", "--log-format", "--json"}
    assert ["| `--radius`", "`0.05`", "number; in (0, 1]"] in [row[:3] for row in rows]
    assert ["| `--early-stopping`", "`true`", "true or false"] in [row[:3] for row in rows]
    assert ["| `--score`", "`l2`", "`l1`, `l2`, `none`"] in [row[:3] for row in rows]


def test_the_page_has_every_command_and_its_own_options():
    sections = dict(part.split("\n", 1) for part in page().split("\n### ")[1:])
    assert {*typer.main.get_command(app).commands} - {"db"} == {*sections} - {"db init"}
    assert "| `--gpus` | `1` |" in sections["evaluate"]
    assert "| `--check` | `0` |" in sections["profile"]
    assert "| `STUDY` | required |" in sections["pause"]
    assert "--target`" in sections["demo"]
    assert "[Target](#target)" not in sections["demo"]


def test_a_command_takes_groups_and_single_settings():
    commands = Commands("Panel")

    @commands.command(Group.DESCENTS, "seed")
    def swim(call, *, lanes: int = 3, descent_chains: int = 7) -> None:
        """Swim."""

    found = {parameter.name: parameter for parameter in typer.main.get_command(commands.typer).params}
    groups = {option.name for option in OPTIONS.values() if option.group is Group.DESCENTS}
    assert {*found} >= {*groups, "seed", "lanes", *EVERY_COMMAND}
    assert {*found} & OPTIONS.keys() == {*groups, "seed"}
    assert found["descent_rounds"].help == OPTIONS["descent_rounds"].help
    assert found["descent_rounds"].rich_help_panel == Group.DESCENTS
    assert found["descent_rounds"].default is None
    assert found["descent_chains"].default == 7  # its own


def test_a_command_cannot_take_a_setting_that_is_none():
    with pytest.raises(KeyError, match="sed"):
        Commands("Panel").command("sed")(lambda call: None)
