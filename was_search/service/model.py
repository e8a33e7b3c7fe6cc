"""The model that is asked about: its checkpoint, and how it is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from was_search.errors import ConfigError, ModelError
from was_search.service.settings import Settings
from was_search.shape import Masks, ModelShape
from was_search.texts.protocol import content_hash

if TYPE_CHECKING:
    from torch import nn

    from was_search.checkpoints.load import ModelSource


Lasting = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True)
class Model:
    """A checkpoint under the settings; what is found in its files is read once.

    Attributes:
        source: of the checkpoint.
        weights: the format to which they are rounded.
        masks: of the projections that share an input.
        lasting: shows what may take long, by its name, while the block lasts.
    """

    source: ModelSource
    weights: str
    masks: Masks
    lasting: Lasting = field(default=lambda name: nullcontext(), repr=False, compare=False)

    @classmethod
    def of(cls, settings: Settings, lasting: Lasting = lambda name: nullcontext()) -> Model:
        """The model of the settings; no weight is read. One of the hub's is downloaded, a GGUF file written out.

        Raises:
            ConfigError: none is set.
            ModelError: there is none of that name.
        """
        from was_search.checkpoints.files import takes_long
        from was_search.checkpoints.load import resolve_model

        settings.require("model")
        name = settings.model
        with lasting(what) if (what := takes_long(name)) else nullcontext():
            source = resolve_model(name, settings.revision)
        return cls(source, settings.weights, settings.masks, lasting)

    @cached_property
    def fingerprint(self) -> str:
        """Of the checkpoint.

        Raises:
            ModelError: its weights are laid out for decoding.
        """
        from platformdirs import user_cache_path

        from was_search.checkpoints.fingerprint import fingerprint

        if self.source.columns is not None:  # what is found of it would be taken for the checkpoint's
            raise ModelError(
                f"model: {self.source.folder} holds weights laid out for decoding; give the checkpoint itself, or "
                "decode with it: generate, evaluate and bench take it as --plan"
            )
        with self.lasting(f"read the weights of {self.source.display_name} for their fingerprint"):
            return fingerprint(self.source, user_cache_path("was-search"))

    @property
    def key(self) -> str:
        """The model's part of a cache key: the checkpoint's fingerprint and the format of its weights."""
        return content_hash("model", 1, self.fingerprint, self.weights)

    @property
    def label(self) -> str:
        """Its name in a form that suits names of studies and folders."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.source.display_name)

    @cached_property
    def shape(self) -> ModelShape:
        """The projections from the configuration alone; no weight is read.

        Raises:
            ModelError: no model can be made of the configuration, or it lacks the projections.
        """
        from was_search.checkpoints.structure import find_structure

        return find_structure(self._empty, self.masks).shape

    @cached_property
    def token_rows(self) -> int:
        """Token ids that the model has rows for, from the configuration alone.

        Raises:
            ModelError: no model can be made of the configuration.
        """
        from was_search.checkpoints.structure import token_rows

        return token_rows(self._empty)

    @cached_property
    def _empty(self) -> nn.Module:
        from was_search.checkpoints.empty_model import empty_model

        return empty_model(self.source)

    @cached_property
    def positions(self) -> int | None:
        """Tokens of a text that the model was made for; None where its configuration names no limit."""
        from was_search.checkpoints.files import read_config
        from was_search.checkpoints.positions import most_positions

        return most_positions(read_config(self.source))

    def require_positions(self, asked: int) -> None:
        """Raise a ConfigError for sequences beyond what the model was made for: its losses mean nothing there."""
        room = self.positions
        if room is not None and asked > room:
            raise ConfigError(
                f"sequence_length: must be at most the model's {room} positions, got {asked}; "
                f"give --sequence-length {room}"
            )
