"""What the steps share: settings, database, cache, tokens and workers, each opened when first needed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from was_search.errors import ConfigError, ResourceError
from was_search.process import logs
from was_search.service.arrays import pack_array, unpack_array
from was_search.service.reports.progress import Advance, Reporter
from was_search.service.settings import Settings
from was_search.service.steps.caching import Row, cached
from was_search.studies.names import folder_name
from was_search.studies.pool_state import PoolState
from was_search.texts.protocol import EvaluationProtocol, TokenSet, content_hash

if TYPE_CHECKING:
    from was_search.checkpoints.load import ModelSource
    from was_search.service.watching.notify import Announcement
    from was_search.texts.splits import SplitText
    from was_storage.server.database import Database
    from was_storage.studies.cache import Artifact, ArtifactCache
    from was_workers.cluster import Cluster
    from was_workers.pool import Pool


T = TypeVar("T")


@dataclass(frozen=True)
class Placement:
    """Where workers run: ``device`` cpu or cuda, GPUs of each worker, and the dtype."""

    device: str
    gpus_per_worker: float
    dtype: str


def _shared(open_it: Callable[[Context], T]) -> cached_property[T]:
    """A property opened at the first asking by the root context, on which its siblings for other targets draw."""

    def get(context: Context) -> T:
        found: T = open_it(context) if context.root is context else getattr(context.root, open_it.__name__)
        return found

    get.__doc__ = open_it.__doc__
    return cached_property(get)


class Context:
    """Everything a step needs, opened lazily: what is cached starts no Ray and loads no model.

    A context manager; owns the database and the Ray connection and closes both.
    """

    def __init__(self, settings: Settings, reporter: Reporter | None = None) -> None:
        self.settings = settings
        self.reporter = reporter or Reporter()
        self.root = self
        self.announcement: Announcement | None = None
        self.together: frozenset[str] = frozenset()
        """Studies of the command, which share its limits on time; empty where it has one study only."""
        self._stack = ExitStack()
        self._tokens: dict[tuple[str, int], TokenSet] = {}
        self._results: dict[str, Any] = {}

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self.root is self:
            self._stack.close()

    def at(
        self, target: float, *, by_time: bool = False, study: str = "", warm_start: str = "", plan: str = ""
    ) -> Context:
        """A sibling for another target: the same database, workers, tokens and finished steps, another study.

        ``target`` is a sparsity, or with ``by_time`` a speed-up.

        What either of the two opens or finds, the other has too; closing a sibling closes nothing.
        """
        sibling = copy.copy(self)  # the dictionaries of tokens and of results are the same objects
        sibling.settings = dataclasses.replace(
            self.settings,
            target=self.settings.target if by_time else target,
            target_speedup=target if by_time else 0.0,
            targets="",
            target_speedups="",
            max_ppl_increase="",
            study=study,
            warm_start=warm_start,
            plan=plan,
        )
        return sibling

    def rounded(self, weights: str) -> Context:
        """A sibling whose model has weights of another format, for steps that run in this process."""
        if weights == self.settings.weights:
            return self
        sibling = copy.copy(self)
        sibling.settings = dataclasses.replace(self.settings, weights=weights)
        sibling._tokens, sibling._results = {}, {}
        return sibling

    @_shared
    def database(self) -> Database:
        from was_storage.server.database import Database

        return self._stack.enter_context(Database.open(self.settings.storage))

    @_shared
    def cache(self) -> ArtifactCache:
        from was_storage.studies.cache import ArtifactCache

        return ArtifactCache(self.database)

    @_shared
    def source(self) -> ModelSource:
        from was_search.checkpoints.load import resolve_model

        self.settings.require("model")
        return resolve_model(self.settings.model, self.settings.revision)

    @_shared
    def fingerprint(self) -> str:
        from platformdirs import user_cache_path

        from was_search.checkpoints.fingerprint import fingerprint
        from was_search.errors import ModelError

        if self.source.columns is not None:  # what is found of it would be taken for the checkpoint's
            raise ModelError(
                f"model: {self.source.folder} holds weights laid out for decoding; give the checkpoint itself, or "
                "decode with it: generate, evaluate and bench take it as --plan"
            )
        return fingerprint(self.source, user_cache_path("was-search"))

    @property
    def model_key(self) -> str:
        """The model's part of a cache key: the checkpoint's fingerprint and the format of its weights."""
        return content_hash("model", 1, self.fingerprint, self.settings.weights)

    @_shared
    def cluster(self) -> Cluster:
        from was_workers.cluster import connect

        with self.reporter.phase("start Ray"):
            return self._stack.enter_context(connect(self.settings.ray, workers=self.settings.worker_range.least))

    @_shared
    def placement(self) -> Placement:
        """Device and dtype of the workers, decided before any is started.

        Raises:
            ResourceError: a GPU was asked for and there is none.
        """
        from was_search.checkpoints.load import pick_dtype
        from was_workers.cluster import resolve_address

        settings = self.settings
        if settings.device == "cpu":
            if settings.gpus_per_worker > 0:
                raise ResourceError(f"gpus_per_worker: must be 0 with --device cpu, got {settings.gpus_per_worker:g}")
            gpus = 0
        elif resolve_address(settings.ray) == "local":
            import torch

            gpus = torch.cuda.device_count()
        else:
            gpus = int(self.cluster.gpus)
        wants_gpu = settings.device == "cuda" or settings.gpus_per_worker > 0
        if wants_gpu and not gpus:
            asked = "--device cuda" if settings.device == "cuda" else f"--gpus-per-worker {settings.gpus_per_worker:g}"
            raise ResourceError(
                f"{asked} was asked for and no GPU was found; 'was-search doctor' tells what this machine has, "
                "--device cpu runs without one"
            )
        device = (
            "cuda" if wants_gpu or (settings.device == "auto" and gpus and settings.gpus_per_worker != 0) else "cpu"
        )
        share = 0.0 if device == "cpu" else (1.0 if settings.gpus_per_worker <= 0 else settings.gpus_per_worker)
        return Placement(device, share, pick_dtype(settings.dtype, device))

    @_shared
    def placement_here(self) -> Placement:
        """Device and dtype of the steps that run in this process, whatever a cluster has.

        Raises:
            ResourceError: a GPU was asked for and there is none.
        """
        from was_search.checkpoints.load import pick_device, pick_dtype

        device, dtype = pick_device(self.settings.device), self.settings.dtype
        if dtype == "auto" and self.source.columns is not None:
            return Placement(device, 0.0, self.source.columns.dtype)
        return Placement(device, 0.0, pick_dtype(dtype, device))

    @_shared
    def pool(self) -> Pool:
        """The workers; the first of a fixed number, or the least of a range, is ready when this returns."""
        from was_search.checkpoints.empty_model import empty_model
        from was_search.coordinator.health import QuarantinePolicy
        from was_workers.pool import Pool
        from was_workers.worker import WorkerSpec

        settings, placement = self.settings, self.placement
        empty_model(self.source)  # what no worker would load is refused before Ray is started
        spec = WorkerSpec(
            model=self.source.location,
            revision=self.source.revision,
            dtype=placement.dtype,
            device=placement.device,
            score=settings.score,
            masks=settings.masks,
            log_format=logs.configured(),
            spread=placement.gpus_per_worker > 1,
            weights=settings.weights,
        )
        cluster = self.cluster
        with self.reporter.phase(f"load the model on {settings.workers} worker(s)"):
            pool = self._stack.enter_context(
                Pool(
                    cluster,
                    spec,
                    n_workers=settings.worker_range,
                    gpus_per_worker=placement.gpus_per_worker,
                    useful=settings.trials,
                    divide_threads=cluster.local,
                    policy=QuarantinePolicy(
                        settings.quarantine_slowdown, settings.quarantine_failures, settings.quarantine_seconds
                    ),
                )
            )
            pool.wait_for_least()
        return pool

    def phase(self, name: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """The reporter's phase of this name, on the workers."""
        return self.reporter.phase(name, total, self._workers)

    def _workers(self) -> PoolState:
        """Of the pool if there is one; a bar's own thread asks, which must not start it."""
        pool: Pool | None = vars(self.root).get("pool")
        return PoolState() if pool is None else pool.state

    def once(self, key: str, make: Callable[[], T]) -> T:
        """The result of ``make``, called at the first asking for ``key`` only: steps build on one another."""
        if key not in self._results:
            self._results[key] = make()
        found: T = self._results[key]
        return found

    def tokens(self, split: str) -> TokenSet:
        """Token ids of ``split`` under the settings' protocol; cached, so that a second run needs no tokenizer."""
        return self._tokens_of(split, getattr(self.settings, f"{split}_sequences"))

    @property
    def slope_tokens(self) -> TokenSet:
        """Token ids of the calibration split that slopes are drawn from: those of ``calibration`` and more."""
        return self._tokens_of("calibration", self.settings.slope_sequences)

    def _tokens_of(self, split: str, n: int) -> TokenSet:
        if (split, n) not in self._tokens:
            self._tokens[split, n] = self._load_tokens(split, n)
        return self._tokens[split, n]

    def tokens_uncached(self, split: str) -> TokenSet:
        """The same token ids without the database, for steps that need no other part of it."""
        n = getattr(self.settings, f"{split}_sequences")
        return _tokenise(self.source, self._text(split), self._token_options(n, self.placement_here.dtype))

    def _text(self, split: str) -> SplitText:
        from was_search.texts.splits import load_text

        self.settings.require("model", "data")
        return load_text(self.settings.data, split)

    def _token_options(self, n: int, dtype: str) -> dict[str, Any]:
        settings = self.settings
        return {
            "weights": settings.weights,
            "sequence_length": settings.sequence_length,
            "stride": settings.stride or settings.sequence_length,
            "n_sequences": n,
            "dtype": dtype,
            "batch_size": settings.batch_size,
            "dense_prefix": settings.dense_prefix,
            "seed": settings.seed,
            "at_most": True,
        }

    def require_positions(self) -> None:
        """Raise a ConfigError for sequences beyond what the model was made for: its losses mean nothing there."""
        from was_search.checkpoints.files import read_config

        room, asked = read_config(self.source).get("max_position_embeddings"), self.settings.sequence_length
        if isinstance(room, int) and asked > room:
            raise ConfigError(
                f"sequence_length: must be at most the model's {room} positions, got {asked}; "
                f"give --sequence-length {room}"
            )

    def _load_tokens(self, split: str, n: int) -> TokenSet:
        text, options = self._text(split), self._token_options(n, self.placement.dtype)
        self.require_positions()
        key = content_hash("tokens", 2, text.name, split, text.sha256, self.source.tokenizer_hash(), options)
        return cached(
            Row(self.cache, "tokens", key, _read_tokens, _pack_tokens), lambda: _tokenise(self.source, text, options)
        )

    @property
    def plans_folder(self) -> Path:
        """Where plans are written, into it or below."""
        return Path(self.settings.plan or "was-runs")

    def default_plan_folder(self, study: str) -> Path:
        return self.plans_folder if self.settings.plan else self.plans_folder / folder_name(study) / "plan"


def _read_tokens(found: Artifact) -> TokenSet:
    protocol = EvaluationProtocol.from_json(found.meta["protocol"])
    tokens = unpack_array(found.payload, (protocol.n_sequences, protocol.sequence_length), np.int64)
    data = TokenSet.of(protocol, tokens)
    if data.protocol != protocol:
        raise ValueError("the tokens are not those of the protocol")
    return data


def _pack_tokens(data: TokenSet) -> tuple[bytes, dict[str, Any]]:
    return pack_array(data.tokens), {"protocol": data.protocol.to_json()}


def _tokenise(source: ModelSource, text: SplitText, options: dict[str, Any]) -> TokenSet:
    from was_search.checkpoints.load import load_tokenizer
    from was_search.texts.tokens import tokenise

    return tokenise(text, load_tokenizer(source), **options)
