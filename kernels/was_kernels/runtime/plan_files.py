"""Where the plan of a checkpoint lies that is given by name, as other programs name checkpoints."""

from __future__ import annotations

from pathlib import Path

from was_search.errors import PlanError
from was_search.plan import JSON_NAME, TENSORS_NAME


def plan_folder(name: str, revision: str | None = None) -> Path:
    """The folder with the plan's two files: ``name`` itself, or the hub's cache, into which they are fetched.

    Raises:
        PlanError: a hub's repository does not have them.
    """
    from transformers.utils.hub import cached_file

    folder = Path(name)
    if folder.is_dir():
        return folder
    for file in (JSON_NAME, TENSORS_NAME):
        try:
            folder = Path(cached_file(name, file, revision=revision) or "").parent
        except OSError as error:
            raise PlanError(
                f"{name}: {file} cannot be had, though its config.json speaks of a plan ({error})"
            ) from error
    return folder
