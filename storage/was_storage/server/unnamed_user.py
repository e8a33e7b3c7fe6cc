"""A user id without an entry in passwd, as containers hand out: initdb asks for its name, the server does not."""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from was_search.errors import StorageError

_FOLDERS = ("/usr/lib", "/usr/lib64", "/usr/local/lib")


@contextmanager
def named() -> Iterator[dict[str, str]]:
    """Variables under which a program that asks for our user's name gets one; none where it has one anyway.

    What gives it is ``libnss_wrapper``, as in the images of Postgres.

    Raises:
        StorageError: there is no entry, and no such library.
    """
    user, group = os.geteuid(), os.getegid()
    if _has_name(user):
        yield {}
        return
    library = _wrapper()
    if library is None:
        raise StorageError(
            f"embedded Postgres: user id {user} has no entry in /etc/passwd, and initdb asks for its name: "
            "install libnss-wrapper (nss_wrapper) where was-search runs, run as a user that has an entry, or give a URL"
        )
    with tempfile.TemporaryDirectory(prefix="was-search-") as folder:
        passwd, groups = Path(folder) / "passwd", Path(folder) / "group"
        passwd.write_text(f"was-search:x:{user}:{group}::/:/bin/false\n", encoding="utf-8")
        groups.write_text(f"was-search:x:{group}:\n", encoding="utf-8")
        preload = " ".join(filter(None, [str(library), os.environ.get("LD_PRELOAD")]))
        yield {"LD_PRELOAD": preload, "NSS_WRAPPER_PASSWD": str(passwd), "NSS_WRAPPER_GROUP": str(groups)}


def _has_name(user: int) -> bool:
    try:
        return bool(pwd.getpwuid(user).pw_name)
    except KeyError:
        return False


def _wrapper() -> Path | None:
    names = ("libnss_wrapper.so", "*/libnss_wrapper.so")
    return next((path for folder in _FOLDERS for name in names for path in sorted(Path(folder).glob(name))), None)
