"""What of a checkpoint's ``generation_config.json`` counts: the ids that begin, end and pad a text, nothing else.

The file holds somebody's wishes for another program: beams, penalties, limits of time, kinds of caches. transformers
merges them into every ``generate``, also into one that says it is greedy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from was_search.checkpoints.files import ModelSource, read_config, read_object
from was_search.errors import ModelError, reason

if TYPE_CHECKING:
    from transformers import GenerationConfig

_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NAME = "generation_config.json"


def own_generation(source: ModelSource) -> GenerationConfig:
    """Greedy decoding that knows the checkpoint's special ids: what ``load_model`` gives its models.

    Raises:
        ModelError: as :func:`special_ids`.
    """
    from transformers import GenerationConfig

    return GenerationConfig(**special_ids(source))  # type: ignore[no-untyped-call]


def stored_generation(source: ModelSource) -> GenerationConfig:
    """All that the checkpoint wishes, as transformers reads it: for models that are handed to somebody else.

    Raises:
        ModelError: transformers refuses the file.
    """
    from transformers import GenerationConfig

    if not (source.folder / _NAME).is_file():
        return own_generation(source)
    try:
        return GenerationConfig.from_pretrained(source.folder)
    except Exception as error:
        raise ModelError(f"model: {source.folder / _NAME} is not valid ({reason(error)})") from error


def special_ids(source: ModelSource) -> dict[str, int | list[int] | None]:
    """The checkpoint's ids by name, from ``generation_config.json``, or without that file from ``config.json``.

    A negative id, as some files write it, stands for none.

    Raises:
        ModelError: the file is no JSON object, or one of the three is no id and no list of ids.
    """
    path = source.folder / _NAME
    if path.is_file():
        values = read_object(path)
    else:
        path, values = source.folder / "config.json", read_config(source)
    nested = values.get("text_config")
    if path.name != _NAME and isinstance(nested, dict):
        values = {**nested, **{key: value for key, value in values.items() if value is not None}}
    return {key: _ids(path, key, values.get(key)) for key in _KEYS}


def _ids(path: Path, key: str, value: Any) -> int | list[int] | None:
    several = value if isinstance(value, list) and key == "eos_token_id" else [] if value is None else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) for item in several):
        raise ModelError(f"model: {path}: {key} must be a token's id, got {str(value)[:80]!r}; copy the file again")
    ids = [item for item in several if item >= 0]
    if not ids:
        return None
    return ids if isinstance(value, list) else ids[0]
