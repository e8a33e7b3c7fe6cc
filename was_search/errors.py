"""The errors of was-search. The search treats the three kinds differently.

WasError
├── InfeasibleError   a value that cannot be evaluated: the trial fails, the search goes on
├── TransientError    a worker lost, out of memory, a database restarting: retried with a cap
│   └── DeviceLostError   a GPU context that no further call can use: its process is replaced
└── WrongInputError   bad input, a mismatch: stop and say what to do next
    ├── ConfigError       an option out of its range
    ├── ModelError        a model that cannot be read or whose structure does not fit
    ├── DataError         text that cannot be read, is empty or too short
    ├── PlanError         a plan that is damaged or belongs to another model
    ├── StudyError        a study that exists with other settings, or does not exist
    ├── StorageError      a database that cannot be reached or refuses
    └── ResourceError     a GPU, Ray cluster or package that is not there
"""

from __future__ import annotations


class WasError(Exception):
    """Base of every error raised on purpose; its message is meant for the user."""


class InfeasibleError(WasError, ValueError):
    """A candidate that cannot be evaluated."""


class TransientError(WasError, RuntimeError):
    """A failure that a retry may mend."""


class DeviceLostError(TransientError):
    """A CUDA error after which the process can no longer use its GPU."""


class WrongInputError(WasError, ValueError):
    """Input that only the user can mend; never retried."""


class ConfigError(WrongInputError):
    """An option outside its range."""


class ModelError(WrongInputError):
    """A model that is missing, unreadable or lacks the seven projections."""


class DataError(WrongInputError):
    """Text that is missing, empty, not text or too short."""


class PlanError(WrongInputError):
    """A plan that is damaged or belongs to another model."""


class StudyError(WrongInputError):
    """A study that is missing or exists with other settings."""


class StorageError(WrongInputError):
    """A database that cannot be reached or refuses the login."""


class ResourceError(WrongInputError):
    """A GPU, cluster or optional package that was asked for and is not there."""


def reason(error: BaseException) -> str:
    """An error of another library as one short line."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
