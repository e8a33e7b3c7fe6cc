from __future__ import annotations

import pytest

from benchmarks.harness.search_summary import excess, groups, markdown, summarise, table

PROTOCOL = {"data": "text", "dtype": "float32", "n_sequences": 4, "sequence_length": 8, "tokens_hash": "abcdef0123"}


def row(method, losses, *, space="levels", target=0.6, seed=0, model="m", achieved=0.6, extra=0):
    return {
        "method": method,
        "space": space,
        "target": target,
        "seed": seed,
        "radius": 0.05,
        "model": {"name": model, "fingerprint": "0123456789"},
        "protocols": {"search": PROTOCOL, "test": PROTOCOL},
        "tokens_per_evaluation": 100,
        "checkpoints": [
            {"evaluations": float(c), "tokens": 100 * c + extra, "test_nats": loss, "achieved": {"test": achieved}}
            for c, loss in losses.items()
        ],
    }


ROWS = [
    row("cmaes", {10: 2.5, 50: 2.3}, seed=0),
    row("cmaes", {10: 2.7, 50: 2.2}, seed=1, achieved=0.61),
    row("cmaes", {10: 2.6, 50: 2.1}, seed=2),
    row("uniform", {10: 2.9, 50: 2.9}, space="-"),
    row("gp", {10: 2.0}, space="full"),
    row("uniform", {10: 3.9}, space="-", target=0.7),
]


def test_medians_and_extremes_over_seeds():
    (targets,) = groups(ROWS).values()
    assert list(targets) == [0.6, 0.7]
    assert [curve.name for curve in targets[0.6]] == ["gp:full", "cmaes:levels", "uniform"]  # best first
    cells = targets[0.6][1].cells
    assert (cells[10].median, cells[10].least, cells[10].greatest, cells[10].n) == (2.6, 2.5, 2.7, 3)
    assert cells[50].median == 2.2
    assert targets[0.6][1].achieved == (0.6, 0.61)


def test_the_table_leaves_out_what_was_not_run():
    (targets,) = groups(ROWS).values()
    lines = [line.split() for line in table(targets[0.6]).splitlines()]
    assert lines[0][:3] == ["10", "50", "runs"]
    assert lines[1] == ["gp:full", "2.0000", "1", "60.00-60.00"]
    assert " ".join(lines[2]) == "cmaes:levels 2.6000 [2.5000 2.7000] 2.2000 [2.1000 2.3000] 3 60.00-61.00"


def test_models_are_not_mixed():
    assert len(groups([*ROWS, row("uniform", {10: 3.0}, model="other")])) == 2


def test_what_was_spent_beyond_the_budget_counts():
    (targets,) = groups([row("descent-compensated", {120: 2.1}, extra=8130), row("uniform", {120: 2.9})]).values()
    assert [list(curve.cells) for curve in targets[0.6]] == [[201], [120]]


def test_a_run_without_checkpoints_stands_last():
    (targets,) = groups([*ROWS, row("evolution", {})]).values()
    assert targets[0.6][-1].name == "evolution:levels"
    assert "evolution:levels" in table(targets[0.6])


def test_the_plot_and_the_print(tmp_path, capsys):
    pytest.importorskip("plotly")
    summarise([*ROWS, row("uniform", {10: 3.0}, model="other")], tmp_path / "plots" / "quality.html")
    printed = capsys.readouterr().out
    assert "at 60 %" in printed and "at 70 %" in printed
    assert "m 01234567, text, float32, search 4 x 8 tokens abcdef01" in printed
    html = (tmp_path / "plots" / "quality.html").read_text()
    assert "cmaes:levels" in html and "uniform" in html
    assert (tmp_path / "plots" / "quality-2.html").exists()


def test_nothing_to_show(tmp_path, capsys):
    summarise([], tmp_path / "quality.html")
    assert capsys.readouterr().out == "no rows yet\n"


def test_the_markdown_has_a_method_a_line_and_those_not_run_everywhere_last():
    (targets,) = groups([*ROWS, row("cmaes", {10: 4.0}, target=0.7)]).values()
    lines = markdown(targets).splitlines()
    assert lines[0] == "| method | evaluations | runs | 60 % | 70 % |"
    assert lines[2] == "| cmaes:levels | 50 | 1-3 | 2.2000 [2.1000, 2.3000] | 4.0000 |"
    assert lines[3] == "| uniform | 50 | 1 | 2.9000 | 3.9000 |"
    assert lines[4] == "| gp:full | 10 | 1 | 2.0000 |  |"


def test_what_lies_above_the_dense_model():
    """Each run above the dense loss that it was measured beside; the best of a target is bold."""
    rows = [
        *({**r, "dense": {"test_nats": 2.0 + 0.01 * r["seed"]}} for r in ROWS[:4]),
        {**ROWS[5], "dense": {"test_nats": 2.0}},
        ROWS[4],  # says nothing of the dense model
    ]
    (targets,) = groups(rows).values()
    lines = excess(targets).splitlines()
    assert lines[0] == "| method | evaluations | runs | 60 % | 70 % |"
    assert lines[2] == "| uniform | 50 | 1 | 0.9000 | **1.9000** |"
    assert lines[3] == "| cmaes:levels | 50 | 3 | **0.1900** |  |"  # 0.30, 0.19, 0.08
    assert lines[5] == (
        "Nats per token above the dense model's 2.0000 on the test text, median of the runs; achieved there within "
        "10.00 points of the target."
    )
    (targets,) = groups(ROWS).values()
    assert excess(targets) == ""
