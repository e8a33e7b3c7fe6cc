"""A call that a worker without a model answers with a method of its own."""

from __future__ import annotations

import sys
from typing import Any

from ray import cloudpickle

from was_search.coordinator.calls import Call

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # nodes of a cluster have no tests


class Ask(Call[Any]):
    """Asks the worker for ``method(*args)``; the method's name is the call's."""

    def __init__(self, method: str, *args: Any, tokens: float = 0.0) -> None:
        self.name = self.words = method  # type: ignore[misc]
        self.args = args
        self._tokens = tokens

    @property
    def tokens(self) -> float:
        return self._tokens

    def run(self, model: Any) -> Any:
        return getattr(model, self.name)(*self.args)
