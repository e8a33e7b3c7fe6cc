"""Compile C++ on the machine that runs it, with the system's own compiler, and keep what was compiled.

The code may call functions of OpenMP (``cpu/threads.h``): it then runs on the threads of the runtime that torch has
loaded, as a second runtime in a process would double the threads. A library is kept under a hash of all that it depends
on and of its own bytes, is moved into its place whole, and is loaded only where those bytes are still there and belong
to this user.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

SOURCES = Path(__file__).resolve().parent / "cpu"

_FLAGS = (
    *("-std=gnu++17", "-O3", "-march=native", "-fPIC", "-w"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-exceptions", "-fno-rtti"),
)
_SECONDS = 120


class HostCompilerError(RuntimeError):
    """There is no compiler, it does not take a source, or what it made cannot be loaded."""


class _Symbol(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def host_library(source: Path, macros: Mapping[str, str], folder: Path | None) -> ctypes.CDLL:
    """The library of ``source``, which may include the headers (``*.h``) beside it, under ``macros``.

    Args:
        source: a C++ file.
        macros: defined before it is read.
        folder: where libraries are kept, made if it is missing; None, or one that cannot be written to: nowhere.

    Raises:
        HostCompilerError: there is no compiler or no OpenMP runtime of torch's, the source is not taken, or no folder
            holds libraries that may be loaded.
    """
    compiler, runtime = _compiler(), openmp_runtime()
    key = _key(source, macros, compiler, runtime)
    kept = None if folder is None else _kept(folder, key)
    if kept is not None:
        return kept
    refusal = "no folder to compile in"
    for place in (folder, Path(tempfile.gettempdir())):
        if place is None:
            continue
        try:
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            work = Path(tempfile.mkdtemp(prefix=".compiling-", dir=place))
        except OSError as error:
            refusal = f"{place}: {error.strerror}"
            continue
        try:
            made = _compiled(source, macros, compiler, runtime, work)
            loaded = ctypes.CDLL(str(made))
            if place == folder:
                made.chmod(0o700)
                made.replace(folder / f"{key}-{_hash(made.read_bytes())}.so")
            return loaded
        except OSError as error:  # the disk is full, or nothing on it may be executed
            refusal = f"{place}: {error.strerror or error}"
        finally:
            shutil.rmtree(work, ignore_errors=True)
    raise HostCompilerError(refusal)


def openmp_runtime() -> Path:
    """The file of the OpenMP runtime that runs torch's threads.

    Raises:
        HostCompilerError: torch has none that code of a C++ compiler could use.
    """
    try:
        process = ctypes.CDLL(None)
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    except (OSError, TypeError) as error:
        raise HostCompilerError(f"torch's library is not found: {error}") from None
    for names in (
        process,
        torch_library,
    ):  # what was loaded before torch, as a server may do, counts first for torch too
        try:
            found = names.GOMP_parallel
        except AttributeError:
            continue
        symbol = _Symbol()
        if process.dladdr(ctypes.cast(found, ctypes.c_void_p), ctypes.byref(symbol)) and symbol.file:
            return Path(os.fsdecode(symbol.file))
    raise HostCompilerError("torch has loaded no OpenMP runtime with the interface of GCC's")


@dataclass(frozen=True)
class _Compiler:
    command: tuple[str, ...]
    version: str


@lru_cache(maxsize=8)
def _answer(words: tuple[str, ...], path: str | None) -> _Compiler | None:
    """The compiler of a command, with PATH as ``path``; None where nothing answers to it."""
    found = shutil.which(words[0], path=path) if words else None
    if found is None:
        return None
    command = (found, *words[1:])
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return _Compiler(command, done.stdout) if done.returncode == 0 else None


def _compiler() -> _Compiler:
    named, path = os.environ.get("CXX"), os.environ.get("PATH")
    for command in ("c++", "g++", "clang++") if named is None else (named,):
        answer = _answer(tuple(shlex.split(command)), path)
        if answer is not None:
            return answer
    if named is not None:
        raise HostCompilerError(f"CXX: {named!r} is no C++ compiler that can be run")
    raise HostCompilerError("no C++ compiler is found (c++, g++ or clang++); install one, or name it in CXX")


def _key(source: Path, macros: Mapping[str, str], compiler: _Compiler, runtime: Path) -> str:
    texts = [file.read_text(encoding="utf-8") for file in (source, *sorted(source.parent.glob("*.h")))]
    return _hash(repr((texts, sorted(macros.items()), _FLAGS, compiler, str(runtime), _processor())).encode())


@lru_cache(maxsize=1)
def _processor() -> str:
    """What ``-march=native`` depends on: a folder of libraries may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    kinds = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU part")
    told = [line for line in lines if line.split(":")[0].strip() in kinds]
    return "\n".join((platform.system(), platform.machine(), platform.processor(), *told))


def _compiled(source: Path, macros: Mapping[str, str], compiler: _Compiler, runtime: Path, work: Path) -> Path:
    """Compile and link into ``work``."""
    library = work / "made.so"
    defined = [f"-D{name}={value}" for name, value in macros.items()]
    _run([*compiler.command, *_FLAGS, *defined, "-shared", str(source), str(runtime), "-o", str(library)])
    return library


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise HostCompilerError(f"{command[0]} took more than {_SECONDS} seconds") from None
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        if "No space left" in done.stderr:
            raise OSError(None, "no space left")
        raise HostCompilerError(f"{command[0]}: {errors[0] if errors else 'failed'}")


def _kept(folder: Path, key: str) -> ctypes.CDLL | None:
    """The library that was kept under ``key``; what is damaged or another user's is passed over."""
    for file in _libraries(folder, key):
        try:
            with file.open("rb") as opened:
                about = os.fstat(opened.fileno())
                own = about.st_uid == os.geteuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
                whole = own and file.stem.split("-")[1] == _hash(opened.read())
            if whole:
                return ctypes.CDLL(str(file))
        except OSError:
            continue
        if own:
            file.unlink(missing_ok=True)
    return None


def _libraries(folder: Path, key: str) -> Iterator[Path]:
    try:
        about = folder.stat()
        if about.st_uid == os.geteuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            yield from sorted(folder.glob(f"{key}-*.so"))
    except OSError:
        return


def _hash(of: bytes) -> str:
    return hashlib.sha256(of).hexdigest()[:32]
