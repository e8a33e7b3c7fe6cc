"""The arrows of the design: who may import whom, and what the folders hold."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "was_search": ROOT / "was_search",
    "was_storage": ROOT / "storage" / "was_storage",
    "was_workers": ROOT / "workers" / "was_workers",
    "was_kernels": ROOT / "kernels" / "was_kernels",
}
ALLOWED = {
    "was_search": {"was_search"},
    "was_storage": {"was_storage", "was_search"},
    "was_workers": {"was_workers", "was_search", "was_kernels"},
    "was_kernels": {"was_kernels", "was_search"},
}
OUTER = ("storage", "workers", "kernels", "deploy", "benchmarks", "scripts", "tests")


@dataclass(frozen=True)
class Import:
    """One import: its module, whether it stands inside a function, and whether only type checkers run it."""

    module: str
    inside: bool
    typing_only: bool


def imports(path: Path) -> list[Import]:
    return list(_walk(ast.parse(path.read_text(encoding="utf-8")), False, False, _package(path)))


def _package(path: Path) -> list[str]:
    root = next(folder.parent for folder in PACKAGES.values() if path.is_relative_to(folder))
    return list(path.relative_to(root).parent.parts)


def _walk(node: ast.AST, inside: bool, typing_only: bool, package: list[str]) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, inside, typing_only) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = package[: len(package) - child.level + 1] if child.level else []
            module = ".".join([*base, *([child.module] if child.module else [])])
            yield Import(module, inside, typing_only)
            # `from was_search import cli` names a module too.
            yield from (Import(f"{module}.{alias.name}", inside, typing_only) for alias in child.names)
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            guarded = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from _walk(child, inside or function, typing_only or guarded, package)


def modules(package: str) -> list[Path]:
    return sorted(p for p in PACKAGES[package].rglob("*.py") if "demo_data" not in p.parts)


def is_composition_root(path: Path) -> bool:
    core = PACKAGES["was_search"]
    if path == core / "__init__.py":  # gives public names of all packages, each when it is asked for
        return True
    return (path.parent == core and path.name.startswith("cli")) or core / "api" in path.parents


def is_entry(path: Path) -> bool:
    return is_composition_root(path) or path.name == "__main__.py"


def ours(found: Import) -> str:
    top = found.module.split(".")[0]
    return top if top in PACKAGES else ""


EVERY = [(package, path) for package in PACKAGES for path in modules(package)]


def identify(value: object) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


@pytest.mark.parametrize(("package", "path"), EVERY, ids=identify)
def test_imports_follow_the_arrows(package, path):
    for found in imports(path):
        if ours(found) and ours(found) not in ALLOWED[package]:
            assert is_composition_root(path), f"{path.relative_to(ROOT)} imports {found.module}"
            assert found.inside or found.typing_only, f"{path.relative_to(ROOT)} imports {found.module} at the top"


@pytest.mark.parametrize(("package", "path"), EVERY, ids=identify)
def test_only_the_composition_root_knows_itself(package, path):
    """Nothing below imports the api or the command line."""
    if is_entry(path):
        return
    for found in imports(path):
        assert not found.module.startswith(("was_search.api", "was_search.cli")), f"imports {found.module}"


def op_modules() -> list[Path]:
    """Modules of the kernels that register an op or import triton, and all others of the kernels that these import."""
    by_name = {f"was_kernels.{path.stem}": path for path in modules("was_kernels") if path.stem != "__init__"}
    found: set[Path] = set()
    waiting = [
        path
        for path in by_name.values()
        if "custom_op(" in path.read_text(encoding="utf-8")
        or any(i.module.split(".")[0] == "triton" for i in imports(path))
    ]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting.extend(by_name[i.module] for i in imports(path) if i.module in by_name)
    return sorted(found)


@pytest.mark.parametrize("path", op_modules(), ids=identify)
def test_ops_know_nothing_of_ours(path):
    """An op takes torch, triton and other ops only; what it means in plain torch is part of it."""
    tops = {i.module.split(".")[0] for i in imports(path)} - set(sys.stdlib_module_names)
    assert tops <= {"torch", "triton", "was_kernels"}


def test_the_ops_are_found():
    stems = {path.stem for path in op_modules()}
    assert {"gather_gemv", "sparse_gemv", "attend", "step_ends", "score_mask", "reference", "nvrtc"} <= stems
    assert not {"runtime", "sparse_linear", "decode_block"} & stems


def test_the_core_imports_no_service_at_the_top():
    """Reading the core needs no database, no Ray and no GPU."""
    for path in modules("was_search"):
        tops = {i.module.split(".")[0] for i in imports(path) if not i.inside and not i.typing_only}
        assert not tops & {"ray", "sqlalchemy", "alembic", "psycopg2", "triton"}, path


def test_below_the_composition_root_the_core_never_imports_ray():
    """Not even inside a function: the search's loop knows its workers by a contract."""
    for path in modules("was_search"):
        if not is_composition_root(path):
            assert not any(i.module.split(".")[0] == "ray" for i in imports(path)), path


@pytest.mark.parametrize("folder", OUTER)
def test_no_outer_folder_is_a_package(folder):
    """A top-level package called ``kernels`` breaks transformers, which imports whatever has that name."""
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_one(package):
    assert (PACKAGES[package] / "__init__.py").is_file()


def test_no_function_shadows_the_module_it_comes_from():
    """After ``import was_search.api``, the attribute of a module's name is that module."""
    from was_search import api

    stems = {path.stem for path in (PACKAGES["was_search"] / "api").glob("*.py")} - {"__init__"}
    assert not stems & set(api.__all__)
    assert all(inspect.ismodule(getattr(api, stem)) for stem in stems if hasattr(api, stem))


def test_importing_the_kernels_imports_no_triton():
    paths = [str(ROOT), *(str(PACKAGES[name].parent) for name in PACKAGES)]
    code = (
        f"import sys; sys.path[:0] = {paths!r}\n"
        "before = {name for name in sys.modules if name.split('.')[0] == 'triton'}\n"
        "import was_kernels\n"
        "print(sorted({name for name in sys.modules if name.split('.')[0] == 'triton'} - before))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
