"""A message as the tokenizer's chat template writes it."""

from __future__ import annotations

from typing import Any

import numpy as np

from was_search.errors import ConfigError, reason
from was_search.shape import IntArray


def chat_ids(message: str, tokenizer: Any) -> IntArray:
    """Token ids of a chat with one message of the user, up to where the answer begins: int64 [n].

    Raises:
        ConfigError: as :func:`conversation_ids`.
    """
    return conversation_ids([{"role": "user", "content": message}], tokenizer)


def conversation_ids(messages: list[dict[str, Any]], tokenizer: Any) -> IntArray:
    """Token ids of a chat up to where the answer begins, int64 [n]; ``messages`` have a role and a content each.

    The template says what begins the chat, so nothing is put before it.

    Raises:
        ConfigError: the tokenizer has no chat template, or it cannot be rendered, or gives no tokens.
    """
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    except Exception as error:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ConfigError(
                "chat: the model's tokenizer has no chat template; give a plain prompt (without --chat), or take a "
                "model that was tuned for chats"
            ) from error
        raise ConfigError(
            f"chat: the tokenizer's chat template cannot be rendered ({reason(error)}); correct it, or give a "
            "plain prompt (without --chat), written as the model expects it"
        ) from error
    if not ids:
        raise ConfigError("chat: the tokenizer's chat template gives no tokens; correct it, or give a plain prompt")
    return np.asarray(ids, np.int64)
