"""What a user sees while a step runs: one bar per phase, notes, tables; or JSON lines; or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table as RichTable
from rich.text import Text

from was_search.coordinator.search_progress import SearchProgress
from was_search.process.plain_json import dumps
from was_search.service.reports.heartbeat import Ticking, clock, eta_seconds, every_half_minute, progress_words
from was_search.studies.fitness import UNITS, FitnessName
from was_search.studies.pool_state import PoolState
from was_search.studies.slots import Slot, SlotState
from was_search.texts.protocol import perplexity

Advance = Callable[[], None]
Write = Callable[[str], None]


class Reporter:
    """Shows only texts that were asked for: the reporter of programs that use the library, and the others' base."""

    @contextmanager
    def phase(
        self,
        name: str,
        total: int | None = None,
        workers: Callable[[], PoolState] = PoolState,
        *,
        least_seconds: float = 0.0,
    ) -> Iterator[Advance]:
        """Show a phase of ``total`` parts on ``workers``; gives a function that advances it by one part.

        Of one that is over before ``least_seconds`` no line is left.
        """
        yield lambda: None

    @contextmanager
    def search(
        self, name: str, protocol: str, fitness: FitnessName = "nll"
    ) -> Iterator[Callable[[SearchProgress], None]]:
        """Show the search phase; losses shown are of ``fitness`` on the split named by ``protocol``."""
        yield lambda _: None

    def cached(self, name: str, detail: str, seconds: float) -> None:
        """Show a phase that was read from the cache."""

    def note(self, text: str) -> None:
        """Show a line for people, as it is."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
        """Show a table for people."""

    @contextmanager
    def live(self) -> Iterator[Callable[[str, Sequence[Sequence[str]], str], None]]:
        """Show a table of two columns again and again; gives a function of its title, its rows and a line.

        The line says the same where no terminal can be redrawn.
        """
        yield lambda title, rows, line: None

    def result(self, value: Mapping[str, Any]) -> None:
        """Show the step's result, for programs."""

    def text(self, text: str) -> None:
        """Show output that was asked for, such as generated text, in every mode for people."""
        sys.stdout.write(text + "\n")

    @contextmanager
    def writing(self, title: str = "") -> Iterator[Write]:
        """Show a text that was asked for while it comes; gives a function that shows its next part at once.

        ``title`` stands on a line above it. A line ends after it, also where it is broken off. Programs get the whole
        text in the result.
        """
        with _written(lambda: sys.stdout, title) as write:
            yield write


class JsonReporter(Reporter):
    """One JSON object a line on standard output; ``event`` names its kind.

    A phase that lasts says how far it is every half minute, as ``"state": "running"``.

    Args:
        now: the time in seconds.
        ticking: says how far a phase is while it lasts.
    """

    def __init__(
        self, *, now: Callable[[], float] = lambda: time.perf_counter(), ticking: Ticking = every_half_minute
    ) -> None:
        self._now = now
        self._ticking = ticking

    def _emit(self, event: str, **values: Any) -> None:
        sys.stdout.write(dumps({"event": event, **values}, default=str) + "\n")
        sys.stdout.flush()

    @contextmanager
    def phase(
        self,
        name: str,
        total: int | None = None,
        workers: Callable[[], PoolState] = PoolState,
        *,
        least_seconds: float = 0.0,
    ) -> Iterator[Advance]:
        started, done = self._now(), 0

        def advance() -> None:
            nonlocal done
            done += 1

        def say() -> None:
            seconds = self._now() - started
            left = eta_seconds(done, total, seconds)
            shown = {"done": done, "total": total, "seconds": round(seconds, 3), "eta_seconds": left}
            self._emit("phase", name=name, state="running", **shown, **_held(workers()))

        if not least_seconds:
            self._emit("phase", name=name, state="started", total=total)
        with self._ticking(say):
            yield advance
        seconds = round(self._now() - started, 3)
        if seconds >= least_seconds:
            self._emit("phase", name=name, state="finished", seconds=seconds, **_held(workers()))

    @contextmanager
    def search(
        self, name: str, protocol: str, fitness: FitnessName = "nll"
    ) -> Iterator[Callable[[SearchProgress], None]]:
        started = self._now()
        first: list[int] = []
        last: list[SearchProgress] = []

        def say() -> None:
            seconds = self._now() - started
            shown: dict[str, Any] = {"study": name, "seconds": round(seconds, 3)}
            if last:
                done, best = last[0], last[0].best
                left = eta_seconds(done.finished - first[0], done.total - first[0], seconds)
                shown |= {"finished": done.finished, "total": done.total, "eta_seconds": left}
                shown |= {"best_loss_nats": best.loss_nats if best else None, **_held(done.pool)}
            self._emit("search", state="running", **shown)

        def show(progress: SearchProgress) -> None:
            first.append(progress.finished)
            last[:] = [progress]
            self._emit(
                "trial",
                study=name,
                protocol=protocol,
                finished=progress.finished,
                total=progress.total,
                stopped=progress.stopped,
                tokens_saved=round(progress.saved, 4),
                failed=progress.failed,
                fitness=fitness,
                best_loss_nats=progress.best.loss_nats if progress.best else None,
                best_nll_nats=progress.best.nll_nats if progress.best else None,
                workers=progress.pool.counts,
                slot=progress.current.number if progress.current else None,
                loss_nats=progress.current.loss_nats if progress.current else None,
                nll_nats=progress.current.nll_nats if progress.current else None,
                # The losses of such a trial are means over its first sequences, and compare with no other's.
                **({"stopped_early": True} if _stopped_early(progress.current) else {}),
            )

        with self._ticking(say):
            yield show

    def cached(self, name: str, detail: str, seconds: float) -> None:
        self._emit("phase", name=name, state="cached", detail=detail, seconds=round(seconds, 3))

    def note(self, text: str) -> None:
        self._emit("note", text=text)

    def result(self, value: Mapping[str, Any]) -> None:
        self._emit("result", **value)

    def text(self, text: str) -> None:
        self._emit("text", text=text)

    @contextmanager
    def writing(self, title: str = "") -> Iterator[Write]:
        yield lambda part: None


_MARKS = {"ok": "green", "missing": "red", "none": "yellow"}
"""Colours of cells that hold nothing but one of the words."""

_PICTURES = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n\r"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}
"""What a terminal is shown instead of characters that would command it: a model may write any."""


class QuietReporter(Reporter):
    """Shows a command's tables and texts, and no progress (``--quiet``)."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 132)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
        self.console.print(_table(title, columns, rows, caption))

    def text(self, text: str) -> None:
        self.console.print(text, markup=False, emoji=False, soft_wrap=True)

    @contextmanager
    def writing(self, title: str = "") -> Iterator[Write]:
        # Not by the console, which would widen tabs and know no column to do it from.
        with _written(lambda: self.console.file, title) as write:
            yield (lambda part: write(part.translate(_PICTURES))) if self.console.is_terminal else write


class RichReporter(QuietReporter):
    """Shows bars, notes and tables on a terminal, plain lines where standard output is none.

    Where nothing can be redrawn, a phase that lasts says how far it is in a line every half minute. Names, protocols
    and notes hold square brackets (``[search]``), which rich would take for its markup.

    Args:
        console: where to.
        now: the time in seconds.
        ticking: says how far a phase is while it lasts.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        now: Callable[[], float] = lambda: time.perf_counter(),
        ticking: Ticking = every_half_minute,
    ) -> None:
        super().__init__(console)
        self._now = now
        self._ticking = ticking

    @contextmanager
    def phase(
        self,
        name: str,
        total: int | None = None,
        workers: Callable[[], PoolState] = PoolState,
        *,
        least_seconds: float = 0.0,
    ) -> Iterator[Advance]:
        started = self._now()

        def held() -> str:
            return "".join(f", {words}" for words in _quarantined(workers()))

        with self._bar(_Quarantined(workers)) as bar:
            task = bar.add_task(escape(name), total=total)

            def say() -> str:
                done = int(bar.tasks[0].completed)
                return f"{escape(name)}: {progress_words(done, total, self._now() - started)}{held()}"

            with self._lines(say):
                yield lambda: bar.advance(task)
        seconds = self._now() - started
        if seconds >= least_seconds:
            self.console.print(f"[green]✓[/] {escape(name)} [dim]{clock(seconds)}[/]{held()}")

    @contextmanager
    def search(
        self, name: str, protocol: str, fitness: FitnessName = "nll"
    ) -> Iterator[Callable[[SearchProgress], None]]:
        started = self._now()
        first: list[int] = []
        last: list[SearchProgress] = []

        def words(done: SearchProgress, **options: bool) -> str:
            minutes = max((self._now() - started) / 60, 1e-9)
            return _figures(done, (done.finished - first[0]) / minutes, fitness, **options)

        def say() -> str:
            seconds = self._now() - started
            if not last:
                return f"search: {clock(seconds)}"
            done = last[0]
            left = eta_seconds(done.finished - first[0], done.total - first[0], seconds)
            eta = "" if left is None else f", ETA {clock(left)}"
            figures = words(done, current=False)
            return f"search: {done.finished} of {done.total} trials, {figures}, {clock(seconds)}{eta}"

        self.console.print(f"  study [bold]{escape(name)}[/], losses on {escape(protocol)}", soft_wrap=True)
        with self._bar(TextColumn("{task.fields[figures]}")) as bar:
            task = bar.add_task("search", total=None, figures="")

            def show(progress: SearchProgress) -> None:
                first.append(progress.finished)
                last[:] = [progress]
                bar.update(task, completed=progress.finished, total=progress.total, figures=words(progress))

            with self._lines(say):
                yield show
        if last:
            done = last[0]
            self.console.print(
                f"[green]✓[/] search {done.finished}/{done.total} trials, {words(done, current=False)} "
                f"[dim]{clock(self._now() - started)}[/]"
            )

    def cached(self, name: str, detail: str, seconds: float) -> None:
        self.console.print(f"[green]✓[/] {escape(name)}: cached [dim]({escape(detail)}, {seconds:.2f} s)[/]")

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, emoji=False, soft_wrap=True)

    @contextmanager
    def live(self) -> Iterator[Callable[[str, Sequence[Sequence[str]], str], None]]:
        if not self.console.is_interactive:
            yield lambda title, rows, line: self.note(line)
            return
        with Live(console=self.console, auto_refresh=False) as live:
            yield lambda title, rows, line: live.update(_table(title, ["", ""], rows), refresh=True)

    def _lines(self, say: Callable[[], str]) -> AbstractContextManager[None]:
        """Print what ``say`` gives, again and again while the block lasts, where no bar can."""
        if self.console.is_interactive:
            return nullcontext()
        return self._ticking(lambda: self.console.print(f"  {say()}", soft_wrap=True))

    def _bar(self, *extra: ProgressColumn) -> Progress:
        return Progress(
            SpinnerColumn("line" if self.console.options.ascii_only else "dots"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            *extra,
            console=self.console,
            transient=True,
            disable=not self.console.is_interactive,
        )


@contextmanager
def _written(stream: Callable[[], IO[str]], title: str) -> Iterator[Write]:
    def write(part: str) -> None:
        stream().write(part)
        stream().flush()

    if title:
        write(title + "\n")
    try:
        yield write
    finally:
        write("\n")


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> RichTable:
    table = RichTable(title=escape(title), caption=escape(caption), title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        numbers = i > 0 and all(not row[i] or row[i][0] in "+-.0123456789" for row in rows)
        table.add_column(escape(column), justify="right" if numbers else "left", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(Text(cell, style=_MARKS.get(cell, "")) for cell in row))
    return table


def _figures(progress: SearchProgress, rate: float, fitness: FitnessName, *, current: bool = True) -> str:
    parts = [escape(progress.activity)] if progress.activity else []
    if (best := progress.best) is not None:
        shown = "" if best.nll_nats is None else f"ppl {perplexity(best.nll_nats):.3f}, "
        parts.append(f"best {best.loss_nats:.4f} {UNITS[fitness]} ({shown}#{best.number})")
    if current and progress.current is not None and progress.current.loss_nats is not None:
        early = _stopped_early(progress.current)
        parts.append("current stopped early" if early else f"current {progress.current.loss_nats:.4f}")
    parts.append(f"{rate:.1f} trials/min")
    stopped = f"{100 * progress.stopped / max(progress.finished, 1):.0f} % stopped early"
    parts.append(f"{stopped} ({100 * progress.saved:.0f} % of the tokens saved)" if progress.stopped else stopped)
    parts += _quarantined(progress.pool)
    if progress.failed:
        parts.append(f"[red]{progress.failed} failed[/]")
    return ", ".join(parts)


def _held(pool: PoolState) -> dict[str, Any]:
    held = pool.to_json()["quarantined"]
    return {"quarantined": held} if held else {}


def _stopped_early(slot: Slot | None) -> bool:
    return slot is not None and slot.state is SlotState.STOPPED


def _quarantined(pool: PoolState) -> list[str]:
    """How many workers are in quarantine, in words; [] for none."""
    held = len(pool.quarantined)
    return [f"[yellow]{held} worker(s) in quarantine[/]"] if held else []


class _Quarantined(ProgressColumn):
    """A bar's column of workers in quarantine: a phase that waits for one has nothing else to show."""

    def __init__(self, workers: Callable[[], PoolState]) -> None:
        super().__init__()
        self._workers = workers

    def render(self, task: Task) -> Text:
        return Text.from_markup(" ".join(_quarantined(self._workers())))
