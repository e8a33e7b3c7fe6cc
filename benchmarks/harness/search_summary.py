"""Tables and a plot of what ``search_quality`` recorded."""

from __future__ import annotations

import importlib.util
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """Test losses over seeds, nats per token: median, least, greatest, and how many."""

    median: float
    least: float
    greatest: float
    n: int

    def text(self, between: str = " ") -> str:
        if self.n == 1:
            return f"{self.median:.4f}"
        return f"{self.median:.4f} [{self.least:.4f}{between}{self.greatest:.4f}]"


@dataclass(frozen=True)
class Curve:
    """One method on one space at one target.

    Attributes:
        name: of method and space.
        cells: test losses by the evaluations that were spent, in nats per token.
        achieved: least and greatest sparsity counted on the test split.
        excess: median over the seeds of the last test loss less the dense model's; None where rows do not say that one.
        dense: the dense model's test loss; None likewise.
    """

    name: str
    cells: dict[float, Cell]
    achieved: tuple[float, float]
    excess: float | None = None
    dense: float | None = None

    @property
    def last(self) -> float:
        return self.cells[max(self.cells)].median

    @property
    def runs(self) -> int:
        return max(cell.n for cell in self.cells.values())


def groups(rows: Rows) -> dict[str, dict[float, list[Curve]]]:
    """Conditions (model, data, protocol, radius) -> target -> curves, best last loss first."""
    found: dict[str, dict[float, dict[str, Rows]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        name = row["method"] if row["space"] == "-" else f"{row['method']}:{row['space']}"
        found[_conditions(row)][row["target"]][name].append(row)
    return {
        conditions: {
            target: sorted((_curve(name, runs) for name, runs in methods.items()), key=lambda curve: curve.last)
            for target, methods in sorted(targets.items())
        }
        for conditions, targets in found.items()
    }


def _curve(name: str, runs: Rows) -> Curve:
    losses: dict[float, list[float]] = defaultdict(list)
    achieved = []
    for run in runs:
        for checkpoint in run["checkpoints"]:
            # What a compensation takes comes on top of a search's budget.
            spent = round(checkpoint["tokens"] / run["tokens_per_evaluation"])
            losses[max(checkpoint["evaluations"], spent)].append(checkpoint["test_nats"])
            achieved.append(checkpoint["achieved"]["test"])
    cells = {
        evaluations: Cell(float(np.median(values)), min(values), max(values), len(values))
        for evaluations, values in sorted(losses.items())
    }
    if not cells:
        return Curve(name, {math.inf: Cell(math.inf, math.inf, math.inf, 0)}, (math.nan, math.nan))
    over = [
        (run["checkpoints"][-1]["test_nats"] - run["dense"]["test_nats"], run["dense"]["test_nats"])
        for run in runs
        if run["checkpoints"] and "dense" in run
    ]
    excess, dense = np.median(over, axis=0).tolist() if over else (None, None)
    return Curve(name, cells, (min(achieved), max(achieved)), excess, dense)


def _conditions(row: dict[str, Any]) -> str:
    test, search = row["protocols"]["test"], row["protocols"]["search"]
    step = row.get("setup", {}).get("seed_descent", {"step": 0.06})["step"]  # the value before rows recorded it
    return (
        f"{row['model']['name']} {row['model']['fingerprint'][:8]}, {test['data']}, {test['dtype']}, "
        f"search {search['n_sequences']} x {search['sequence_length']} tokens {search['tokens_hash'][:8]}, "
        f"test {test['n_sequences']} x {test['sequence_length']} tokens {test['tokens_hash'][:8]}, "
        f"seed's descent step {step:g}, radius {row['radius']:g}"
    )


def table(curves: list[Curve]) -> str:
    """Method x checkpoint, in full evaluations spent: median test loss [least greatest] over seeds."""
    checkpoints = sorted({c for curve in curves for c in curve.cells if math.isfinite(c)})
    body = [["", *(f"{c:g}" for c in checkpoints), "runs", "achieved % on test"]]
    for curve in curves:
        cells = [curve.cells[c].text() if c in curve.cells else "" for c in checkpoints]
        low, high = (100 * value for value in curve.achieved)
        body.append([curve.name, *cells, str(curve.runs), f"{low:.2f}-{high:.2f}"])
    widths = [max(len(line[i]) for line in body) for i in range(len(body[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in body)


def markdown(targets: dict[float, list[Curve]]) -> str:
    """One Markdown table: method x target, the median test loss [least, greatest] once all its budget was spent."""
    return _markdown(targets, lambda _, curve: curve.cells[max(curve.cells)].text(", "))


def excess(targets: dict[float, list[Curve]]) -> str:
    """Markdown table, method x target: the median over seeds of the test loss above the dense model's, nats per token.

    The least of a target is in bold. What it is above, and how far achieved sparsities are from their target, is said
    beneath it. "" where rows do not say the dense model's loss.
    """
    known = {target: [curve for curve in curves if curve.excess is not None] for target, curves in targets.items()}
    found = [(target, curve) for target, curves in known.items() for curve in curves]
    if not found:
        return ""
    least = {target: min((curve.excess or 0.0 for curve in curves), default=0.0) for target, curves in known.items()}

    def text(target: float, curve: Curve) -> str:
        shown = f"{curve.excess:.4f}"
        return f"**{shown}**" if curve.excess == least[target] else shown

    dense = np.median([curve.dense for _, curve in found])
    off = max(abs(value - target) for target, curve in found for value in curve.achieved)
    beneath = (
        f"Nats per token above the dense model's {dense:.4f} on the test text, median of the runs; "
        f"achieved there within {100 * off:.2f} points of the target."
    )
    return f"{_markdown(known, text)}\n\n{beneath}"


def _markdown(targets: dict[float, list[Curve]], text: Callable[[float, Curve], str]) -> str:
    by_name: dict[str, dict[float, Curve]] = defaultdict(dict)
    for target, curves in targets.items():
        for curve in curves:
            by_name[curve.name][target] = curve
    # Methods that were not run at every target come last.
    order = {name: (-len(found), sum(curve.last for curve in found.values())) for name, found in by_name.items()}
    lines = [
        "| method | evaluations | runs | " + " | ".join(f"{100 * target:g} %" for target in targets) + " |",
        "|---" * (3 + len(targets)) + "|",
    ]
    for name in sorted(by_name, key=order.__getitem__):
        found = by_name[name]
        spent = max(max(curve.cells) for curve in found.values())
        counts = sorted({curve.runs for curve in found.values()})
        runs = f"{counts[0]}" + (f"-{counts[-1]}" if counts[1:] else "")
        cells = [text(target, found[target]) if target in found else "" for target in targets]
        lines.append(f"| {name} | {spent:g} | {runs} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summarise(rows: Rows, plot: Path) -> None:
    """Print a table per target, and write the plots that the installed packages allow."""
    if not rows:
        print("no rows yet")
        return
    for number, (conditions, targets) in enumerate(groups(rows).items()):
        print(f"{conditions}\nmedian test nats per token [least greatest over seeds] by full evaluations spent")
        for target, curves in targets.items():
            print(f"\nat {100 * target:g} %\n{table(curves)}")
        print(f"\n{over_dense}\n" if (over_dense := excess(targets)) else "")
        path = plot if number == 0 else plot.with_stem(f"{plot.stem}-{number + 1}")
        for written in _plots(conditions, targets, path):
            print(f"plot: {written}")


def _plots(conditions: str, targets: dict[float, list[Curve]], path: Path) -> list[Path]:
    written = []
    if importlib.util.find_spec("plotly"):
        _html(conditions, targets, path.with_suffix(".html"))
        written.append(path.with_suffix(".html"))
    if importlib.util.find_spec("matplotlib"):
        _png(conditions, targets, path.with_suffix(".png"))
        written.append(path.with_suffix(".png"))
    return written


def _html(conditions: str, targets: dict[float, list[Curve]], path: Path) -> None:
    import plotly.graph_objects as go
    from plotly.colors import qualitative
    from plotly.subplots import make_subplots

    figure = make_subplots(1, len(targets), subplot_titles=[f"{100 * t:g} %" for t in targets])
    names = sorted({curve.name for curves in targets.values() for curve in curves})
    for column, curves in enumerate(targets.values(), 1):
        for curve in curves:
            x = list(curve.cells)
            cells = list(curve.cells.values())
            number = names.index(curve.name)
            figure.add_trace(
                go.Scatter(
                    x=x,
                    y=[cell.median for cell in cells],
                    error_y={
                        "array": [cell.greatest - cell.median for cell in cells],
                        "arrayminus": [cell.median - cell.least for cell in cells],
                        "thickness": 1,
                    },
                    mode="lines+markers",
                    name=curve.name,
                    legendgroup=curve.name,
                    showlegend=column == 1,
                    line={
                        "color": qualitative.Dark24[number % len(qualitative.Dark24)],
                        "dash": "dash" if len({cell.median for cell in cells}) == 1 else "solid",
                    },
                ),
                1,
                column,
            )
        figure.update_xaxes(type="log", title_text="full evaluations' tokens", row=1, col=column)
    figure.update_yaxes(title_text="test nats per token, median over seeds", row=1, col=1)
    figure.update_layout(title={"text": conditions, "font": {"size": 12}}, template="plotly_white")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(path, include_plotlyjs="cdn", config={"displayModeBar": False})


def _png(conditions: str, targets: dict[float, list[Curve]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(targets), figsize=(5 * len(targets), 5), squeeze=False)
    names = sorted({curve.name for curves in targets.values() for curve in curves})
    colours = pyplot.get_cmap("tab10" if len(names) <= 10 else "tab20")
    for axis, (target, curves) in zip(axes[0], targets.items(), strict=True):
        for curve in curves:
            cells = list(curve.cells.values())
            style = "--" if len({cell.median for cell in cells}) == 1 else "-"
            # What the product does stands out.
            ours = curve.name in ("descent", "descent-9")
            colour, width = ("black", 3.0) if ours else (colours(names.index(curve.name) % colours.N), 1.2)
            axis.plot(
                list(curve.cells),
                [c.median for c in cells],
                style,
                color=colour,
                linewidth=width,
                label=curve.name,
                marker=".",
            )
            axis.fill_between(
                list(curve.cells), [c.least for c in cells], [c.greatest for c in cells], color=colour, alpha=0.1
            )
        axis.set(xscale="log", title=f"{100 * target:g} %", xlabel="full evaluations' tokens")
    axes[0][0].set_ylabel("test nats per token, median over seeds")
    axes[0][-1].legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(conditions, fontsize=8)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
