from __future__ import annotations

import math

import numpy as np
import pytest

from was_search.service.targets.pareto import Point, dominated, pareto_figure

POINTS = [
    Point("best", 0.5, 0.50, 9.0),
    Point("uniform", 0.5, 0.50, 9.5),
    Point("best", 0.6, 0.61, 9.5),
    Point("uniform", 0.6, 0.60, 11.0),
    Point("best", 0.4, 0.40, 9.1),
]


def test_what_dominates() -> None:
    # 0.5 uniform by its winner; 0.6 uniform by the winner that drops more; 0.4 by 0.5, which is better and sparser
    assert dominated(POINTS) == [False, True, False, True, True]


def test_equal_points_do_not_dominate_each_other() -> None:
    assert dominated([POINTS[0], POINTS[0]]) == [False, False]
    assert dominated([]) == []


def test_a_hair_more_sparsity_saves_nobody() -> None:
    best, uniform = Point("best", 0.7, 0.70006, 15.9), Point("uniform", 0.7, 0.70028, 20.2)
    assert dominated([best, uniform]) == [False, True]
    assert dominated([best, Point("uniform", 0.7, 0.7021, 20.2)]) == [False, False]


def test_more_sparsity_at_the_same_perplexity() -> None:
    assert dominated([Point("best", 0.5, 0.50, 9.0), Point("best", 0.6, 0.60, 9.0)]) == [True, False]


def test_the_front_is_monotone() -> None:
    """Of points further apart than what counts as equal, those left are worse the more they drop."""
    rng = np.random.default_rng(0)
    points = [
        Point("best", 0.5, float(a), float(p)) for a, p in zip(rng.permutation(60) / 60, rng.random(60), strict=True)
    ]
    front = sorted((p.achieved, p.perplexity) for p, bad in zip(points, dominated(points), strict=True) if not bad)
    assert 1 < len(front) < 60
    assert np.all(np.diff([perplexity for _, perplexity in front]) > 0)


def test_the_figure_holds_every_point() -> None:
    figure = pareto_figure(POINTS, 8.4, "text [test]")
    best, uniform = figure.data
    assert (best.name, uniform.name) == ("best of the search", "uniform")
    assert list(best.x) == [40.0, 50.0, 61.0]
    assert list(best.y) == [9.1, 9.0, 9.5]
    assert list(best.marker.symbol) == ["circle-open", "circle", "circle"]
    assert list(best.text) == ["target 40 %, dominated", "target 50 %", "target 60 %"]
    assert list(uniform.x) == [50.0, 60.0]
    assert [shape.y0 for shape in figure.layout.shapes] == [8.4]
    assert figure.layout.annotations[0].text == "dense 8.400"
    assert "text [test]" in figure.layout.title.text


def test_a_label_says_what_is_known() -> None:
    assert Point("best", 1.8, 0.6, 9.5, "1.8x", 2.5, "12.35 % flips").label == (
        "target 1.8x, 2.500 ms a step predicted, 12.35 % flips"
    )


def test_two_points_at_one_sparsity() -> None:
    figure = pareto_figure([POINTS[0], Point("best", 0.5, 0.50, 8.9)], 8.4, "")
    assert list(figure.data[0].y) == pytest.approx([8.9, 9.0])


def test_a_perplexity_beyond_every_number_is_counted_not_drawn() -> None:
    figure = pareto_figure([POINTS[0], Point("best", 0.7, 0.70, math.inf)], math.inf, "")
    assert list(figure.data[0].y) == [9.0, None]
    assert "; 2 that are no finite number are left out" in figure.layout.title.text
    assert "Infinity" not in figure.to_json() and not figure.layout.shapes
