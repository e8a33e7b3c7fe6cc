"""Run a was-search command as a Ray job: the coordinator lives on the cluster, and whoever submitted it may leave."""

from __future__ import annotations

import asyncio
import logging
import shlex
import time
from collections.abc import Callable, Sequence
from typing import Any

from was_search.errors import ConfigError, ResourceError
from was_search.process.redaction import ENVIRONMENT, redacted, secret_of
from was_workers.addresses import require_http
from was_workers.cluster import package_folders

ENTRYPOINT = "python -m was_search"
SUCCEEDED = "SUCCEEDED"

_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers that write a line for every package at every try, which is too much."""


def refuse_secrets(arguments: Sequence[str]) -> None:
    """Raise a ConfigError for an argument that may hold a secret: Ray's dashboard shows a job's command.

    Refused too is any URL of a database or of a webhook, whose path may be all that guards it.
    """
    for i, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option in ENVIRONMENT:
            value = value or (arguments[i + 1] if i + 1 < len(arguments) else "")
            if "://" in value:
                raise ConfigError(
                    f"{option.removeprefix('--')}: a job's command is shown in Ray's dashboard; put the URL into "
                    f"{ENVIRONMENT[option]} of the head's environment instead"
                )
        if secret_of(argument) or ("://" in argument and "@" in argument):
            raise ConfigError(
                "submit: a job's command is shown in Ray's dashboard, and one of the arguments looks like a secret; "
                "put it into the head's environment instead"
            )


class Jobs:
    """The jobs of one cluster.

    Args:
        address: of Ray's dashboard, such as ``http://127.0.0.1:8265``.

    Raises:
        ResourceError: nothing answers there, or the token is missing or wrong.
    """

    def __init__(self, address: str) -> None:
        from ray.job_submission import JobSubmissionClient

        if not address.startswith(("http://", "https://")):
            raise ConfigError(f"address: must be Ray's dashboard, http://HOST:8265, got {address!r}")
        require_http(address)
        self._address = address
        self._client = self._told(lambda: JobSubmissionClient(address))
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)

    def submit(self, arguments: Sequence[str], *, name: str = "", patience_seconds: float = 60.0) -> str:
        """Start ``was-search ARGUMENTS`` on the cluster's head; returns the job's name.

        Our four packages travel with the job. Secrets do not: a job's command and environment are shown in Ray's
        dashboard, so the database's URL must be in the head's own environment.

        Args:
            arguments: of the command.
            name: the job's; Ray makes one up where it is "".
            patience_seconds: for a head that is just starting.

        Raises:
            ConfigError: an argument holds a password.
            ResourceError: the cluster refuses the job.
        """
        refuse_secrets(arguments)
        entrypoint = f"{ENTRYPOINT} {shlex.join(arguments)}"
        end = time.monotonic() + patience_seconds
        while True:
            try:
                return str(self._told(lambda: self._submit(entrypoint, name)))
            except ResourceError as error:
                # A head that has just started has no agent yet that takes jobs.
                if "No available agent" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(1.0)

    def _submit(self, entrypoint: str, name: str) -> str:
        return str(
            self._client.submit_job(
                entrypoint=entrypoint, submission_id=name or None, runtime_env={"py_modules": package_folders()}
            )
        )

    def follow(self, name: str, show: Callable[[str], None]) -> str:
        """Show the job's output until it ends; returns its last status: ``SUCCEEDED``, ``FAILED`` or ``STOPPED``."""

        async def read() -> None:
            async for lines in self._client.tail_job_logs(name):
                show(lines)

        self._told(lambda: asyncio.run(read()))
        return str(self._told(lambda: self._client.get_job_status(name)))

    def _told(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (ConnectionError, RuntimeError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()
            raise ResourceError(
                f"ray: jobs at {self._address}: {redacted(reason[0]) if reason else type(error).__name__}; is it the "
                "address of the head's dashboard, and is its token in RAY_AUTH_TOKEN or ~/.ray/auth_token?"
            ) from error
