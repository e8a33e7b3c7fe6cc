"""Libraries that are compiled here: kept whole, found again, and never loaded where they are damaged or another's."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.fresh_python import run_fresh
from was_kernels.ops import host_compiler
from was_kernels.ops.host_compiler import HostCompilerError, host_library, openmp_runtime

SOURCE = """
#include "answer.h"
extern "C" void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);
static void add(void *found) { __atomic_fetch_add((int *)found, ANSWER, __ATOMIC_RELAXED); }
extern "C" int answer() {
    int found = 0;
    GOMP_parallel(add, &found, 2, 0);
    return found;
}
"""

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source" / "answer.cpp"
    path.parent.mkdir()
    path.write_text(SOURCE)
    path.with_suffix(".h").write_text("static const int ANSWER = VALUE;\n")
    return path


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The compiler's commands."""
    found: list[list[str]] = []
    run = host_compiler._run
    monkeypatch.setattr(host_compiler, "_run", lambda command: found.append(command) or run(command))
    return found


def answer(source: Path, folder: Path | None, value: str = "21") -> int:
    return int(host_library(source, {"VALUE": value}, folder).answer())


def kept(folder: Path) -> list[Path]:
    assert all(path.suffix == ".so" for path in folder.iterdir())  # nothing unfinished stays
    return list(folder.iterdir())


def test_a_library_is_compiled_once(source, tmp_path, commands):
    folder = tmp_path / "some" / "folder"
    assert answer(source, folder) == answer(source, folder) == 42
    assert len(commands) == 1 and len(kept(folder)) == 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_what_it_depends_on_is_in_its_name(source, tmp_path, commands, monkeypatch):
    assert answer(source, tmp_path / "kept") == 42
    assert answer(source, tmp_path / "kept", "4") == 8
    source.with_suffix(".h").write_text("static const int ANSWER = VALUE + 1;\n")
    assert answer(source, tmp_path / "kept") == 44
    monkeypatch.setattr(host_compiler, "_processor", lambda: "another processor")
    assert answer(source, tmp_path / "kept") == 44
    monkeypatch.setenv("CXX", "c++ -g0")
    assert answer(source, tmp_path / "kept") == 44
    assert len(kept(tmp_path / "kept")) == 5 and len(commands) == 5
    assert commands[-1][1] == "-g0"


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_library_is_compiled_anew(damage, source, tmp_path, commands):
    made = tmp_path / "made"
    assert answer(source, made) == 42
    (library,) = kept(made)
    whole = library.read_bytes()
    folder = tmp_path / "kept"  # the loaded file must not be written over
    folder.mkdir(mode=0o700)
    bad = {"cut": whole[:100], "changed": whole[:-1] + bytes([whole[-1] ^ 1]), "empty": b""}[damage]
    (folder / library.name).write_bytes(bad)
    assert answer(source, folder) == 42
    assert len(commands) == 2
    assert [path.stem.split("-")[1] for path in kept(folder)] == [host_compiler._hash(kept(folder)[0].read_bytes())]


@pytest.mark.parametrize("which", ["file", "folder"])
def test_what_others_may_write_to_is_not_loaded(which, source, tmp_path, commands):
    folder = tmp_path / "kept"
    assert answer(source, folder) == 42
    (kept(folder)[0] if which == "file" else folder).chmod(0o777)
    assert answer(source, folder) == 42
    assert len(commands) == 2


def test_another_users_library_is_not_loaded(source, tmp_path, commands, monkeypatch):
    assert answer(source, tmp_path / "kept") == 42
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert answer(source, tmp_path / "kept") == 42
    assert len(commands) == 2


def test_without_a_folder_it_is_compiled_each_time(source, tmp_path, commands):
    (tmp_path / "file").write_text("")
    for folder in (None, tmp_path / "file" / "below"):
        before = len(commands)
        assert answer(source, folder) == 42
        assert len(commands) == before + 1


def test_a_folder_from_which_nothing_may_be_loaded_is_left_for_the_next(source, tmp_path, monkeypatch):
    load = host_compiler.ctypes.CDLL

    def refused(name, *args, **given):
        if name is not None and str(name).startswith(str(tmp_path / "kept")):
            raise OSError("failed to map segment from shared object")
        return load(name, *args, **given)

    monkeypatch.setattr(host_compiler.ctypes, "CDLL", refused)
    assert answer(source, tmp_path / "kept") == 42
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "kept"))
    with pytest.raises(HostCompilerError, match="kept: failed to map segment"):
        answer(source, tmp_path / "kept")
    assert not kept(tmp_path / "kept")


def test_a_full_disk_is_said(source, tmp_path, monkeypatch):
    def full(*args, **given):
        return subprocess.CompletedProcess(
            args, 1, "", "fatal error: error writing to made.so: No space left on device"
        )

    openmp = host_compiler._compiler()
    monkeypatch.setattr(host_compiler, "_compiler", lambda: openmp)
    monkeypatch.setattr(subprocess, "run", full)
    with pytest.raises(HostCompilerError, match="no space left"):
        answer(source, tmp_path / "kept")


def test_processes_may_compile_at_once(source, tmp_path):
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from was_kernels.ops.host_compiler import host_library
print(host_library(Path({str(source)!r}), {{"VALUE": "21"}}, Path({str(tmp_path / "kept")!r})).answer())
"""
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in started] == ["42", "42"]
    assert len(kept(tmp_path / "kept")) == 1


def test_no_compiler_is_said(source, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(HostCompilerError, match=r"no C\+\+ compiler is found .*; install one, or name it in CXX"):
        answer(source, tmp_path / "kept")
    for named in ("", "no-such-compiler", "false"):
        monkeypatch.setenv("CXX", named)
        with pytest.raises(HostCompilerError, match=f"CXX: {named!r} is no C"):
            answer(source, tmp_path / "kept")


def test_a_compiler_that_does_not_answer_is_left(tmp_path, source, monkeypatch):
    fake = tmp_path / "c++"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o700)
    real = shutil.which("g++")
    if real is None:
        pytest.skip("no g++ beside c++")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert host_compiler._compiler().command == (real,)


def test_a_source_that_is_not_taken_is_said_in_a_line(source, tmp_path):
    source.write_text("#error not for you\n")
    with pytest.raises(HostCompilerError, match=r"error: (#error )?not for you") as caught:
        answer(source, tmp_path / "kept")
    assert "\n" not in str(caught.value)
    assert not kept(tmp_path / "kept")


def test_the_runtime_is_torchs_and_the_only_one(source, tmp_path):
    """Threads are those that torch has: one more runtime would bring as many again."""
    run = run_fresh(f"""
        import sys
        sys.path[:0] = {sys.path!r}
        from pathlib import Path
        import torch
        from was_kernels.ops.host_compiler import host_library, openmp_runtime
        torch.set_num_threads(2)
        (torch.ones(400, 400) @ torch.ones(400, 400)).exp()
        def threads():
            return len(list(Path("/proc/self/task").iterdir()))
        before = threads()
        assert host_library(Path({str(source)!r}), {{"VALUE": "21"}}, None).answer() == 42
        assert threads() == before, (threads(), before)
        maps = Path("/proc/self/maps").read_text().split()
        names = {{Path(each).resolve() for each in maps if each.startswith("/") and "omp" in Path(each).name}}
        names = {{each for each in names if each.name.startswith(("libgomp", "libiomp", "libomp"))}}
        assert names == {{openmp_runtime().resolve()}}, names
    """)
    assert run.returncode == 0, run.stderr


def test_a_torch_without_openmp_is_said(monkeypatch):
    class Nothing:
        def __getattr__(self, name):
            raise AttributeError(name)

    monkeypatch.setattr(host_compiler.ctypes, "CDLL", lambda name: Nothing())
    with pytest.raises(HostCompilerError, match="no OpenMP runtime"):
        openmp_runtime()

    def missing(name):
        raise OSError("no such file")

    monkeypatch.setattr(host_compiler.ctypes, "CDLL", missing)
    with pytest.raises(HostCompilerError, match="torch's library is not found: no such file"):
        openmp_runtime()
