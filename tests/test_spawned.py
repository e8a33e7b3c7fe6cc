"""Processes of ours are spawned: a forked child inherits the locks of threads it does not have, Ray's among them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("was_search", "storage", "workers", "kernels", "scripts", "benchmarks", "deploy", "tests")
WORDS = re.compile(r"fork|multiprocessing|get_context|set_start_method|ProcessPoolExecutor|\bmp\b")
"""One of these stands in every module that :func:`forks` finds something in; others need not be parsed."""
DEFAULT_START = {"Process", "Pool", "Queue", "SimpleQueue", "JoinableQueue", "Barrier", "Event", "Lock", "Manager"}
"""Of multiprocessing: these take the default way to start a process, which is a fork on Linux."""


def forks(tree: ast.AST) -> Iterator[str]:
    """What in a module forks, or leaves to the interpreter how processes start."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.fork", "os.forkpty", "pty.fork"}:
            yield ast.unparse(node)
        elif isinstance(node, ast.Attribute) and node.attr in DEFAULT_START:
            if ast.unparse(node.value) in {"multiprocessing", "mp", "torch.multiprocessing"}:
                yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module in {"multiprocessing", "torch.multiprocessing"}:
            yield from (alias.name for alias in node.names if alias.name in DEFAULT_START)
        elif isinstance(node, ast.Call) and _chooses_otherwise(node):
            yield ast.unparse(node)


def _chooses_otherwise(call: ast.Call) -> bool:
    name = ast.unparse(call.func).rsplit(".", 1)[-1]
    if name in {"get_context", "set_start_method"}:
        return [ast.unparse(each) for each in call.args] != ["'spawn'"]
    given = len(call.args) > 1 or any(keyword.arg == "mp_context" for keyword in call.keywords)
    return name == "ProcessPoolExecutor" and not given


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_module_forks(folder):
    found = {
        str(path.relative_to(ROOT)): kinds
        for path in sorted((ROOT / folder).rglob("*.py"))
        if WORDS.search(text := path.read_text(encoding="utf-8")) and (kinds := list(forks(ast.parse(text))))
    }
    assert found == {}


@pytest.mark.parametrize(
    "code",
    [
        "os.fork()",
        "multiprocessing.Pool(2)",
        "from multiprocessing import Process",
        "multiprocessing.get_context('fork').Pool(2)",
        "multiprocessing.get_context()",
        "multiprocessing.set_start_method('forkserver')",
        "ProcessPoolExecutor(2)",
    ],
)
def test_a_fork_is_found(code):
    assert WORDS.search(code)
    assert len(list(forks(ast.parse(code)))) == 1


def test_a_spawn_is_not():
    code = "spawn = multiprocessing.get_context('spawn')\nspawn.Queue()\nProcessPoolExecutor(2, spawn)"
    assert list(forks(ast.parse(code))) == []
