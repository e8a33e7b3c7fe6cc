"""Every option of a run, in one table: the command line, the TOML file and ``docs/options.md`` are made of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from was_search.errors import ConfigError
from was_search.plan import Prefill
from was_search.service.addresses import check_webhook, parse_address
from was_search.service.asked import parse_increase, parse_speedups, parse_targets, percent_hint
from was_search.service.options import Group, Rule, at_least, checked_by, options_of, setting
from was_search.shape import Masks, ScoreKind
from was_search.studies.control import MOST_TRIALS
from was_search.studies.fitness import FitnessName
from was_search.studies.sampling import MONOTONE, SamplerName
from was_search.studies.worker_range import WorkerRange
from was_search.vectors.space import SpaceName
from was_search.weight_format import AS_STORED, canonical

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
DeviceName = Literal["auto", "cpu", "cuda"]
CompensationName = Literal["on", "off"]

_SOME = at_least(1)
_NOT_NEGATIVE = Rule("must not be negative", lambda value, _: value >= 0)
_SHARE = Rule("must be in (0, 1]", lambda value, _: 0.0 < value <= 1.0)
_LIMIT = Rule("must be from 0 (no limit) to a thousand million", lambda value, _: 0 <= value < 1e9)


def _parse_workers(value: int | str) -> int | str:
    return WorkerRange.parse(value).plain


def _parse_prefix(value: object) -> int | str:
    text = str(value).strip()
    if isinstance(value, bool) or not (text == "auto" or re.fullmatch(r"-?\d{1,18}", text)):
        raise ConfigError(f"dense_prefix: must be a whole number or auto, got {value!r}")
    return text if text == "auto" else int(text)


def _is_gpu_share(gpus: float) -> bool:
    return gpus == -1 or 0 <= gpus < 1 or (1 <= gpus <= 1024 and gpus == int(gpus))


@dataclass(frozen=True)
class Settings:
    """The options of a run; each field says what it is and what its values must be.

    Raises:
        ConfigError: a value of another type or outside its rule, or two answers to what the run is to find.
    """

    model: str = setting("", Group.MODEL, "A checkpoint's folder, a GGUF file, or a hub id.")
    revision: str = setting("", Group.MODEL, "Revision on the hub; its default branch if not given.")
    device: DeviceName = setting(
        "auto", Group.MODEL, "Where the model runs: auto (a GPU if there is one), cpu or cuda."
    )
    dtype: DTypeName = setting(
        "auto",
        Group.MODEL,
        "Type of the weights: auto (bfloat16 on a GPU, float32 on CPU), float32, bfloat16 or float16.",
    )
    weights: str = setting(
        AS_STORED,
        Group.MODEL,
        "none leaves the projections' weights as they are stored; int8 and int4 round them when the model is "
        "loaded, with a scale for each 128 outputs of an input channel, int4:64 for each 64.",
        parse=canonical,
    )
    data: str = setting(
        "",
        Group.TEXT,
        "A file or a folder of texts (plain, or the column text of JSON lines, JSON, CSV, TSV or Parquet, also in "
        "gzip), or one of the data sets wikitext2, c4, alpaca.",
    )
    sequence_length: int = setting(
        2048, Group.TEXT, "Tokens of one sequence, at most the model's positions.", at_least(2, " tokens")
    )
    stride: int = setting(
        0,
        Group.TEXT,
        "Tokens from the start of one sequence to the next; 0 means sequence_length, so that none overlap.",
        Rule("must be in [0, sequence_length]", lambda value, given: 0 <= value <= given.sequence_length),
    )
    test_sequences: int = setting(256, Group.TEXT, "At most N sequences of the test split for the report.", _SOME)
    batch_size: int = setting(4, Group.TEXT, "Sequences in one forward pass.", _SOME)
    seed: int = setting(
        0,
        Group.TEXT,
        "Random seed of the samplers and of the order of sequences.",
        Rule("must be in [0, 2^32)", lambda value, _: 0 <= value < 2**32),
    )
    score: ScoreKind = setting(
        "l2", Group.CALIBRATION, "Norm of the weights in the score of an input channel: l1, l2 or none."
    )
    masks: Masks = setting(
        "separate",
        Group.CALIBRATION,
        "separate: a mask for each projection. shared: one for q, k and v, by the norms of their weights "
        "together, and one for gate and up.",
    )
    calibration_sequences: int = setting(
        64, Group.CALIBRATION, "At most N sequences of the calibration split for the histograms of scores.", _SOME
    )
    dense_prefix: int | str = setting(
        "auto",
        Group.CALIBRATION,
        "Tokens at a sequence's start that are never masked; auto: those that the tokenizer puts first, at least 1.",
        Rule(
            "must be in [0, sequence_length)",
            lambda value, given: value == "auto" or 0 <= value < given.sequence_length,
        ),
        parse=_parse_prefix,
    )
    target: float = setting(
        0.6,
        Group.TARGET,
        "The budget: share of the projections' weights that a decoding step skips.",
        Rule("must be above 0 and below 0.95", lambda value, _: 0.0 < value < 0.95, percent_hint),
    )
    target_speedup: float = setting(
        0.0,
        Group.TARGET,
        "A budget of time instead: how many times as fast as the dense model a decoding step is to be, by the "
        "prediction of the profile; 0 for none.",
        Rule("must be above 1, or 0 for none", lambda value, _: value == 0 or 1.0 < value < math.inf),
    )
    profile: str = setting(
        "",
        Group.TARGET,
        "A file of 'was-search profile', which predicts a step's time; without one, the newest that the database "
        "holds.",
    )
    targets: str = setting(
        "",
        Group.TARGETS,
        "Several budgets with commas between, such as 0.4,0.5,0.6: a study for each, and what they trade off.",
        parse=checked_by(parse_targets),
    )
    target_speedups: str = setting(
        "",
        Group.TARGETS,
        "Several speed-ups with commas between, such as 1.5,1.8,2: a study for each.",
        parse=checked_by(parse_speedups),
    )
    max_ppl_increase: str = setting(
        "",
        Group.TARGETS,
        "5% or 0.05: search for the highest target whose perplexity stays within this increase over the dense model's.",
        parse=checked_by(parse_increase),
    )
    pricing_sequences: int = setting(
        32, Group.SEEDS, "At most N of the calibration sequences for the Fisher prices.", _SOME
    )
    slope_sequences: int = setting(512, Group.SEEDS, "At most N sequences of the calibration split for slopes.", _SOME)
    seed_rounds: int = setting(
        8,
        Group.SEEDS,
        "Rounds of the descent that improves the Fisher seed; 0 leaves it as it was priced.",
        _NOT_NEGATIVE,
    )
    greedy_sequences: int = setting(
        0,
        Group.SEEDS,
        "At most N calibration sequences for the table of block errors, which gives the baseline seed "
        "greedy-uniform and is slow; 0 leaves both out.",
        _NOT_NEGATIVE,
        Rule(
            "must be at least 1 with --sampler was-monotone",
            lambda value, given: value > 0 or given.sampler != MONOTONE,
        ),
    )
    trials: int = setting(
        100,
        Group.SEARCH,
        "Trials of the study; a number above what it has extends it.",
        _SOME,
        Rule(f"must be at most {MOST_TRIALS}", lambda value, _: value <= MOST_TRIALS),
    )
    study: str = setting("", Group.SEARCH, "Name of the study; made from model, data, target and options if not given.")
    warm_start: str = setting(
        "",
        Group.SEARCH,
        "An earlier study of the same model whose best vector, moved onto this budget, is one more seed.",
    )
    sampler: SamplerName = setting(
        "tpe",
        Group.SEARCH,
        "What suggests vectors: tpe, cmaes, gp, qmc, random, or was-monotone, the rule of the WAS paper.",
    )
    space: SpaceName = setting(
        "levels",
        Group.SEARCH,
        "What is sampled: levels of blocks, these with a temperature of their split over projections, additive "
        "offsets of blocks and kinds of projections, or the full sparsities of all projections.",
        Rule(
            "must be levels with the sampler was-monotone",
            lambda value, given: value == "levels" or given.sampler != MONOTONE,
        ),
    )
    radius: float = setting(
        0.05, Group.SEARCH, "How far levels, offsets or sparsities may lie from the seed's.", _SHARE
    )
    search_sequences: int = setting(64, Group.SEARCH, "At most N sequences of the search split for the fitness.", _SOME)
    fitness: FitnessName = setting(
        "nll",
        Group.SEARCH,
        "What trials are compared by: nll, or kl, the divergence from the dense model, which is less noisy.",
    )
    kl_top_k: int = setting(
        64,
        Group.SEARCH,
        "How many of the dense model's likeliest tokens kl tells apart, at most the vocabulary.",
        _SOME,
    )
    early_stopping: bool = setting(
        True, Group.SEARCH, "Stop a trial that is not promising after some of the sequences."
    )
    significance: float = setting(
        0.1,
        Group.SEARCH,
        "Level of the paired test that a trial is worse than the best, after which it stops.",
        Rule("must be in (0, 0.5)", lambda value, _: 0.0 < value < 0.5),
    )
    rung_keep: float = setting(
        0.5,
        Group.SEARCH,
        "Share of trials that go on after 1/8, 1/4 and 1/2 of the sequences; 1 leaves these rungs out.",
        _SHARE,
    )
    sampler_lag: int = setting(
        16,
        Group.SEARCH,
        "Trials right before its own that a sampler's vector does not depend on, at most a sixth of all, so that up to "
        "half as many workers find the same; 1 uses all that is known.",
        _SOME,
    )
    metrics: str = setting(
        "",
        Group.SEARCH,
        "HOST:PORT or PORT where the search's figures are served for Prometheus; nowhere if not given.",
        parse=checked_by(parse_address),
    )
    notify: str = setting(
        "",
        Group.SEARCH,
        "URL that gets a small JSON when a run has ended or failed.",
        parse=checked_by(check_webhook),
        env="WAS_SEARCH_NOTIFY",
        secret="a URL",
    )
    descent_epochs: int = setting(
        2,
        Group.DESCENTS,
        "Times that the search descends from its best vector before it samples; 0 leaves descents out.",
        _NOT_NEGATIVE,
    )
    descent_chains: int = setting(
        2, Group.DESCENTS, "Descents side by side in an epoch, each on other sequences.", _SOME
    )
    descent_rounds: int = setting(24, Group.DESCENTS, "Steps of one descent.", _SOME)
    descent_sequences: int = setting(24, Group.DESCENTS, "Sequences whose slopes make one step.", _SOME)
    compensation: CompensationName = setting(
        "on",
        Group.COMPENSATION,
        "Whether the exported plan corrects outputs of masked tokens by scales and constants that are learned for it, "
        "which moves its sparsities within the budget: on or off.",
    )
    compensation_steps: int = setting(
        150, Group.COMPENSATION, "Backward passes that a compensation is learned in.", _SOME
    )
    compensation_tokens: int = setting(
        4096, Group.COMPENSATION, "Tokens of each of these passes, in whole sequences: one at least.", _SOME
    )
    max_seconds: float = setting(
        0.0,
        Group.LIMITS,
        "Stop after N seconds of searching: all runs of the study together, and all targets of a run; 0 for no limit.",
        _LIMIT,
    )
    max_gpu_seconds: float = setting(
        0.0,
        Group.LIMITS,
        "Stop after N seconds of GPUs held by workers while searching, all runs and targets together; 0 for no limit.",
        _LIMIT,
    )
    max_failures: int = setting(
        0, Group.LIMITS, "Stop a study once N of its trials have failed; 0 for no limit.", _LIMIT
    )
    patience: int = setting(
        0, Group.LIMITS, "Stop a study after N finished trials in a row without a better loss; 0 for no limit.", _LIMIT
    )
    workers: int | str = setting(
        1,
        Group.CLUSTER,
        "Ray workers, each with the model: a number, or 2:64 for at least 2 and up to 64, as many as the cluster "
        "has places for.",
        parse=_parse_workers,
    )
    gpus_per_worker: float = setting(
        -1.0,
        Group.CLUSTER,
        "GPUs of one worker: a fraction shares one, 2 and more spread the model over them; -1 means 1 on a "
        "machine with a GPU, else 0.",
        Rule("must be a share of one GPU, or a whole number", lambda value, _: _is_gpu_share(value)),
    )
    ray: str = setting(
        "auto", Group.CLUSTER, "auto (the cluster of RAY_ADDRESS, else local), local, or a cluster's HOST:PORT."
    )
    trial_timeout: float = setting(
        0.0,
        Group.FAILURES,
        "Seconds until an evaluation counts as lost; 0 sets it from measured times: 20 times the slowest so far, "
        "five minutes at least.",
        Rule("must be positive, in seconds, or 0 for by measure", lambda value, _: 0 <= value < 1e9),
    )
    max_attempts: int = setting(
        3,
        Group.FAILURES,
        "Workers that may be lost over one vector before its slot fails; with fewer workers, that many losses in all.",
        _SOME,
    )
    quarantine_slowdown: float = setting(
        4.0,
        Group.FAILURES,
        "Give a worker no trials while it takes N times as long for a token as its peers; 0 for never.",
        Rule("must be above 1, or 0 for never", lambda value, _: value == 0 or value > 1),
    )
    quarantine_failures: int = setting(
        3, Group.FAILURES, "Give a worker no trials once it has failed N times in a row; 0 for never.", _NOT_NEGATIVE
    )
    quarantine_seconds: float = setting(
        600.0,
        Group.FAILURES,
        "How long such a worker gets none the first time; twice as long each further time.",
        Rule("must be positive, in seconds", lambda value, _: value > 0),
    )
    plan: str = setting("", Group.PLAN, "Folder for the exported plan; one under was-runs if not given.")
    prefill: Prefill = setting(
        "masked",
        Group.PLAN,
        "What the exported plan does with prompts: masked, or dense, so that only decoding skips weights. "
        "Figures are always of masked text.",
    )
    storage: str = setting(
        "embedded",
        Group.STORAGE,
        "A Postgres URL, or embedded.",
        env="WAS_SEARCH_STORAGE",
        secret="a Postgres URL",
    )

    def __post_init__(self) -> None:
        for name, option in OPTIONS.items():
            object.__setattr__(self, name, option.canonical(getattr(self, name)))
        require_one_question({name: getattr(self, name) for name in QUESTIONS[1:]})
        for name, option in OPTIONS.items():
            option.check(getattr(self, name), self)

    def __reduce__(self) -> NoReturn:
        raise TypeError("settings hold the database's password, and are not pickled; send what is needed of them")

    @property
    def scoring(self) -> str:
        """What decides the scores besides the weights, in the form that keys of the cache have."""
        return self.score if self.masks == "separate" else f"{self.score}, {self.masks} masks"

    @property
    def asked_prefix(self) -> int | None:
        """``dense_prefix`` as a number, None for what the tokenizer puts first."""
        return self.dense_prefix if isinstance(self.dense_prefix, int) else None

    @property
    def compensation_sequences(self) -> int:
        """Sequences of one pass of a compensation's learning."""
        return max(1, round(self.compensation_tokens / self.sequence_length))

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

    def require(self, *names: str) -> None:
        """Raise a ConfigError for text options that are missing, naming all of them."""
        missing = [name for name in names if not getattr(self, name)]
        if missing:
            flags, it = " and ".join(f"--{name.replace('_', '-')}" for name in missing), "them" if missing[1:] else "it"
            raise ConfigError(f"{', '.join(missing)}: missing; give {flags} or put {it} into the TOML file")

    def to_json(self) -> dict[str, Any]:
        """All options but the URLs, which may hold passwords in more places than can be masked safely."""
        return {name: option.shown(getattr(self, name)) for name, option in OPTIONS.items()}


OPTIONS = options_of(Settings)
"""All options by name, in the order of help and page."""

Settings.__doc__ = f"{Settings.__doc__}\n    Attributes:\n" + "".join(
    f"        {name}: {option.help}\n" for name, option in OPTIONS.items()
)

QUESTIONS = ("target", "targets", "max_ppl_increase", "target_speedup", "target_speedups")
"""Options that say what a run is to find: one target or speed-up, several, or the highest within a limit."""


def require_one_question(values: Mapping[str, Any]) -> None:
    """Raise a ConfigError where ``values`` give two answers to what a run is to find."""
    given = [name for name in QUESTIONS if values.get(name)]
    if len(given) > 1:
        raise ConfigError(f"{given[1]}: cannot be given together with {given[0]}; give one of them")
