"""Measure how a decoding step's time depends on sparsity, on this machine's device."""

from __future__ import annotations

import ctypes
import platform
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from was_search import __version__
from was_search.decode_time.fit import FUSED, SINGLE, check, check_summary, fit, launch_kinds, n_measurements
from was_search.decode_time.profile import VERSION, LatencyProfile
from was_search.errors import ConfigError
from was_search.process.plain_json import dumps
from was_search.process.writable import unwritable
from was_search.service.caching import cached
from was_search.service.context import Context
from was_search.service.model import Model
from was_search.service.reports.profile import show_profile
from was_search.service.steps.decode_time import CACHED_AS, read_profile, shape_key
from was_search.texts.protocol import content_hash
from was_search.weight_format import AS_STORED, WeightFormat

if TYPE_CHECKING:
    from was_storage.studies.cache import ArtifactCache

_CONFIG = ("model_type", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
"""Keys of the model's configuration that, besides the projections' shape, decide the time of a step."""


def profile(
    context: Context,
    *,
    rows: int = 1,
    kv_length: int = 256,
    steps: int = 20,
    rounds: int = 3,
    check_vectors: int = 0,
    compiled: bool | None = None,
    output: Path | None = None,
    again: bool = False,
) -> LatencyProfile:
    """A profile of the settings' model on this device; cached by device, shapes and versions.

    Args:
        context: its settings give model, device, dtype and weights. No text is needed: tokens are random.
        rows: sequences that decode together.
        kv_length: positions in the cache.
        steps: steps timed for each point.
        rounds: rounds in which all points are timed; medians count.
        check_vectors: random vectors that are then timed, masked by score, and compared with their predictions.
        compiled: time the dense step through torch.compile too; None: on a GPU.
        output: file to write it to.
        again: measure even where it is cached.

    Raises:
        ConfigError: an option out of range, or a file that cannot be written.
    """
    _check_options(rows, kv_length, steps, rounds, check_vectors)
    if output is not None:
        _check_output(output)
    _check_positions(context.model, kv_length)
    compiled = context.placement_here.device.startswith("cuda") if compiled is None else compiled
    key = _key(context, rows, kv_length, compiled)
    comparison: list[dict[str, float]] = []

    def make() -> LatencyProfile:
        made, compared = _measure(context, rows, kv_length, steps, rounds, check_vectors, compiled)
        comparison.extend(compared)
        return made

    entry = _Measured(context.cache, key, check_vectors, again)
    found = cached(entry, make, context.reporter, "profile", LatencyProfile.describe)
    if output is not None:
        found.save(output)
    show_profile(context.reporter, found, comparison, output)
    return found


@dataclass(frozen=True)
class _Measured:
    """A profile's row of the cache, which a later measurement replaces.

    A stored profile with fewer than ``check_vectors`` compared vectors is not taken; with ``again`` none is.
    """

    cache: ArtifactCache
    key: str
    check_vectors: int
    again: bool

    def get(self) -> LatencyProfile | None:
        found = None if self.again else self.cache.get(CACHED_AS, self.key, read_profile)
        return found if found is not None and found.check.get("vectors", 0) >= self.check_vectors else None

    def put(self, value: LatencyProfile) -> None:
        payload = dumps(value.to_json()).encode()
        meta = {"shape": shape_key(value.shape), "conditions": _conditions(value), "hash": value.hash}
        self.cache.replace(CACHED_AS, self.key, payload, {**meta, "weights": value.weights})


def _check_options(rows: int, kv_length: int, steps: int, rounds: int, check_vectors: int) -> None:
    least = {"rows": (rows, 1), "kv_length": (kv_length, 32), "steps": (steps, 1), "rounds": (rounds, 1)}
    for name, (value, minimum) in {**least, "check": (check_vectors, 0)}.items():
        if value < minimum:
            raise ConfigError(f"{name}: must be at least {minimum}, got {value}")
    from was_kernels.runtime.sparse_linear import DENSE_ABOVE

    if rows > DENSE_ABOVE:
        raise ConfigError(f"rows: at most {DENSE_ABOVE} decode sparsely, got {rows}")


def _check_output(path: Path) -> None:
    """Refuse, before anything is measured, a file that cannot be written."""
    if why := "is a folder" if path.is_dir() else unwritable(path.parent):
        raise ConfigError(f"output: cannot write {path} ({why}); choose another file")


def _check_positions(model: Model, kv_length: int) -> None:
    room = model.positions
    if room is not None and 2 * kv_length > room:
        raise ConfigError(f"kv_length: at most {room // 2} with the model's {room} positions, got {kv_length}")


def _key(context: Context, rows: int, kv_length: int, compiled: bool) -> str:
    from was_search.checkpoints.files import read_config

    config = read_config(context.model.source)
    device, dtype = _device_name(context.placement_here.device), context.placement_here.dtype
    versions, weights = _versions(context.placement_here.device), context.settings.weights
    parts = (device, dtype, rows, kv_length, compiled, versions, weights)
    sizes = {name: config.get(name) for name in _CONFIG}
    return content_hash("profile", VERSION, context.model.shape.to_json(), sizes, *parts)


def _measure(
    context: Context, rows: int, kv_length: int, steps: int, rounds: int, check_vectors: int, compiled: bool
) -> tuple[LatencyProfile, list[dict[str, float]]]:
    import torch

    from was_kernels.timing.profile import StepClock, typical_seconds
    from was_kernels.timing.step import DecodeStep
    from was_search.checkpoints.quantised import quantise_projections
    from was_search.checkpoints.structure import find_structure
    from was_search.service.steps.evaluation import load_for

    model, structure = load_for(context, None, weights=AS_STORED)
    place = context.placement_here
    generator = torch.Generator().manual_seed(0)
    words: Any = model.get_input_embeddings()  # type: ignore[operator]
    tokens = torch.randint(0, words.num_embeddings, (rows, 2 * kv_length), generator=generator).to(place.device)
    with context.reporter.phase("time the dense step", 1 + compiled) as advance:
        dense = {}
        for name in ("eager", "compiled")[: 1 + compiled]:
            step = DecodeStep(model, tokens, kv_length, compiled=name == "compiled")
            dense[name] = typical_seconds(step.times(2 * steps), tokens.is_cuda)
            advance()
    if (form := WeightFormat.parse(context.settings.weights)) is not None:
        quantise_projections(structure, form)
        structure = find_structure(model)
    comparison: list[dict[str, float]] = []
    with StepClock(model, tokens, kv_length, steps=steps) as clock:
        kinds = launch_kinds(structure.shape, FUSED if clock.fused else SINGLE)
        clock(np.full(structure.shape.params.shape, 0.5))  # captures the graph, and warms it up
        with context.reporter.phase("time sparse steps", n_measurements(kinds, rounds)) as advance:

            def time_at(sparsities: Any) -> Any:
                measured = clock(sparsities)
                advance()
                return measured

            found = fit(time_at, structure.shape, kinds, rounds=rounds)
        made = LatencyProfile(
            shape=structure.shape,
            curves=found.curves,
            rest_seconds=found.rest_seconds,
            dense=dense,
            device=_device_name(place.device),
            dtype=place.dtype,
            backend=clock.backend,
            rows=rows,
            kv_length=kv_length,
            versions=_versions(place.device),
            spread=found.spread,
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
            weights=context.settings.weights,
        )
        if check_vectors:
            with context.reporter.phase("time unseen vectors"):
                comparison = check(clock.by_score, made, check_vectors)
            made = replace(made, check=check_summary(comparison))
    return made, comparison


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return str(torch.cuda.get_device_name(device))
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"CPU, {name}"


def _versions(device: str) -> dict[str, str]:
    import torch

    found = {"torch": str(torch.__version__), "was-search": __version__}
    for name in ("triton", "transformers"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    if device.startswith("cuda"):
        found["cuda"] = str(torch.version.cuda)
        with suppress(OSError):
            number = ctypes.c_int()
            if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) == 0:
                found["driver"] = f"{number.value // 1000}.{number.value % 1000 // 10}"
    return found


def _conditions(found: LatencyProfile) -> str:
    """The conditions of a profile, in words; it replaces an earlier one of the same conditions."""
    held = "" if found.weights == AS_STORED else f", {found.weights}"
    return f"{found.device}, {found.dtype}{held}, {found.rows} row(s), {found.kv_length} positions"
