"""Every option of a run, from defaults, a TOML file and flags, in this order; the last one wins."""

from __future__ import annotations

import dataclasses
import math
import tomllib
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from was_search.close_names import did_you_mean
from was_search.errors import ConfigError
from was_search.fitness import FITNESSES, FitnessName
from was_search.metrics import parse_address
from was_search.plan import PREFILLS, Prefill
from was_search.sampling import SAMPLERS, SamplerName
from was_search.score import SCORE_KINDS, ScoreKind
from was_search.shape import MASKS, Masks
from was_search.space import SPACES, SpaceName
from was_search.targets import parse_increase, parse_speedups, parse_targets, percent_hint
from was_search.webhook import check_webhook
from was_search.weight_format import AS_STORED, canonical
from was_search.worker_range import WorkerRange

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Settings:
    """The options of a run.

    Attributes:
        model: a local folder or a hub id.
        revision: hub revision; "" takes the default branch.
        data: a text file, a folder, or ``wikitext2``, ``c4``, ``alpaca``.
        target: the budget, in (0, 0.95).
        targets: several budgets with commas between, a study each; "" takes ``target`` alone.
        target_speedup: a budget of time instead: a decoding step so many times as fast as the dense one, by the
            prediction of ``profile``; 0 for none.
        target_speedups: several of these with commas between, a study each; "" for none.
        profile: file of ``was-search profile``; "" takes the one that the database holds, if any.
        max_ppl_increase: ``5%`` or ``0.05``: the highest target within this increase over dense; "" for none.
        warm_start: an earlier study whose best vector is one more seed; "" for none.
        trials: slots of the study.
        study: its name; "" derives one from model, data and target.
        sampler: who suggests vectors.
        space: what is sampled: ``levels`` of blocks, with a ``temperature`` of their split, ``additive`` offsets of
            blocks and kinds of projections, or the ``full`` sparsities of all projections.
        radius: how far levels (or offsets, or sparsities) may lie from the seed's.
        score: the norm in the weight-aware score.
        masks: ``separate``: each projection has a mask of its own; ``shared``: q, k and v have one by the norms of
            their weights together, and so have gate and up.
        seed: of samplers and of the order of sequences.
        workers: Ray actors that hold the model: a number, or ``2:64`` for at least 2 and as many up to 64 as the
            cluster has places for.
        gpus_per_worker: GPUs of one worker: a fraction shares one, 2 and more spread the model over them; -1 means 1 on
            a GPU machine, 0 elsewhere.
        ray: ``auto`` (the cluster of RAY_ADDRESS, else local), ``local``, or an address.
        storage: a Postgres URL or ``embedded``.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: ``auto`` is bfloat16 on a GPU and float32 on CPU.
        weights: ``none`` leaves the projections' weights as they are stored, ``int8`` and ``int4`` round them when the
            model is loaded; ``int4:64`` with a scale for each 64 outputs of an input channel (128 if not given).
        sequence_length: tokens of one sequence, at most the model's positions.
        stride: tokens between windows; 0 means sequence_length.
        calibration_sequences: at most so many for histograms.
        pricing_sequences: at most so many of these for Fisher prices.
        slope_sequences: at most so many sequences of the calibration split for slopes.
        seed_rounds: rounds of the descent that makes the Fisher seed; 0 leaves it as it was priced.
        greedy_sequences: at most so many calibration sequences for the block-error table, which gives the baseline
            seed ``greedy-uniform``; 0 leaves both out.
        descent_epochs: times that the search descends from its best vector before it samples.
        descent_chains: descents side by side in an epoch, on other sequences each.
        descent_rounds: steps of one descent.
        descent_sequences: sequences whose slopes make one step.
        search_sequences: at most so many for the fitness.
        test_sequences: at most so many for the report.
        batch_size: sequences per forward.
        dense_prefix: tokens at a sequence's start that are never masked.
        prefill: what the exported plan does with a prompt: ``masked`` or ``dense``; figures are always of masked text.
        fitness: what trials are compared by: ``nll``, or ``kl`` for the divergence from the dense model.
        kl_top_k: tokens of the dense model's predictions that ``kl`` tells apart, at most the vocabulary.
        early_stopping: stop trials that are not promising after some of the sequences.
        significance: of the test that the incumbent is better.
        rung_keep: share of trials that go on behind 1/8, 1/4 and 1/2 of the sequences; 1 leaves these rungs out.
        trial_timeout: seconds after which an evaluation is taken for lost; 0: by measure, 20 times the slowest so far,
            five minutes at least.
        max_attempts: workers that may lose one vector before its slot fails; of fewer workers, so many losses of all.
        quarantine_slowdown: a worker that takes so many times its peers' time a token gets no trials; 0 for never.
        quarantine_failures: nor one that has failed so many times in a row; 0 for never.
        quarantine_seconds: how long for the first time; twice as long each further time.
        metrics: ``HOST:PORT`` or ``PORT`` where a search's figures are served for Prometheus; "" for nowhere.
        max_seconds: of searching before it stops, all runs of the study together, and with several targets all their
            studies; 0 for no limit, as below.
        max_gpu_seconds: of GPUs held by workers while it searches, likewise.
        max_failures: failed trials of a study.
        patience: finished trials of a study without a better loss.
        notify: URL that gets a small JSON when a run has ended or failed; "" for none.
        plan: folder for the exported plan; "" derives one under ``was-runs``.
    """

    model: str = ""
    revision: str = ""
    data: str = ""
    target: float = 0.6
    targets: str = ""
    max_ppl_increase: str = ""
    target_speedup: float = 0.0
    target_speedups: str = ""
    profile: str = ""
    warm_start: str = ""
    trials: int = 100
    study: str = ""
    sampler: SamplerName = "tpe"
    space: SpaceName = "levels"
    radius: float = 0.05
    score: ScoreKind = "l2"
    masks: Masks = "separate"
    seed: int = 0
    workers: int | str = 1
    gpus_per_worker: float = -1.0
    ray: str = "auto"
    storage: str = dataclasses.field(default="embedded", repr=False)
    device: DeviceName = "auto"
    dtype: DTypeName = "auto"
    weights: str = AS_STORED
    sequence_length: int = 2048
    stride: int = 0
    calibration_sequences: int = 64
    pricing_sequences: int = 32
    slope_sequences: int = 512
    seed_rounds: int = 8
    greedy_sequences: int = 0
    descent_epochs: int = 2
    descent_chains: int = 2
    descent_rounds: int = 24
    descent_sequences: int = 24
    search_sequences: int = 64
    test_sequences: int = 256
    batch_size: int = 4
    dense_prefix: int = 1
    prefill: Prefill = "masked"
    fitness: FitnessName = "nll"
    kl_top_k: int = 64
    early_stopping: bool = True
    significance: float = 0.1
    rung_keep: float = 0.5
    trial_timeout: float = 0.0
    max_attempts: int = 3
    quarantine_slowdown: float = 4.0
    quarantine_failures: int = 3
    quarantine_seconds: float = 600.0
    metrics: str = ""
    max_seconds: float = 0.0
    max_gpu_seconds: float = 0.0
    max_failures: int = 0
    patience: int = 0
    notify: str = dataclasses.field(default="", repr=False)
    plan: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name != "workers":
                object.__setattr__(self, field.name, _typed(field.name, getattr(self, field.name)))
        object.__setattr__(self, "workers", WorkerRange.parse(self.workers).plain)
        object.__setattr__(self, "weights", canonical(self.weights))
        self._range("target", 0.0 < self.target < 0.95, f"must be above 0 and below 0.95{percent_hint(self.target)}")
        speedup = self.target_speedup
        self._range("target_speedup", speedup == 0 or 1.0 < speedup < math.inf, "must be above 1, or 0 for none")
        parse_targets(self.targets), parse_increase(self.max_ppl_increase), parse_speedups(self.target_speedups)
        _require_one_question({name: getattr(self, name) for name in _QUESTIONS[1:]})
        for name in _COUNTS:
            self._range(name, getattr(self, name) >= 1, "must be at least 1")
        self._range("sequence_length", self.sequence_length >= 2, "must be at least 2 tokens")
        self._range("stride", 0 <= self.stride <= self.sequence_length, "must be in [0, sequence_length]")
        self._range("dense_prefix", 0 <= self.dense_prefix < self.sequence_length, "must be in [0, sequence_length)")
        self._range("seed", 0 <= self.seed < 2**32, "must be in [0, 2^32)")
        for name in ("seed_rounds", "descent_epochs", "greedy_sequences"):
            self._range(name, getattr(self, name) >= 0, "must not be negative")
        needs_table = self.sampler == "was-monotone" and self.greedy_sequences == 0
        self._range("greedy_sequences", not needs_table, "must be at least 1 with --sampler was-monotone")
        self._range("radius", 0.0 < self.radius <= 1.0, "must be in (0, 1]")
        self._range("significance", 0.0 < self.significance < 0.5, "must be in (0, 0.5)")
        self._range("rung_keep", 0.0 < self.rung_keep <= 1.0, "must be in (0, 1]")
        self._range("trial_timeout", 0 <= self.trial_timeout < 1e9, "must be positive, in seconds, or 0 for by measure")
        for name in ("max_seconds", "max_gpu_seconds", "max_failures", "patience"):
            self._range(name, 0 <= getattr(self, name) < 1e9, "must be from 0 (no limit) to a thousand million")
        slowdown = self.quarantine_slowdown
        self._range("quarantine_slowdown", slowdown == 0 or slowdown > 1, "must be above 1, or 0 for never")
        self._range("quarantine_failures", self.quarantine_failures >= 0, "must not be negative")
        self._range("quarantine_seconds", self.quarantine_seconds > 0, "must be positive, in seconds")
        check_webhook(self.notify)
        gpus = self.gpus_per_worker
        whole = 1 <= gpus <= 1024 and gpus == int(gpus)
        self._range(
            "gpus_per_worker", gpus == -1 or 0 <= gpus < 1 or whole, "must be a share of one GPU, or a whole number"
        )
        for name, allowed in _CHOICES.items():
            self._range(name, getattr(self, name) in allowed, f"must be one of {', '.join(allowed)}")
        if self.metrics:
            parse_address(self.metrics)
        own = self.sampler == "was-monotone"
        self._range("space", not own or self.space == "levels", "must be levels with the sampler was-monotone")

    def __reduce__(self) -> NoReturn:
        raise TypeError("settings hold the database's password, and are not pickled; send what is needed of them")

    @property
    def scoring(self) -> str:
        """What decides the scores besides the weights, as it stands in keys of the cache."""
        return self.score if self.masks == "separate" else f"{self.score}, {self.masks} masks"

    @property
    def worker_range(self) -> WorkerRange:
        """``workers`` as a range."""
        return WorkerRange.parse(self.workers)

    @property
    def budgets(self) -> tuple[float, ...]:
        """``targets`` as numbers in rising order, () if there are none."""
        return parse_targets(self.targets)

    @property
    def speedups(self) -> tuple[float, ...]:
        """``target_speedups`` as numbers in rising order, () if there are none."""
        return parse_speedups(self.target_speedups)

    @property
    def increase_limit(self) -> float | None:
        """``max_ppl_increase`` as a fraction, None if there is none."""
        return parse_increase(self.max_ppl_increase)

    def require_one_target(self) -> None:
        """Raise a ConfigError where a step for one target was asked for several."""
        for name in ("targets", "max_ppl_increase", "target_speedups"):
            if getattr(self, name):
                one = "--target-speedup" if name == "target_speedups" else "--target"
                raise ConfigError(f"{name}: only 'was-search run' takes it; give {one} for one study")

    def _range(self, name: str, good: bool, rule: str) -> None:
        if not good:
            raise ConfigError(f"{name}: {rule}, got {getattr(self, name)!r}")

    def require(self, *names: str) -> None:
        """Raise a ConfigError for text options that are missing, naming all of them."""
        missing = [name for name in names if not getattr(self, name)]
        if missing:
            flags, it = " and ".join(f"--{name.replace('_', '-')}" for name in missing), "them" if missing[1:] else "it"
            raise ConfigError(f"{', '.join(missing)}: missing; give {flags} or put {it} into the TOML file")

    def to_json(self) -> dict[str, Any]:
        """All options but the URLs, which may hold passwords in more places than can be masked safely."""
        value = dataclasses.asdict(self)
        if self.notify:
            value["notify"] = "a URL"
        if self.storage != "embedded":
            value["storage"] = "a Postgres URL"
        return value


_COUNTS = (
    "trials",
    "calibration_sequences",
    "pricing_sequences",
    "slope_sequences",
    "descent_chains",
    "descent_rounds",
    "descent_sequences",
    "search_sequences",
    "test_sequences",
    "batch_size",
    "kl_top_k",
    "max_attempts",
)
_CHOICES: dict[str, tuple[str, ...]] = {
    "sampler": SAMPLERS,
    "space": SPACES,
    "score": SCORE_KINDS,
    "masks": MASKS,
    "prefill": PREFILLS,
    "fitness": FITNESSES,
    "device": typing.get_args(DeviceName),
    "dtype": typing.get_args(DTypeName),
}


def load_settings(file: Path | None, flags: dict[str, Any], base: Settings | None = None) -> Settings:
    """Settings from ``base`` (or the defaults), ``file`` (TOML) and the ``flags`` that are not None; the last wins.

    Option names in the file are written with - or _.

    Raises:
        ConfigError: an unreadable file, an unknown option, or a value outside its range.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            document = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"config: cannot read {file} ({error.strerror})") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"config: {file} is not valid TOML: {error}") from error
        values = {key.replace("-", "_"): value for key, value in document.items()}
    known = {field.name for field in dataclasses.fields(Settings)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(
            f"config: unknown option {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            f"{did_you_mean(unknown[0], known)}"
        )
    given = {key: value for key, value in flags.items() if value is not None}
    for source in (values, given):
        _require_one_question(source)
    if any(given.get(name) for name in _QUESTIONS):  # a flag's question replaces the file's
        values = {key: value for key, value in values.items() if key not in _QUESTIONS}
        given = {**{name: getattr(Settings, name) for name in _QUESTIONS[1:]}, **given}
    values.update(given)
    return dataclasses.replace(base, **values) if base is not None else Settings(**values)


_QUESTIONS = ("target", "targets", "max_ppl_increase", "target_speedup", "target_speedups")
"""What a run is to find: one target or speed-up, several, or the highest within a limit."""


def _require_one_question(values: dict[str, Any]) -> None:
    given = [name for name in _QUESTIONS if values.get(name)]
    if len(given) > 1:
        raise ConfigError(f"{given[1]}: cannot be given together with {given[0]}; give one of them")


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _typed(name: str, value: Any) -> Any:
    wanted = type(getattr(Settings, name))  # the default's
    allowed = (int, float) if wanted is float else wanted
    if isinstance(value, bool) != (wanted is bool) or not isinstance(value, allowed) or value != value:
        raise ConfigError(f"{name}: must be {_WORDS[wanted]}, got {value!r}")
    try:
        return wanted(value)
    except OverflowError:
        raise ConfigError(f"{name}: must be a number that fits a float, got {str(value)[:8]}...") from None
