"""Time decoding: steps and whole texts of the dense model beside those with a plan, in the same run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from was_search.decode_time.profile import LatencyProfile
from was_search.decode_time.step_times import StepTimes
from was_search.errors import ConfigError
from was_search.plan import Plan
from was_search.service.context import Context
from was_search.service.reports.step_times import show_steps
from was_search.service.reports.study_report import step_words
from was_search.service.steps.evaluation import load_for
from was_search.service.token_sets import tokens_here
from was_search.shape import ModelShape
from was_search.weight_format import AS_STORED, WeightFormat

if TYPE_CHECKING:
    from torch import Tensor

    from was_kernels import SparseModel
    from was_kernels.timing.step import Counted
    from was_search.checkpoints.structure import Structure


@dataclass(frozen=True)
class _Case:
    """Rows that decode together, and positions in their cache."""

    batch: int
    kv_length: int


def bench(
    context: Context,
    plan: Plan | None,
    *,
    batches: Sequence[int] = (1,),
    kv_lengths: Sequence[int] = (256,),
    steps: int = 50,
    compiled: bool = False,
) -> list[StepTimes]:
    """Time decoding on the settings' test text, dense and with ``plan``: steps alone, our loop and ``generate``.

    Where the settings round the weights, the dense steps use the weights as stored, which is what a user starts from.

    Args:
        context: its settings give model, data, device and dtype.
        plan: the plan to time; None: the dense model alone.
        batches: numbers of rows, each with text of its own; every one is timed with every length.
        kv_lengths: positions in the cache.
        steps: steps timed, and tokens decoded, for each row of the table; at most the shortest of ``kv_lengths``.
        compiled: time the dense model through ``torch.compile`` too.

    Raises:
        ConfigError: an option out of range, or too little text.
        PlanError: the plan belongs to another model, or to weights of another format.
    """
    import torch

    from was_kernels.runtime.sparse_linear import DENSE_ABOVE
    from was_kernels.timing.step import read_bandwidth

    cases = _checked(context, batches, kv_lengths, steps)
    steps = min(steps, *kv_lengths)
    text = torch.as_tensor(tokens_here(context, "test").tokens.reshape(-1), dtype=torch.long)
    for case in cases:
        need = case.batch * (case.kv_length + steps)
        if len(text) < need:
            raise ConfigError(
                f"kv_length: {case.batch} rows of {case.kv_length + steps} tokens need {need} tokens of test text, "
                f"there are {len(text)}; raise test_sequences or give more data"
            )
    if plan is not None:
        plan.require_weights(context.settings.weights)
    model, structure = load_for(context, plan, weights=AS_STORED)
    device = torch.device(context.placement_here.device)
    profiles = {case: _profile(context, structure.shape, case) for case in cases}
    bench = _Bench(model, structure, text.to(device), read_bandwidth(device), steps, profiles)
    form = WeightFormat.parse(context.settings.weights)
    runs = 1 + compiled + (plan is not None or form is not None)
    with context.reporter.phase("time decoding", runs * len(cases)) as advance:
        found = []
        for row in bench.rows(plan, form, compiled):
            found.append(row)
            advance()
    show_steps(context.reporter, found, place=context.placement_here, backend=bench.backend, bandwidth=bench.bandwidth)
    if plan is not None and max(batches) > DENSE_ABOVE:
        context.reporter.note(
            f"steps of more than {DENSE_ABOVE} rows keep every channel: nearly all would be read for one row or another"
        )
    if plan is not None and "step" in plan.provenance:
        context.reporter.note(f"the plan says: {step_words(plan.provenance['step'])}")
    return found


@dataclass
class _Bench:
    """What every measurement of one model shares; ``backend`` says in words what a plan's steps ran on."""

    model: Any
    structure: Structure
    text: Tensor
    bandwidth: float
    steps: int
    cases: dict[_Case, LatencyProfile | None]
    backend: str = "dense"

    def rows(self, plan: Plan | None, form: WeightFormat | None, compiled: bool) -> Iterator[StepTimes]:
        from was_kernels import sparsify
        from was_search.checkpoints.quantised import quantise_projections
        from was_search.checkpoints.structure import find_structure

        for how in (False, True)[: 1 + compiled]:
            for case in self.cases:
                yield self._row("dense, compiled" if how else "dense", case, compiled=how)
        rounded = "" if form is None else f", {form}"
        if form is not None:
            quantise_projections(self.structure, form)
            self.structure = find_structure(self.model, self.structure.masks)
        if plan is None and form is not None:
            for case in self.cases:
                yield self._row(f"dense{rounded}", case)
        if plan is not None:
            with_plan = sparsify(self.model, plan)
            try:
                self.backend = f"{with_plan.backend}, {with_plan.fused} of {self.structure.shape.n_blocks} blocks fused"
                for case in self.cases:
                    yield self._row(f"plan{rounded}", case, handle=with_plan)
            finally:
                with_plan.restore()

    def _row(self, name: str, case: _Case, *, handle: SparseModel | None = None, compiled: bool = False) -> StepTimes:
        from was_kernels import DecodingLoop
        from was_kernels.timing.rates import generate_rate, loop_rate
        from was_kernels.timing.step import DecodeStep, cache_bytes, head_bytes, projection_bytes

        each = case.kv_length + self.steps
        tokens = self.text[: case.batch * each].view(case.batch, each)
        step = DecodeStep(self.model, tokens, case.kv_length, compiled=compiled)
        counted = None if handle is None else step.counted(handle)
        times = step.times(self.steps)
        prompt, new = tokens[:, : case.kv_length - max(4, self.steps // 2)], max(4, self.steps)
        loop = DecodingLoop(self.model, compiled=compiled) if handle is None else handle.loop
        generated = None
        if not compiled or tokens.is_cuda:
            generated = generate_rate(
                self.model, prompt, new, **({"cache_implementation": "static"} if compiled else {})
            )
        weights = head_bytes(self.model)
        if counted is None:
            weights += projection_bytes([linear for _, _, linear in self.structure.linears()])
        else:
            weights += counted.weight_bytes
        cached = cache_bytes(self.model, case.batch, case.kv_length)
        return StepTimes(
            name=name,
            batch=case.batch,
            kv_length=case.kv_length,
            p20_ms=times.p20,
            p50_ms=times.p50,
            p80_ms=times.p80,
            tokens_per_s=1e3 * case.batch / times.p50,
            loop_tokens_per_s=loop_rate(loop, prompt, new),
            generate_tokens_per_s=generated,
            weight_bytes=weights,
            cache_bytes=cached,
            limit_ms=1e3 * (weights + cached) / self.bandwidth,
            sparsity=0.0 if counted is None else counted.sparsity,
            live_channels=None if counted is None else counted.live_channels,
            predicted_ms=self._predicted(name, case, counted),
        )

    def _predicted(self, name: str, case: _Case, counted: Counted | None) -> float | None:
        profile = self.cases[case]
        if profile is None:
            return None
        if counted is not None:
            return 1e3 * profile.seconds(counted.sparsities)
        seconds = profile.dense.get({"dense": "eager", "dense, compiled": "compiled"}.get(name, ""))
        return None if seconds is None else 1e3 * seconds


def _checked(context: Context, batches: Sequence[int], kv_lengths: Sequence[int], steps: int) -> list[_Case]:
    asked = [("batch", batches, 1), ("kv_length", kv_lengths, 32), ("steps", [steps], 1)]
    for name, values, least in asked:
        if not values:
            raise ConfigError(f"{name}: must be a number at least")
        if min(values) < least:
            raise ConfigError(f"{name}: must be at least {least}, got {min(values)}")
    room = context.model.positions
    if room is not None and max(kv_lengths) + steps > room:
        raise ConfigError(f"kv_length: {max(kv_lengths)} and {steps} steps exceed the model's {room} positions")
    return [_Case(batch, length) for batch, length in product(batches, kv_lengths)]


def _profile(context: Context, shape: ModelShape, case: _Case) -> LatencyProfile | None:
    """The profile of ``--profile`` if it fits this step; else None, after a note that says what differs."""
    if not context.settings.profile:
        return None
    found = LatencyProfile.load(Path(context.settings.profile))
    found.require_shape(shape)
    place, weights = context.placement_here, context.settings.weights
    mine = {"rows": case.batch, "kv_length": case.kv_length, "dtype": place.dtype, "weights": weights}
    other = [
        f"{name} {getattr(found, name)} for {value}" for name, value in mine.items() if getattr(found, name) != value
    ]
    if other:
        context.reporter.note(f"no prediction: the profile is of {', '.join(other)}")
        return None
    return found
