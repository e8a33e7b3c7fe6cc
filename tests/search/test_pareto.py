from __future__ import annotations

import numpy as np
import pytest

from was_search.pareto import Point, dominated, pareto_figure

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


def test_the_front_is_monotone() -> None:
    rng = np.random.default_rng(0)
    points = [Point("best", 0.5, float(a), float(p)) for a, p in rng.random((60, 2))]
    front = sorted((p.achieved, p.perplexity) for p, bad in zip(points, dominated(points), strict=True) if not bad)
    assert 1 <= len(front) < 60
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


def test_two_points_at_one_sparsity() -> None:
    figure = pareto_figure([POINTS[0], Point("best", 0.5, 0.50, 8.9)], 8.4, "")
    assert list(figure.data[0].y) == pytest.approx([8.9, 9.0])
