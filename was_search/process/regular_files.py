"""Files that people name, read whole: regular ones of a size that is possible."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


class IrregularFileError(OSError):
    """A pipe, a device or a folder, or a file that is larger than any of its kind."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(errno.EINVAL, reason, str(path))


def read_regular(path: Path, most_bytes: int) -> bytes:
    """The bytes of a regular file of at most ``most_bytes``; a pipe or a device might never end.

    Links are followed, as the hub's cache is made of them.

    Raises:
        IrregularFileError: it is another kind of file, or larger.
        OSError: it cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer would hold up its opening
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise IrregularFileError(path, "not a file")
    with os.fdopen(handle, "rb") as file:
        # Not most_bytes: Python takes the memory for as much as is asked for.
        payload = file.read(status.st_size) if status.st_size <= most_bytes else None
    if payload is None:
        raise IrregularFileError(path, f"larger than {most_bytes} bytes")
    return payload
