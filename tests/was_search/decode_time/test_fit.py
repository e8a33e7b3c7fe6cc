"""Fits against a step whose time is known: a formula plays the device."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression

from was_search.decode_time.fit import (
    FUSED,
    KNOTS,
    SINGLE,
    check,
    check_summary,
    falling,
    fit,
    launch_kinds,
    n_measurements,
    random_vectors,
)
from was_search.decode_time.profile import LatencyProfile
from was_search.shape import ModelShape

SHAPE = ModelShape(
    ((512, 512, 512, 512, 512, 512, 1376),) * 3 + ((512, 512, 512, 512, 512, 512, 1024),),
    ((512, 128, 128, 512, 1376, 1376, 512),) * 3 + ((512, 128, 128, 512, 1024, 1024, 512),),
)
ATTENTION_SECONDS = 2e-5


class Device:
    """A step of many launches, each a fixed time and its live bytes, with a floor on small ones; and noise."""

    def __init__(self, groups=FUSED, noise: float = 0.0, drift: float = 0.0, overlap: float = 0.0) -> None:
        self.groups, self.noise, self.drift, self.overlap = groups, noise, drift, overlap
        self.rng = np.random.default_rng(0)
        self.calls = 0

    def true_seconds(self, sparsities: np.ndarray) -> float:
        total = ATTENTION_SECONDS
        for b in range(SHAPE.n_blocks):
            for group in self.groups:
                live = sum(SHAPE.params[b, p] * (1 - sparsities[b, p]) for p in group)
                total += 4e-6 + max(2e-7, live * 1e-11) + 5e-12 * live**0.9
        return total * (1 - self.overlap * (1 - sparsities.mean()))

    def __call__(self, sparsities: np.ndarray) -> tuple[float, np.ndarray]:
        widths = np.array(SHAPE.in_features)
        achieved = 1 - np.maximum(1, np.round((1 - sparsities) * widths)) / widths
        self.calls += 1
        seconds = self.true_seconds(achieved) * (1 + self.drift * self.calls / 100)
        return seconds * (1 + self.noise * self.rng.standard_normal()), achieved


def profile_of(device: Device, rounds: int = 3) -> LatencyProfile:
    found = fit(device, SHAPE, launch_kinds(SHAPE, device.groups), rounds=rounds)
    return LatencyProfile(SHAPE, found.curves, found.rest_seconds, {"eager": 1.0}, "d", "float16", "cuda", 1, 256)


@pytest.mark.parametrize("groups", [FUSED, SINGLE])
def test_an_exact_device_is_predicted_within_a_percent(groups):
    device = Device(groups)
    profile = profile_of(device)
    assert device.calls == n_measurements(launch_kinds(SHAPE, groups), 3)
    rows = check(device, profile, 20)
    assert check_summary(rows)["max_error"] < 0.01
    assert all(row["measured_ms"] > 0 for row in rows)
    for level in (0.0, 0.5, 0.98):
        vector = np.full((4, 7), level)
        assert profile.seconds(vector) == pytest.approx(device.true_seconds(vector), rel=0.01)


def test_noise_drift_and_what_does_not_add_up_are_borne():
    """Half a percent of noise, 2 % of drift in a hundred steps and launches that overlap: 5 % is what is promised."""
    rows = check(Device(noise=0.005, overlap=0.05), profile_of(Device(noise=0.005, drift=0.02, overlap=0.05)), 20)
    assert check_summary(rows)["max_error"] < 0.05


def test_curves_fall_however_noisy_the_device_is():
    profile = profile_of(Device(noise=0.3), rounds=1)
    vectors = np.sort(np.random.default_rng(1).uniform(0, 1, (40, 4, 7)), axis=0)
    assert np.all(np.diff(profile.predict(vectors)) <= 1e-15)


def test_the_same_measurements_give_the_same_profile():
    assert profile_of(Device()).hash == profile_of(Device()).hash


def test_kinds_are_told_apart_by_their_widths():
    kinds = launch_kinds(SHAPE, FUSED)
    assert [(kind.projections, kind.blocks) for kind in kinds] == [
        ((0, 1, 2), (0, 1, 2, 3)),
        ((3,), (0, 1, 2, 3)),
        ((4, 5), (0, 1, 2)),
        ((6,), (0, 1, 2)),
        ((4, 5), (3,)),
        ((6,), (3,)),
    ]


def test_a_narrow_projection_has_few_knots():
    shape = ModelShape(((4,) * 7,), ((4,) * 7,))

    def device(sparsities):
        achieved = 1 - np.maximum(1, np.round((1 - sparsities) * 4)) / 4
        return 1e-5 + 1e-6 * float((1 - achieved).sum()), achieved

    found = fit(device, shape, launch_kinds(shape, SINGLE), rounds=1)
    for curve in found.curves:
        assert curve.knots.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
        np.testing.assert_allclose(curve.seconds, [7.5e-7, 5e-7, 2.5e-7, 0.0, 0.0], atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30))
def test_falling_is_isotonic_regression(values):
    expected = isotonic_regression(values, increasing=False).x
    np.testing.assert_allclose(falling(np.array(values)), expected, atol=1e-12)


def test_random_vectors_are_all_over_the_place():
    vectors = random_vectors(SHAPE, 20, 1)
    assert vectors.shape == (20, 4, 7)
    assert vectors.min() >= 0.0 and vectors.max() <= 0.97 < KNOTS[-1]
    assert np.ptp([SHAPE.sparsity(vector) for vector in vectors]) > 0.3
    np.testing.assert_array_equal(vectors, random_vectors(SHAPE, 20, 1))
