"""The arrows of the design: who may import whom, and what the folders hold."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import inspect
import re
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
ROOMS = (
    *("errors", "shape", "weight_format", "process", "compensation", "plan"),
    *("vectors", "checkpoints", "texts", "masks", "decode_time", "studies", "coordinator", "service"),
)
"""The core's folders, and the modules beside them, in the order in which they may know of each other."""
OUTER = ("storage", "workers", "kernels", "deploy", "benchmarks", "scripts", "tests")


@dataclass(frozen=True)
class Import:
    """One import: its module, whether it stands inside a function, and whether only type checkers run it."""

    module: str
    inside: bool
    typing_only: bool


@functools.cache
def imports(path: Path) -> tuple[Import, ...]:
    return tuple(_walk(ast.parse(path.read_text(encoding="utf-8")), False, False, _package(path)))


def _package(path: Path) -> list[str]:
    root = next((folder.parent for folder in PACKAGES.values() if path.is_relative_to(folder)), ROOT)
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


def is_service(path: Path) -> bool:
    """Whether the module may import every package: the folder on top, and the two doors to it."""
    core = PACKAGES["was_search"]
    if path in (core / "__init__.py", core / "__main__.py"):  # public names, each when it is asked for; the command
        return True
    return core / "service" in path.parents


def ours(found: Import) -> str:
    top = found.module.split(".")[0]
    return top if top in PACKAGES else ""


EVERY = [(package, path) for package in PACKAGES for path in modules(package)]


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_follow_the_arrows(package):
    for path in modules(package):
        for found in imports(path):
            if ours(found) and ours(found) not in ALLOWED[package]:
                assert is_service(path), f"{identify(path)} imports {found.module}"
                assert found.inside or found.typing_only, f"{identify(path)} imports {found.module} at the top"


def test_nothing_below_imports_the_service():
    for _, path in EVERY:
        if not is_service(path):
            for found in imports(path):
                assert not found.module.startswith("was_search.service"), f"{identify(path)} imports {found.module}"


def test_only_tests_import_tests_and_no_package_imports_benchmarks():
    scripts = [path for folder in ("benchmarks", "scripts") for path in (ROOT / folder).rglob("*.py")]
    for path in [*(path for _, path in EVERY), *scripts]:
        tops = {found.module.split(".")[0] for found in imports(path)}
        assert "tests" not in tops, path
        assert "benchmarks" not in tops or path in scripts, path


TESTED = {
    "was_search": PACKAGES["was_search"],
    **{name: PACKAGES[f"was_{name}"] for name in ("storage", "workers", "kernels")},
    **{name: ROOT / name for name in ("benchmarks", "scripts")},
}
"""Source folders by the name of their tests' folder."""


@pytest.mark.parametrize("name", TESTED)
def test_tests_mirror_the_source(name):
    """A test that is called like a module lies where the module does, every other one in some folder of the source."""
    folders: dict[str, set[Path]] = {}
    for path in TESTED[name].rglob("*.py"):
        folders.setdefault(path.stem, set()).add(path.parent.relative_to(TESTED[name]))
    every = set().union(*folders.values())
    for path in (ROOT / "tests" / name).rglob("test_*.py"):
        there = folders.get(path.stem.removeprefix("test_"), every)
        assert path.parent.relative_to(ROOT / "tests" / name) in there, f"{identify(path)} belongs into {there}"


def room(module: str) -> str:
    """The folder of the core that ``module`` lies in; a module beside the folders is a room of its own."""
    return module.split(".")[1] if module.count(".") else ""


def test_the_rooms_are_the_cores_folders():
    folders = {path.parent.name for path in PACKAGES["was_search"].glob("*/__init__.py")}
    assert folders == set(ROOMS) - {"errors", "shape", "weight_format", "compensation", "plan"}


def test_a_room_imports_only_rooms_before_it():
    """What only type checkers read counts too: whoever reads a room has read what it speaks of."""
    for path in modules("was_search"):
        if not is_service(path):
            mine = ROOMS.index(room(name_of(path)))
            for found in imports(path):
                if ours(found) == "was_search" and found.module.count("."):
                    assert ROOMS.index(room(found.module)) <= mine, f"{identify(path)} imports {found.module}"


def service_imports(path: Path) -> set[str]:
    """Folders of the service, and modules beside them, that a module imports as it runs."""
    found = {i.module for i in imports(path) if not i.typing_only and i.module.startswith("was_search.service.")}
    return {module.split(".")[2] for module in found}


SERVICE = [path for path in modules("was_search") if "service" in path.parts and path.name != "__init__.py"]
ABOVE = {
    "cli": set(),
    "targets": {"cli"},
    "steps": {"cli", "targets"},
    "watching": {"cli", "targets", "steps"},
    "reports": {"cli", "targets", "steps", "watching"},
}
"""Folders of the service that one of them may not import; what lies beside them imports none but reports."""


def test_the_service_has_an_order_inside():
    """Commands know targets, and targets know steps: never the other way, not inside a function either."""
    for path in SERVICE:
        assert not service_imports(path) & ABOVE.get(path.parent.name, ABOVE.keys() - {"reports"}), identify(path)


def test_no_two_parts_of_the_service_know_each_other():
    """Its folders, and the modules beside them: who reads one of them need not have read another first."""
    before: dict[str, set[str]] = {}
    for path in SERVICE:
        part = name_of(path).split(".")[2]
        before.setdefault(part, set()).update(service_imports(path) - {part})
    tuple(graphlib.TopologicalSorter(before).static_order())  # a CycleError names the circle


def name_of(path: Path) -> str:
    """The dotted name of the module in ``path``; of a package's ``__init__`` the package's."""
    *parts, stem = [*_package(path), path.stem]
    return ".".join(parts if stem == "__init__" else [*parts, stem])


def test_no_import_closes_a_circle():
    """Neither at import nor inside a function, where a circle shows only once somebody calls it."""
    by_name = {name_of(path): path for _, path in EVERY if path.name != "__init__.py"}
    before = {
        name: {i.module for i in imports(path) if not i.typing_only and i.module in by_name} - {name}
        for name, path in by_name.items()
    }
    tuple(graphlib.TopologicalSorter(before).static_order())  # a CycleError names the circle


STEPS = [path for path in modules("was_search") if path.parent.name in ("steps", "targets", "watching")]
OPS = sorted(path for path in (PACKAGES["was_kernels"] / "ops").glob("*.py"))


def test_ops_know_nothing_of_ours():
    """An op takes torch, triton and other ops only; what it means in plain torch is part of it."""
    for path in OPS:
        tops = {i.module.split(".")[0] for i in imports(path)} - set(sys.stdlib_module_names)
        assert tops <= {"torch", "triton", "was_kernels"}, identify(path)


def test_ops_are_registered_and_triton_is_imported_in_their_folder_only():
    for path in set(modules("was_kernels")) - set(OPS):
        assert "custom_op(" not in path.read_text(encoding="utf-8"), identify(path)
        assert not any(i.module.split(".")[0] == "triton" for i in imports(path)), identify(path)


def test_the_core_imports_no_server_at_the_top():
    """Reading the core needs no database, no Ray and no GPU."""
    for path in modules("was_search"):
        tops = {i.module.split(".")[0] for i in imports(path) if not i.inside and not i.typing_only}
        assert not tops & {"ray", "sqlalchemy", "alembic", "psycopg2", "triton"}, path


def test_below_the_service_the_core_never_imports_ray():
    """Not even inside a function: the search's loop knows its workers by a contract."""
    for path in modules("was_search"):
        if not is_service(path):
            assert not any(i.module.split(".")[0] == "ray" for i in imports(path)), path


@pytest.mark.parametrize("folder", OUTER)
def test_no_outer_folder_is_a_package(folder):
    """A top-level package called ``kernels`` breaks transformers, which imports whatever has that name."""
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_one(package):
    assert (PACKAGES[package] / "__init__.py").is_file()


def test_no_function_shadows_the_module_it_comes_from():
    """A package's ``__init__`` gives no name of one of its modules: the attribute of that name is the module."""
    for package in PACKAGES:
        for path in modules(package):
            if path.name == "__init__.py":
                given = importlib.import_module(name_of(path))
                stems = {other.stem for other in path.parent.glob("*.py")} - {"__init__", "__main__"}
                assert not stems & set(getattr(given, "__all__", ()))
                assert all(inspect.ismodule(getattr(given, stem)) for stem in stems if stem in vars(given))


def test_no_step_has_the_name_of_its_function():
    """``study`` holds ``search``: so that nobody who imports the one gets the other."""
    for path in STEPS:
        functions = {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if hasattr(node, "name")}
        assert path.stem not in functions, identify(path)


def test_the_guide_names_files_that_exist():
    """Of ``CONTRIBUTING.md``: each as a path from the root, or as the end of one."""
    known = [str(path.relative_to(ROOT)) for folder in (*TESTED, "tests") for path in (ROOT / folder).rglob("*.py")]
    named = re.findall(r"`([\w/]+\.py)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    lost = {name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in known)}
    assert {name for name in lost if "NAME" not in name} == {"utils.py"}  # said to be no name for a file
