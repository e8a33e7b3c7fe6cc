"""Tables and plots of the scaling benchmark's rows: how many times as fast each phase is with more workers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from benchmarks.harness.scaling_job import PHASES

Rows = list[dict[str, Any]]

PARTS = (*PHASES, "total")


def size(row: dict[str, Any]) -> float:
    """What more of is paid for: GPUs, or workers on CPUs."""
    return float(row["workers"] * (row["placement"]["gpus_per_worker"] or 1))


def label(row: dict[str, Any]) -> str:
    gpus = row["placement"]["gpus_per_worker"]
    return f"{row['workers']}" + (f" of {gpus:g} GPUs" if gpus not in (0, 1) else "")


def groups(rows: Rows) -> dict[str, Rows]:
    """Rows of one job on one kind of device, by words for it; each number of workers once, the latest row of it."""
    found: dict[str, dict[tuple[float, int], dict[str, Any]]] = {}
    for row in rows:
        words = f"{row['problem']} on {row['device']}, {row['settings']['trials']} trials ({row['job'][:8]})"
        found.setdefault(words, {})[size(row), row["workers"]] = row
    return {words: [each[key] for key in sorted(each)] for words, each in found.items()}


def speed_ups(rows: Rows) -> dict[str, list[float]]:
    """By part of the job: seconds of the first row over those of each; NaN where there is nothing to compare."""
    first = rows[0]["seconds"]
    return {
        part: [first[part] / row["seconds"][part] if row["seconds"][part] > 0 else float("nan") for row in rows]
        for part in PARTS
        if first[part] > 0
    }


def differences(rows: Rows) -> list[str]:
    """What the rows of one job should have in common and do not, in words; [] if all is as it should be."""
    found = []
    for name, what in (("descended_hash", "the vectors of seeds and descents"), ("plan_hash", "the plans")):
        values = {row[name] for row in rows}
        if len(values) > 1:
            each = ", ".join(f"{label(row)}: {row[name][:8]} ({row['origin']})" for row in rows)
            found.append(f"{what} are not the same for all numbers of workers: {each}")
    return found


def table(rows: Rows) -> str:
    """Seconds of the first row and speed-ups over it, then what the runs took besides, in Markdown."""
    ideal = [size(row) / size(rows[0]) for row in rows]
    lines = [
        _line("workers", [label(row) for row in rows]),
        "|---|" + "---|" * len(rows),
        _line("ideal", ["1x", *(f"{value:g}x" for value in ideal[1:])]),
    ]
    for part, ups in speed_ups(rows).items():
        lines.append(_line(part, [f"{rows[0]['seconds'][part]:.1f} s", *(f"{up:.2f}x" for up in ups[1:])]))
    figures = {
        "trials per minute": [f"{row['trials_per_minute']:.1f}" for row in rows],
        "workers busy": [f"{100 * row['busy_share']:.0f} %" for row in rows],
        "GPU hours": [f"{row['gpu_hours']:.3f}" for row in rows],
        "object store, MB": [f"{row['stored_bytes'] / 1e6:.1f}" for row in rows],
        "coordinator's processor, s": [f"{row['coordinator_cpu_seconds']:.1f}" for row in rows],
    }
    return "\n".join(lines + [_line(name, cells) for name, cells in figures.items()])


def _line(name: str, cells: list[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def summarise(rows: Rows, plot: Path) -> int:
    """Print a table a job, and write the plots that the installed packages allow; returns 1 where plans differ."""
    if not rows:
        print("no rows yet")
        return 0
    wrong = []
    for words, each in groups(rows).items():
        print(f"{words}\n\n{table(each)}\n")
        wrong += (found := differences(each))
        same = f"the plan is the same in all {len(each)} runs" if len(each) > 1 else "no other plan to compare with"
        print("\n".join(found) or same, end="\n\n")
    for path, write, package in ((plot, _html, "plotly"), (plot.with_suffix(".png"), _png, "matplotlib")):
        if importlib.util.find_spec(package):
            write(groups(rows), path)
            print(f"plot: {path}")
    return int(bool(wrong))


def _html(jobs: dict[str, Rows], path: Path) -> None:
    import plotly.graph_objects as go
    from plotly.colors import qualitative
    from plotly.subplots import make_subplots

    figure = make_subplots(1, len(jobs), subplot_titles=list(jobs))
    for column, rows in enumerate(jobs.values(), 1):
        sizes = [size(row) for row in rows]
        shown = {"ideal": [each / sizes[0] for each in sizes], **speed_ups(rows)}
        for part, values in shown.items():
            colour = "black" if part == "ideal" else qualitative.Dark24[PARTS.index(part)]
            trace = go.Scatter(
                x=sizes,
                y=values,
                mode="lines+markers",
                name=part,
                legendgroup=part,
                showlegend=column == 1,
                line={"color": colour, "dash": "dash" if part == "ideal" else "solid"},
            )
            figure.add_trace(trace, 1, column)
        figure.update_xaxes(title_text="GPUs, or workers on CPUs", tickvals=sizes, row=1, col=column)
    figure.update_yaxes(title_text="times as fast", row=1, col=1)
    figure.update_layout(template="plotly_white")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(path, include_plotlyjs="cdn", config={"displayModeBar": False})


def _png(jobs: dict[str, Rows], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(jobs), figsize=(5 * len(jobs), 5), squeeze=False)
    for axis, (words, rows) in zip(axes[0], jobs.items(), strict=True):
        sizes = [size(row) for row in rows]
        axis.plot(sizes, [each / sizes[0] for each in sizes], "--", color="black", label="ideal")
        for part, values in speed_ups(rows).items():
            axis.plot(sizes, values, marker=".", label=part, linewidth=3.0 if part == "total" else 1.2)
        axis.set(xlabel="GPUs, or workers on CPUs", xticks=sizes)
        axis.set_title(words, fontsize=8)
    axes[0][0].set_ylabel("times as fast")
    axes[0][-1].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
