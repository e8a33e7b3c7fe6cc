"""Recorded backward passes find what launched ones find, and are left out where they would be wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.doubles.tiny_models import tiny_model
from was_kernels.pass_ops import ops_for
from was_search.compensation import Compensation
from was_search.masks import pass_graphs
from was_search.masks.calibration import histogram_pass
from was_search.masks.evaluation import dense_top
from was_search.masks.masked_model import MaskedModel
from was_search.masks.pass_graphs import PassGraphs
from was_search.masks.slope import SlopeOracle, slope_pass


class Repeated:
    """Stands for a graph: it makes the call again, which reads what lies where it lay."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, call, device):
        self.recorded += 1
        self._call = call
        return Replay(self, call), None


class Replay:
    def __init__(self, to: Repeated, call) -> None:
        self._to, self._call = to, call

    def replay(self) -> None:
        self._to.replayed += 1
        self._call()


@pytest.fixture
def anywhere(monkeypatch):
    """Let passes be recorded without a GPU."""
    monkeypatch.setattr(pass_graphs, "_can_be_recorded", lambda model, data: True)


def drawn(shape, seed: int) -> Compensation:
    flat = Compensation.none(shape).flat()
    return Compensation.from_flat(
        shape, flat + np.random.default_rng(seed).normal(0, 0.1, flat.size).astype(np.float32)
    )


def passes(model, data, histograms, top, compensations):
    """Everything that three passes at different points and compensations find."""
    found = []
    for number, one in enumerate(compensations):
        learned = None
        if one is not None:
            learned = model.learned_corrections()
            learned.start(one.flat())
        point = np.full((len(model.structure.blocks), 7), 0.3 + 0.1 * number)
        slopes = slope_pass(model, data, point, histograms, width=1.0, learned=learned, top=top)
        gradient = np.zeros(0) if learned is None else learned.gradient()
        found.append((slopes.slopes, slopes.histograms.host().counts, slopes.nats, gradient))
    return found


def assert_same(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kl", [False, True])
def test_replays_find_the_same(masked, make_data, tokens, anywhere, learned, kl):
    data = make_data(tokens)
    histograms = histogram_pass(masked, data, None)[0]
    top = dense_top(masked, data, 5) if kl else None
    compensations = [drawn(masked.shape, seed) if learned else None for seed in range(4)]
    expected = passes(masked, data, histograms, top, compensations)
    repeated = Repeated()
    found = passes(dataclasses.replace(masked, graphs=PassGraphs(repeated)), data, histograms, top, compensations)
    assert_same(found, expected)
    # Batches of 4, 4 and 2 sequences: the first pass is left to the caller.
    assert (repeated.recorded, repeated.replayed) == (2, 9)


def test_what_cannot_be_recorded_is_launched(masked, make_data, tokens, anywhere):
    data = make_data(tokens)
    histograms = histogram_pass(masked, data, None)[0]
    tries = []

    def refuse(call, device):
        tries.append(device)
        raise RuntimeError("the call waits for the device")

    graphs = PassGraphs(refuse)
    found = passes(dataclasses.replace(masked, graphs=graphs), data, histograms, None, [None] * 4)
    assert_same(found, passes(masked, data, histograms, None, [None] * 4))
    assert len(tries) == 1
    assert graphs.refusal == "the call waits for the device"


def test_a_fixed_compensation_is_launched(masked, make_data, tokens, anywhere):
    data = make_data(tokens)
    histograms = histogram_pass(masked, data, None)[0]
    compensated = masked.compensated(drawn(masked.shape, 0))
    repeated = Repeated()
    graphs = dataclasses.replace(compensated, graphs=PassGraphs(repeated))
    assert_same(
        passes(graphs, data, histograms, None, [None] * 3), passes(compensated, data, histograms, None, [None] * 3)
    )
    assert repeated.recorded == 0


def test_other_kinds_of_batches_take_turns(masked, make_data, tokens, anywhere):
    histograms = histogram_pass(masked, make_data(tokens), None)[0]
    repeated = Repeated()
    model = dataclasses.replace(masked, graphs=PassGraphs(repeated))
    for size in (2, 5, 2, 5, 10, 10, 2):
        data = make_data(tokens, batch_size=size)
        found = passes(model, data, histograms, None, [None] * 2)
        assert_same(found, passes(masked, data, histograms, None, [None] * 2))
    assert repeated.recorded == 4
    model.graphs.drop()
    passes(model, make_data(tokens, batch_size=2), histograms, None, [None])
    assert repeated.recorded == 4


def test_a_kind_that_is_still_needed_is_not_dropped_for_another(masked, make_data, tokens, anywhere):
    histograms = histogram_pass(masked, make_data(tokens), None)[0]
    repeated = Repeated()
    model = dataclasses.replace(masked, graphs=PassGraphs(repeated))
    for rows, size in ((8, 4), (10, 5), (9, 4), (9, 4), (6, 4)):  # batches of 4; of 5; of 4 and 1; of 4 and 2
        data = make_data(tokens[:rows], batch_size=size)
        assert_same(
            passes(model, data, histograms, None, [None] * 2), passes(masked, data, histograms, None, [None] * 2)
        )
        assert len(model.graphs._kept) <= pass_graphs.MOST_KEPT
    assert repeated.recorded == 4


def test_nothing_is_recorded_on_a_cpu(masked, make_data, tokens):
    data, repeated = make_data(tokens), Repeated()
    histograms = histogram_pass(masked, data, None)[0]
    passes(dataclasses.replace(masked, graphs=PassGraphs(repeated)), data, histograms, None, [None] * 3)
    assert repeated.recorded == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_graphs_on_a_gpu_find_the_same(kind, recompute, make_data, tokens):
    ops = ops_for("cuda")
    model = tiny_model(kind, torch.bfloat16).cuda()
    plain = MaskedModel.of(model, "l2", ops=ops, recompute=recompute)
    data = make_data(tokens)
    histograms = histogram_pass(plain, data, None)[0]
    top = dense_top(plain, data, 5)
    compensations = [drawn(plain.shape, seed) for seed in range(4)]
    expected = passes(plain, data, histograms, top, compensations)
    graphs = PassGraphs(ops.record)
    recorded = dataclasses.replace(plain, graphs=graphs)
    assert_same(passes(recorded, data, histograms, top, compensations), expected)
    assert graphs.refusal is None
    assert len(graphs._kept) == 2
    oracles = [SlopeOracle(each, data, histograms, per_call=4, seed=3) for each in (plain, recorded)]
    point = np.full((len(plain.structure.blocks), 7), 0.5)
    for _ in range(4):
        np.testing.assert_array_equal(*(oracle(point) for oracle in oracles))
    assert recorded.model.config._attn_implementation == plain.model.config._attn_implementation
