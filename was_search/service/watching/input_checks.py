"""What of a model, a text and a process's surroundings would go wrong in a run, before anything is computed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from was_search.service.context import Context
from was_search.service.watching.check import Check, guarded
from was_search.texts.protocol import SPLITS

_SLACK = 1.2
"""Memory that a model takes while it computes, in units of its weights, at the least."""


def check_inputs(context: Context) -> Iterator[Check]:
    """Check what the settings name: the model, its memory, and each split of the data.

    The same functions are asked that a run asks, so the words are those that it would end with. No weight is read.
    """
    settings = context.settings
    if not settings.model:
        return
    model = guarded("model", lambda: _model(context))
    yield model
    if not model.good:
        return
    yield guarded("memory", lambda: _memory(context))
    if settings.data:
        for split in SPLITS:
            yield guarded(f"{split} text", lambda split=split: _text(context, split))  # type: ignore[misc]


def surroundings(context: Context) -> Iterator[Check]:
    """Check what a process is given by whoever starts it: the encoding of its output, and a folder for sockets."""
    yield _encoding()
    if context.settings.ray == "local" or (context.settings.ray == "auto" and not os.environ.get("RAY_ADDRESS")):
        yield guarded("Ray's sockets", _sockets)


def _model(context: Context) -> Check:
    from was_search.checkpoints.load import load_tokenizer

    model = context.model
    load_tokenizer(model.source)
    shape = model.shape
    model.require_positions(context.settings.sequence_length)
    room = "" if model.positions is None else f", {model.positions} positions"
    weights = f"{shape.params.sum() / 1e6:,.1f} M weights in the seven projections"
    return Check("model", True, f"{shape.n_blocks} blocks, {weights}{room}")


def _memory(context: Context) -> Check:
    settings, place = context.settings, context.placement_here
    stored = sum(path.stat().st_size for path in context.model.source.weight_files())
    gpu = place.device.startswith("cuda")
    workers = 1 if gpu else settings.worker_range.least
    free, needed = (_free_of_gpu() if gpu else _free()), int(_SLACK * stored * workers)
    found = f"{stored / 2**30:.2f} GiB of weights for each of {workers} worker(s), {free / 2**30:.1f} GiB free"
    if needed <= free:
        return Check("memory", True, found)
    return Check("memory", False, found, "fewer --workers, more GPUs for each (--gpus-per-worker), or a larger machine")


def _free_of_gpu() -> int:
    import torch

    return int(torch.cuda.mem_get_info()[0])


def _free(meminfo: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of main memory that a process may still take: the machine's, or less where a container has a limit."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    free = 1024 * int(fields["MemAvailable"].split()[0])
    try:
        most, taken = (int((limit / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free
    return min(free, most - taken)


def _text(context: Context, split: str) -> Check:
    from was_search.service.token_sets import tokens_here

    asked = getattr(context.settings, f"{split}_sequences")
    protocol = tokens_here(context, split).protocol
    if protocol.n_sequences < asked:
        return Check(f"{split} text", True, f"{protocol.describe()}; {asked} sequences were asked for")
    return Check(f"{split} text", True, protocol.describe())


def _encoding() -> Check:
    name = getattr(sys.stdout, "encoding", None) or "none"
    try:
        "✓é你".encode(name)
    except (UnicodeEncodeError, LookupError):
        advice = "marks and letters that it lacks get stand-ins; PYTHONIOENCODING=utf-8 shows them"
        return Check("output", None, f"in {name}", advice)
    return Check("output", True, f"in {name}")


def _sockets() -> Check:
    from was_workers.session_folder import rays_choice, session_folder

    folder = session_folder()
    if folder is None:
        return Check("Ray's sockets", True, f"in {rays_choice()}")
    return Check("Ray's sockets", True, f"in {folder}, as {rays_choice()} is too long a path")
