"""What Ray 2.60 said of processes that ended, word for word but for ids: one function a death."""

from __future__ import annotations

from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError

_DIED = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: Worker\n\tactor_id: f1db270b01000000\n"
    "\tpid: 9629\n\tnamespace: 136f534d\n\tip: 10.0.0.7\n"
)
_BY_A_SIGNAL = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed "
    "unexpectedly due to SIGSEGV or another unexpected error. If the process was killed by the kernel OOM killer "
    "(verifiable by checking for OOM in dmesg of the OOMing node), consider enabling resource isolation via "
    "--enable-resource-isolation to prevent node deaths by resource contention."
)
_AT_CREATION = (
    "The actor died because of an error raised in its creation task, \x1b[36mray::Worker.__init__()\x1b[39m (pid=9827, "
    "ip=10.0.0.7, actor_id=7718732901000000, repr=<TemporaryActor object at 0x7f37f0041790>)\n"
)


def short_of_memory() -> RayError:
    """Ray's memory monitor."""
    return OutOfMemoryError(
        "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: "
        "228976a7976226) was 6.52GB used / 23.54GB limit (0.276974)\nOOM kill reason: Memory usage 6976450560B "
        "exceeded threshold of 6925640192B (27.4% of 25276059648B limit)\nObject store memory usage: [- objects "
        "spillable: 0\n- bytes spillable: 0\n]\nRay killed 1 worker(s) based on the killing policy"
    )


def killed() -> RayError:
    """SIGKILL while it loads its model, as by the system's out-of-memory killer; SIGSEGV reads the same."""
    return _died(_DIED + _BY_A_SIGNAL)


def killed_at_start() -> RayError:
    """SIGKILL in its constructor."""
    return _died(f"{_DIED}{_BY_A_SIGNAL}\nThe actor never ran - it was cancelled before it started running.")


def exited() -> RayError:
    """Its code called ``sys.exit(3)``."""
    return _died(
        f"{_DIED}The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit "
        "detail: Worker exits unexpectedly. Worker exits with an exit code 3."
    )


def not_imported() -> RayError:
    """A package that our code imports is missing on the node."""
    return _died(
        f"{_AT_CREATION}RuntimeError: The actor with name Worker failed to import on the worker. This may be because "
        f"needed library dependencies are not installed in the worker environment:\n\n{_AT_CREATION}"
        "  File \"<string>\", line 1, in <module>\nModuleNotFoundError: No module named 'torch'",
        at_creation=True,
    )


def node_lost() -> RayError:
    """The machine vanished; put together from the words in Ray's control store, not met."""
    return _died(
        f"{_DIED}The actor died because its node has died. Node Id: eaa94a7f\n\tthe actor's node was terminated "
        "unexpectedly: health check failed due to missing too many heartbeats"
    )


def _died(words: str, *, at_creation: bool = False) -> RayError:
    error = ActorDiedError()
    error.error_msg, error._actor_init_failed = words, at_creation
    return error
