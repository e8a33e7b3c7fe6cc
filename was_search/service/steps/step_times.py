"""Time decoding: one step of the dense model beside one with a plan, in the same run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from was_search.decode_time.profile import LatencyProfile
from was_search.errors import ConfigError
from was_search.plan import Plan
from was_search.service.context import Context
from was_search.service.reports.step_times import show_steps
from was_search.service.reports.study_report import step_words
from was_search.service.steps.evaluation import load_for
from was_search.service.token_sets import tokens_here
from was_search.shape import ModelShape
from was_search.weight_format import AS_STORED, WeightFormat


@dataclass(frozen=True)
class StepTimes:
    """One way to decode, measured.

    Attributes:
        name: ``dense``, ``dense, compiled`` or ``plan``; with rounded weights followed by their format.
        p20_ms: a step's time, 20th percentile; ``p50_ms`` and ``p80_ms`` are the 50th and 80th.
        tokens_per_s: tokens of all rows.
        read_bytes: bytes of live channels' weights, the head and the cache.
        limit_ms: time to read them at the bandwidth measured in the same run.
        sparsity: sparsity counted in decode steps.
        live_channels: kept channels of all projections; None: all.
        predicted_ms: time that the settings' profile predicts at the sparsities counted; None where it has none.
    """

    name: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    tokens_per_s: float
    read_bytes: int
    limit_ms: float
    sparsity: float
    live_channels: float | None
    predicted_ms: float | None = None


def bench(
    context: Context,
    plan: Plan | None,
    *,
    batch: int = 1,
    kv_length: int = 256,
    steps: int = 50,
    compiled: bool = False,
) -> list[StepTimes]:
    """Time one-token steps over a static cache on the settings' test text, dense and with ``plan``.

    Where the settings round the weights, the dense steps use the weights as stored, which is what a user starts from.

    Args:
        context: its settings give model, data, device and dtype.
        plan: the plan to time; None: the dense model alone.
        batch: number of rows, each with text of its own.
        kv_length: positions in the cache.
        steps: steps timed for each row of the table, at most kv_length.
        compiled: time the dense model through ``torch.compile`` too.

    Raises:
        ConfigError: an option out of range, or too little text.
        PlanError: the plan belongs to another model, or to weights of another format.
    """
    import torch

    from was_kernels import sparsify
    from was_kernels.runtime.sparse_linear import DENSE_ABOVE
    from was_kernels.timing.step import DecodeStep, other_bytes, projection_bytes, read_bandwidth
    from was_search.checkpoints.quantised import quantise_projections
    from was_search.checkpoints.structure import find_structure

    for name, value, least in (("batch", batch, 1), ("kv_length", kv_length, 32), ("steps", steps, 1)):
        if value < least:
            raise ConfigError(f"{name}: must be at least {least}, got {value}")
    text = tokens_here(context, "test").tokens.reshape(-1)
    each = kv_length + steps
    if len(text) < batch * each:
        raise ConfigError(
            f"kv_length: {batch} rows of {each} tokens need {batch * each} tokens of test text, there are {len(text)}; "
            "raise test_sequences or give more data"
        )
    form = WeightFormat.parse(context.settings.weights)
    if plan is not None:
        plan.require_weights(context.settings.weights)
    model, structure = load_for(context, plan, weights=AS_STORED)
    room = context.model.positions
    if room is not None and kv_length + steps > room:
        raise ConfigError(f"kv_length: {kv_length} and {steps} steps exceed the model's {room} positions")
    device = torch.device(context.placement_here.device)
    tokens = torch.as_tensor(text[: batch * each].reshape(batch, each), dtype=torch.long, device=device)
    bandwidth, others = read_bandwidth(device), other_bytes(model, batch, kv_length)
    found: list[StepTimes] = []

    profile = _profile(context, structure.shape, batch, kv_length)

    def add(
        name: str,
        step: DecodeStep,
        weight_bytes: int,
        sparsity: float,
        live: float | None,
        predicted_seconds: float | None = None,
    ) -> None:
        times = step.times(steps)
        predicted = None if predicted_seconds is None else 1e3 * predicted_seconds
        read = weight_bytes + others
        speed = 1e3 * batch / times.p50
        found.append(
            StepTimes(
                name, times.p20, times.p50, times.p80, speed, read, 1e3 * read / bandwidth, sparsity, live, predicted
            )
        )

    rounded = "" if form is None else f", {form}"
    more = plan is not None or form is not None
    with context.reporter.phase("time decode steps", 1 + compiled + more) as advance:
        every = projection_bytes([linear for _, _, linear in structure.linears()])
        expected = {} if profile is None else profile.dense
        add("dense", DecodeStep(model, tokens, kv_length), every, 0.0, None, expected.get("eager"))
        advance()
        if compiled:
            step = DecodeStep(model, tokens, kv_length, compiled=True)
            add("dense, compiled", step, every, 0.0, None, expected.get("compiled"))
            advance()
        backend = "dense"
        if form is not None:
            quantise_projections(structure, form)
            structure = find_structure(model, structure.masks)
        if plan is None and form is not None:
            held = projection_bytes([linear for _, _, linear in structure.linears()])
            add(f"dense{rounded}", DecodeStep(model, tokens, kv_length), held, 0.0, None)
            advance()
        if plan is not None:
            handle = sparsify(model, plan)
            try:
                backend = f"{handle.backend}, {handle.fused} of {structure.shape.n_blocks} blocks fused"
                step = DecodeStep(model, tokens, kv_length)
                counted = step.counted(handle)
                ahead = None if profile is None else profile.seconds(counted.sparsities)
                add(f"plan{rounded}", step, counted.weight_bytes, counted.sparsity, counted.live_channels, ahead)
            finally:
                handle.restore()
            advance()
    show_steps(
        context.reporter,
        found,
        place=context.placement_here,
        backend=backend,
        bandwidth=bandwidth,
        batch=batch,
        kv_length=kv_length,
    )
    if plan is not None and batch > DENSE_ABOVE:
        context.reporter.note(
            f"steps of more than {DENSE_ABOVE} rows keep every channel: nearly all would be read for one row or another"
        )
    if plan is not None and "step" in plan.provenance:
        context.reporter.note(f"the plan says: {step_words(plan.provenance['step'])}")
    return found


def _profile(context: Context, shape: ModelShape, batch: int, kv_length: int) -> LatencyProfile | None:
    """The profile of ``--profile`` if it fits this step; else None, after a note that says what differs."""
    if not context.settings.profile:
        return None
    found = LatencyProfile.load(Path(context.settings.profile))
    found.require_shape(shape)
    place, weights = context.placement_here, context.settings.weights
    mine = {"rows": batch, "kv_length": kv_length, "dtype": place.dtype, "weights": weights}
    other = [
        f"{name} {getattr(found, name)} for {value}" for name, value in mine.items() if getattr(found, name) != value
    ]
    if other:
        context.reporter.note(f"no prediction: the profile is of {', '.join(other)}")
        return None
    return found
