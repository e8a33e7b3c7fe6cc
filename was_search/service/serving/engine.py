"""The thread that decodes: one text after another, each in parts, for callers on an event loop."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from was_search.errors import WasError

if TYPE_CHECKING:
    from was_kernels import DecodingLoop, Sampling

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """What is to be decoded.

    Attributes:
        ids: of the prompt, at least one.
        max_new_tokens: at least 1.
        sampling: how tokens are chosen.
        stops: strings that end the text.
        ends: ids that end it.
    """

    ids: list[int]
    max_new_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    ends: frozenset[int]


@dataclass(frozen=True)
class Ended:
    """The end of a text: why, and of how many tokens."""

    finish: Literal["stop", "length"]
    tokens: int


_ENDS = "the server is shutting down"


class DecodingFailed(Exception):  # noqa: N818 - what happened
    """Decoding ended with an error of the model's; the server goes on."""


class ServerEnds(DecodingFailed):
    """The server is shutting down."""


class NoPlace(Exception):  # noqa: N818 - what happened
    """As many requests as are wanted are there already."""


@dataclass(eq=False)
class Job:
    """A text that is decoded or waits for that; it has a place in the engine from :meth:`Engine.admit` on."""

    prompt: Prompt
    events: asyncio.AbstractEventLoop
    parts: asyncio.Queue[str | Ended | BaseException] = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def tell(self, part: str | Ended | BaseException) -> None:
        if not self.events.is_closed():
            self.events.call_soon_threadsafe(self.parts.put_nowait, part)


class Engine:
    """Decodes for callers who wait in a queue, in a thread of its own.

    Args:
        loop: nobody else decodes with it.
        tokenizer: of the model.
        most: requests at a time, the one that is decoded among them.
    """

    def __init__(self, loop: DecodingLoop, tokenizer: Any, most: int) -> None:
        self._loop = loop
        self._tokenizer = tokenizer
        self._most = most
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._there: set[Job] = set()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="decoding", daemon=True)
        self._thread.start()

    @property
    def requests(self) -> int:
        """Waiting and decoded now."""
        return len(self._there)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def admit(self, prompt: Prompt) -> Job:
        """Take a place for the text after ``prompt``; whoever takes it gives it back by :meth:`leave`.

        Raises:
            NoPlace: there is none.
            ServerEnds: after :meth:`stop`.
        """
        if self._stopped:
            raise ServerEnds(_ENDS)
        if len(self._there) >= self._most:
            raise NoPlace(f"{self.requests} requests are waited for already; try again")
        job = Job(prompt, asyncio.get_running_loop())
        self._there.add(job)
        return job

    def leave(self, job: Job) -> None:
        """Give the place back; what is still decoded of the text is given up."""
        job.cancelled.set()
        self._there.discard(job)

    async def decode(self, job: Job) -> AsyncIterator[str | Ended]:
        """The parts of the job's text, then its end.

        Raises:
            DecodingFailed: with the reason.
        """
        self._jobs.put(job)
        while True:
            part = await job.parts.get()
            if isinstance(part, DecodingFailed):
                raise part
            if isinstance(part, BaseException):
                raise DecodingFailed(str(part)) from part
            yield part
            if isinstance(part, Ended):
                return

    def stop(self) -> None:
        """Admit nothing more, and end what is there with :class:`ServerEnds`."""
        self._stopped = True
        for job in list(self._there):
            job.cancelled.set()
            job.tell(ServerEnds(_ENDS))

    def close(self) -> None:
        """End the thread; texts that are not finished end where they are."""
        self.stop()
        self._jobs.put(None)
        self._thread.join(timeout=30)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if job.cancelled.is_set():
                continue
            try:
                self._decode(job)
            except WasError as error:
                job.tell(error)
            except Exception as error:
                _LOG.exception("decoding failed")
                job.tell(error)

    def _decode(self, job: Job) -> None:
        from was_kernels import TextStream

        asked = job.prompt
        stream = TextStream(
            _Stoppable(self._loop, job.cancelled),  # type: ignore[arg-type]  # as much of a loop as is used
            self._tokenizer,
            asked.ids,
            max_new_tokens=asked.max_new_tokens,
            sampling=asked.sampling,
            eos=asked.ends,
            stops=asked.stops,
        )
        try:
            for part in stream:
                job.tell(part)
            job.tell(Ended(stream.finish or "stop", stream.tokens))
        finally:
            stream.close()


class _Stoppable:
    """A decoding loop whose texts end when ``cancelled`` is set, also where their tokens give no text."""

    def __init__(self, loop: DecodingLoop, cancelled: threading.Event) -> None:
        self._loop = loop
        self._cancelled = cancelled

    @property
    def eos(self) -> frozenset[int]:
        return self._loop.eos

    def stream(self, *args: Any, **given: Any) -> Iterator[list[int | None]]:
        steps: Any = self._loop.stream(*args, **given)
        return self._until_cancelled(steps)

    def _until_cancelled(self, steps: Any) -> Iterator[list[int | None]]:
        try:
            for step in steps:
                if self._cancelled.is_set():
                    return
                yield step
        finally:
            steps.close()
