"""Tasks of lm-eval on a model at hand, dense or sparse: the optional extra ``tasks``."""

from __future__ import annotations

import copy
import difflib
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from was_search.errors import ConfigError, DataError, ResourceError, reason

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task.

    Attributes:
        task: lm-eval's name of the task, or of a group for the mean over its tasks.
        metric: as the task calls it, such as ``acc``; a filter other than lm-eval's ``none`` follows after a comma.
        value: in the metric's own unit; accuracies in [0, 1].
        stderr: standard error in the same unit; None where lm-eval gives none.
        n: documents evaluated.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int


def check_tasks(
    tasks: list[str], *, limit: int | None = None, batch_size: int = 8, include_path: Path | None = None
) -> None:
    """Refuse what :func:`evaluate_tasks` would refuse, before a model is loaded for it.

    Raises:
        ResourceError: as :func:`evaluate_tasks`.
        ConfigError: as :func:`evaluate_tasks`.
    """
    if not tasks:
        raise ConfigError("tasks: must name at least one task, got none")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: must be at least 1, got {limit}")
    if batch_size < 1:
        raise ConfigError(f"batch_size: must be at least 1, got {batch_size}")
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"include_path: must be a folder with lm-eval's YAML files, got {str(include_path)!r}")
    try:
        import lm_eval.models.huggingface  # noqa: F401 - what it needs may be missing
    except ImportError as error:
        raise ResourceError(
            f"tasks: lm-eval or a package that it needs is not installed ({error}); pip install was-search[tasks]"
        ) from error
    with _quiet():
        _check_names(tasks, list(_manager(tasks, include_path).all_tasks))


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: list[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    include_path: Path | None = None,
    seed: int = 0,
) -> list[TaskResult]:
    """Evaluate ``model`` as it is, with whatever masks or sparse runtime it carries, on lm-eval's ``tasks``.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer; left as it is.
        tasks: names of tasks, groups or tags.
        limit: documents of each task, the first ones; None means all.
        batch_size: sequences per forward.
        include_path: a folder with further tasks as YAML files.
        seed: decides the few-shot examples; lm-eval also seeds Python's, numpy's and torch's global generators with it.

    Returns:
        Every metric of every task, in the order of names.

    Raises:
        ResourceError: lm-eval or what it needs is not installed.
        ConfigError: no or an unknown task (the message names close ones), a limit or batch size under 1, or no such
            ``include_path``.
        DataError: a task's data cannot be loaded.
        ModelError: the tokenizer gives ids that the model has no row for.
        torch.OutOfMemoryError: the GPU is too full.
    """
    check_tasks(tasks, limit=limit, batch_size=batch_size, include_path=include_path)
    from lm_eval import simple_evaluate

    with _quiet():
        found = simple_evaluate(
            # lm-eval sets a padding token, which must not happen to the caller's tokenizer.
            model=_checked_model(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size),
            tasks=list(dict.fromkeys(tasks)),
            task_manager=_manager(tasks, include_path),
            limit=limit,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return _results(found or {})


def _checked_model(pretrained: nn.Module, tokenizer: Any, batch_size: int) -> Any:
    """lm-eval's model, which refuses texts with ids that it has no row for."""
    from lm_eval.models.huggingface import HFLM

    from was_search.checkpoints.structure import token_rows
    from was_search.texts.tokens import require_rows

    rows = token_rows(pretrained)

    class Checked(HFLM):  # type: ignore[misc]
        def tok_encode(self, *args: Any, **options: Any) -> Any:
            found = super().tok_encode(*args, **options)
            require_rows(np.asarray(found, np.int64), rows, self.tokenizer, "a task's text")
            return found

        def tok_batch_encode(self, *args: Any, **options: Any) -> Any:
            ids, mask = super().tok_batch_encode(*args, **options)
            require_rows(ids[mask.bool()].numpy(), rows, self.tokenizer, "a task's text")
            return ids, mask

    return Checked(pretrained=pretrained, tokenizer=tokenizer, batch_size=batch_size)


def _manager(tasks: list[str], include_path: Path | None) -> Any:
    """A task manager of lm-eval's that knows ``tasks``, if any does.

    Of the caller's own folder alone where that has them all, groups aside, whose tasks may be lm-eval's.
    """
    if include_path is not None and set(tasks) <= set((own := _manager_of(include_path, False)).all_subtasks):
        return own
    return _manager_of(include_path, True)


@lru_cache(maxsize=2)
def _manager_of(include_path: Path | None, include_defaults: bool) -> Any:
    """lm-eval's task manager, whose errors in loading a task become a DataError.

    With lm-eval's own tasks it reads some ten thousand YAML files, which takes seconds: once for the dense model and
    the plan.
    """
    from lm_eval.tasks import TaskManager

    class Manager(TaskManager):  # type: ignore[misc]
        def load(self, task_list: Any) -> Any:
            try:
                return super().load(task_list)
            except Exception as error:  # datasets, huggingface_hub, YAML and Jinja each raise their own
                raise DataError(
                    f"tasks: {', '.join(task_list)} cannot be loaded ({reason(error)}); lm-eval fetches data from the "
                    "hub: run once with a network, or give tasks on local data with include_path"
                ) from error

    path = None if include_path is None else str(include_path)
    return Manager(include_path=path, include_defaults=include_defaults)


def _check_names(tasks: list[str], known: list[str]) -> None:
    for name in tasks:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=5)
            hint = f"; close names: {', '.join(close)}" if close else "; 'lm-eval ls tasks' lists them"
            raise ConfigError(f"tasks: lm-eval has no task, group or tag {name!r}{hint}")


def _results(found: Mapping[str, Any]) -> list[TaskResult]:
    results = []
    for task, metrics in found.get("results", {}).items():
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filtered}")
            known = isinstance(stderr, int | float) and math.isfinite(stderr)
            results.append(
                TaskResult(
                    task=str(task),
                    metric=metric if filtered == "none" else key,
                    value=float(value),
                    stderr=float(stderr) if known else None,
                    n=int(metrics.get("sample_len", 0)),
                )
            )
    return results


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's warnings during the block, among them one about models passed as objects."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
