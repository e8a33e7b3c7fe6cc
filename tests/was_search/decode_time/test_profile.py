"""The profile: predictions against a plain loop, what is refused, and files."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.doubles.profiles import SINGLE, synthetic_profile, vars_of
from was_search.decode_time.profile import LatencyProfile, LaunchCurve
from was_search.errors import ConfigError, InfeasibleError
from was_search.shape import ModelShape

SHAPE = ModelShape(
    ((64, 64, 64, 64, 64, 64, 160), (64, 64, 64, 64, 64, 64, 96), (64, 64, 64, 64, 64, 64, 160)),
    ((64, 16, 16, 64, 160, 160, 64), (64, 16, 16, 64, 96, 96, 64), (64, 16, 16, 64, 160, 160, 64)),
)
PROFILE = synthetic_profile(SHAPE)


def slow_seconds(profile: LatencyProfile, sparsities: np.ndarray) -> float:
    """The docstring's formula, launch by launch."""
    total = profile.rest_seconds
    for curve in profile.curves:
        for b in curve.blocks:
            weights = [SHAPE.in_features[b][p] * SHAPE.out_features[b][p] for p in curve.projections]
            mean = sum(w * sparsities[b, p] for w, p in zip(weights, curve.projections, strict=True)) / sum(weights)
            i = max(j for j in range(len(curve.knots) - 1) if curve.knots[j] <= mean)
            inside = (mean - curve.knots[i]) / (curve.knots[i + 1] - curve.knots[i])
            total += curve.seconds[i] + inside * (curve.seconds[i + 1] - curve.seconds[i])
    return total


@pytest.mark.parametrize(
    "profile", [PROFILE, synthetic_profile(SHAPE, groups=SINGLE, per_weight=(1, 2, 3, 4, 5, 6, 7))]
)
def test_batches_are_predicted_as_single_vectors_by_the_formula(profile):
    vectors = np.random.default_rng(0).uniform(0, 0.98, (5, 2, 3, 7))
    found = profile.predict(vectors)
    assert found.shape == (5, 2)
    for i, j in np.ndindex(5, 2):
        assert found[i, j] == pytest.approx(slow_seconds(profile, vectors[i, j]), rel=1e-12)
        assert profile.seconds(vectors[i, j]) == pytest.approx(found[i, j], rel=1e-15)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.99))
def test_the_time_never_rises_with_any_sparsity(seed, bend):
    rng = np.random.default_rng(seed)
    profile = synthetic_profile(SHAPE, bend=bend, per_weight=tuple(rng.uniform(0.1, 5, 4)))
    point = rng.uniform(0, 1, (3, 7))
    more = np.minimum(1.0, point + rng.uniform(0, 0.3, (3, 7)) * rng.integers(0, 2, (3, 7)))
    assert profile.seconds(more) <= profile.seconds(point) * (1 + 1e-12)


def test_weights_are_a_condition_of_profiles():
    value = PROFILE.to_json()
    assert value["weights"] == "none"
    with pytest.raises(ConfigError, match="damaged"):
        LatencyProfile.from_json({name: held for name, held in value.items() if name != "weights"})
    rounded = dataclasses.replace(PROFILE, weights="int8:128")
    assert rounded.hash != PROFILE.hash
    assert LatencyProfile.from_json(rounded.to_json()).hash == rounded.hash
    assert "int8 weights in groups of 128 outputs" in rounded.describe()
    rounded.require_weights("int8:128")
    with pytest.raises(ConfigError, match=r"of int8 weights .*, these are weights as stored; .* --weights none"):
        rounded.require_weights("none")
    with pytest.raises(ConfigError, match="weights must be written 'int8:128', got 'int8'"):
        dataclasses.replace(PROFILE, weights="int8")
    with pytest.raises(ConfigError, match="must be none, int8 or int4"):
        LatencyProfile.from_json({**value, "weights": "int3"})


def test_savings_are_the_slopes():
    point = np.random.default_rng(1).uniform(0.1, 0.9, (3, 7))
    found = PROFILE.savings(point, width=1e-5)
    for b, p in np.ndindex(3, 7):
        up, down = point.copy(), point.copy()
        up[b, p] += 1e-6
        down[b, p] -= 1e-6
        assert found[b, p] == pytest.approx((PROFILE.seconds(down) - PROFILE.seconds(up)) / 2e-6, rel=1e-4)
    assert PROFILE.savings(np.ones((3, 7))).min() >= 0.0


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (np.zeros((2, 7)), r"the profile is of \(3, 7\), got shape \(2, 7\)"),
        (np.full((3, 7), 1.01), "must be in \\[0, 1\\], where the profile was measured"),
        (np.full((3, 7), -0.01), "must be in \\[0, 1\\]"),
        (np.full((3, 7), np.nan), "must be in \\[0, 1\\]"),
    ],
)
def test_refuses_what_it_does_not_know(vector, message):
    with pytest.raises(InfeasibleError, match=message):
        PROFILE.predict(vector)


def test_speedups_are_over_the_fastest_dense_step():
    profile = LatencyProfile(**{**vars_of(PROFILE), "dense": {"eager": 4e-3, "compiled": 3e-3}})
    assert (profile.dense_name, profile.dense_seconds) == ("compiled", 3e-3)
    assert profile.speedup(1.5e-3) == 2.0
    figures = profile.figures(np.zeros((3, 7)))
    assert figures["predicted_ms"] == pytest.approx(1e3 * PROFILE.seconds(np.zeros((3, 7))), abs=1e-6)


def test_a_file_gives_the_same_profile(tmp_path):
    path = PROFILE.save(tmp_path / "new" / "profile.json")
    again = LatencyProfile.load(path)
    assert again.hash == PROFILE.hash
    assert again.to_json() == PROFILE.to_json()
    vector = np.random.default_rng(2).uniform(0, 1, (3, 7))
    assert again.seconds(vector) == PROFILE.seconds(vector)


def test_the_hash_is_of_what_decides_predictions():
    values = vars_of(PROFILE)
    assert LatencyProfile(**{**values, "measured_at": "later", "versions": {"torch": "3"}}).hash == PROFILE.hash
    for change in ({"device": "another"}, {"rest_seconds": 1.0}, {"dense": {"eager": 1.0}}, {"rows": 2}):
        assert LatencyProfile(**{**values, **change}).hash != PROFILE.hash
    slower = dataclasses.replace(PROFILE.curves[0], seconds=2 * PROFILE.curves[0].seconds)
    assert LatencyProfile(**{**values, "curves": (slower, *PROFILE.curves[1:])}).hash != PROFILE.hash


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("{", "is not valid JSON"),
        ("[1]", "not a profile"),
        ('{"kind": "plan"}', "not a profile"),
        ('{"kind": "was-search profile", "version": 99}', "version must be 1, got 99"),
        ('{"kind": "was-search profile", "version": 1}', "damaged"),
        ("\x00\x01", "is not valid JSON"),
    ],
)
def test_refuses_files_that_are_no_profiles(tmp_path, text, message):
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        LatencyProfile.load(path)


def test_refuses_what_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(ConfigError, match="is not a file; 'was-search profile --output FILE' writes one"):
            LatencyProfile.load(path)
    with pytest.raises(ConfigError, match="output: cannot write"):
        PROFILE.save(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("rest_seconds",), float("nan"), "rest_seconds must be positive seconds, got nan"),
        (("rest_seconds",), -1.0, "rest_seconds must be positive"),
        (("dense",), {}, "dense must hold the time"),
        (("dense",), {"eager": float("inf")}, "dense eager must be positive seconds, got inf"),
        (("rows",), 0, "rows and kv_length must be positive"),
        (("device",), "a\nb", "device must be printable"),
        (("launches", 0, "seconds", 1), float("nan"), "must be finite"),
        (("launches", 0, "seconds", 1), 1.0, "seconds must fall to 0"),
        (("launches", 0, "seconds", -1), 1e-9, "seconds must fall to 0"),
        (("launches", 0, "knots", 0), 0.1, "knots must rise from 0 to 1"),
        (("launches", 0, "knots", 2), 0.1, "knots must rise from 0 to 1"),
        (("launches", 0, "seconds"), [1.0, 0.0], "as many seconds as knots"),
        (("launches", 0, "projections"), ["q", "k"], "must hold every projection of 3 blocks once"),
        (("launches", 0, "projections"), ["q", "k", "x"], "damaged"),
        (("launches", 0, "blocks"), [0, 0], "must hold every projection of 3 blocks once"),
        (("launches", 0, "blocks"), "all", "damaged"),
        (("shape", "in_features", 0, 0), 32, "must have the same widths"),
        (("shape",), {}, "damaged"),
    ],
)
def test_refuses_damaged_profiles(tmp_path, path, value, message):
    document = PROFILE.to_json()
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=message):
        LatencyProfile.load(file)


def test_refuses_another_models_shape():
    PROFILE.require_shape(SHAPE)
    with pytest.raises(ConfigError, match="of a model with 3 blocks, this one has 2"):
        PROFILE.require_shape(ModelShape(SHAPE.in_features[:2], SHAPE.out_features[:2]))
    other = ModelShape(SHAPE.in_features, (*SHAPE.out_features[:2], (64, 16, 16, 64, 160, 160, 32)))
    with pytest.raises(ConfigError, match=r"block 2, down: it is of a \(64, 160\) weight, the model has \(32, 160\)"):
        PROFILE.require_shape(other)


def test_a_curve_needs_two_knots():
    with pytest.raises(ConfigError, match="at least 2"):
        LaunchCurve((0,), (0,), np.array([0.0]), np.array([0.0]))
