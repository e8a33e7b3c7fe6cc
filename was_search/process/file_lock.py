"""Files whose lock says that a process is alive."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class LockedFile:
    """A file whose lock says that its holder lives; the lock ends with the process, however it ends."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd

    @classmethod
    def take(cls, path: Path, *, wait: bool = False) -> LockedFile | None:
        """Lock ``path``, made if missing; None where another holds it."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd)

    @staticmethod
    def held(path: Path) -> bool:
        """Whether some process holds the lock of ``path``; asking keeps nobody from taking it."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def close(self) -> None:
        """Close our descriptor; a process that inherited it keeps the lock."""
        os.close(self.fd)

    def release(self) -> None:
        """Give the lock up, also in the name of processes that inherited the descriptor."""
        fcntl.flock(self.fd, fcntl.LOCK_UN)
        self.close()

    def remove(self) -> None:
        """Delete the file and give the lock up."""
        self.path.unlink(missing_ok=True)
        self.release()
