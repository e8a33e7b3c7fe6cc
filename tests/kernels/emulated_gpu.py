"""Run the CUDA sources on a CPU: ``cuda/*.cu`` as C++, with stand-ins for what only a GPU has (``emulated_gpu.h``).

Nothing of the sources' arithmetic, indexing or order is replaced: only functions with inline assembly are, each by the
one below with its name. Launches are those of the real Python code; blocks run one after another, in any order wanted
in which none waits for a later one.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HEADER = Path(__file__).with_suffix(".h")

COMPILER = shutil.which("g++")

STAND_INS = {
    "widen": """
#if BF16
    return __uint_as_float((u32)v << 16);
#else
    return (float)same_bits<_Float16>(v);
#endif""",
    "narrow": """
#if BF16
    u32 bits = same_bits<u32>(v);
    return v != v ? 0x7fff : (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#else
    return same_bits<u16>((_Float16)v);
#endif""",
    "wait_for_input": "",
    "let_next_start": "",
    "arrives_last": "return __atomic_fetch_add(counter, 1, __ATOMIC_SEQ_CST) == total - 1;",
    "read_share": "return *(const volatile u32*)from;",
    "write_share": "*(volatile u32*)to = bits;",
    "read_once": "return 0;",
    "fetch_line": "(void)*(const volatile float*)p;",
    "stream": "return aligned_read(p);",
    "stream_words": """
    if ((uintptr_t)p % sizeof(Words)) __builtin_trap();
    return *reinterpret_cast<const Words*>(p);""",
    "half_low": "return (float)same_bits<_Float16>((u16)v);",
    "half_high": "return (float)same_bits<_Float16>((u16)(v >> 16));",
    "multiply": "matrix_product(sums, weights, input0, input1, [](u16 v) { return widen(v); });",
}
"""Bodies of the functions that hold inline assembly."""

_FUNCTION = re.compile(r"__device__ __forceinline__ [^;{]*?\b(\w+)\([^{;]*\) \{")


class EmulatedGpu:
    """Compiles sources into ``folder`` and runs them; takes the place of :func:`was_kernels.ops.nvrtc.cuda_kernel`.

    Attributes:
        seed: of the order in which a launch's blocks run.
        launches: (kernel, macros, grid) of every launch so far.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._libraries: dict[str, ctypes.CDLL] = {}
        self.seed = 0
        self.launches: list[tuple[str, dict[str, int], tuple[int, int]]] = []

    def kernel(self, path: Path, name: str, macros: Mapping[str, int], device: int) -> _Kernel:
        text = translated(path, name)
        key = hashlib.sha256(f"{text}{sorted(macros.items())}".encode()).hexdigest()[:16]
        if key not in self._libraries:
            source, library = self._folder / f"{key}.cpp", self._folder / f"{key}.so"
            source.write_text(text)
            given = [f"-D{macro}={value}" for macro, value in macros.items()]
            options = ["-std=c++20", "-O1", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-w", "-include", str(HEADER)]
            assert COMPILER is not None
            subprocess.run([COMPILER, *options, *given, str(source), "-o", str(library)], check=True)
            self._libraries[key] = ctypes.CDLL(str(library))
        return _Kernel(self, name, dict(macros), self._libraries[key])


class _Kernel:
    def __init__(self, gpu: EmulatedGpu, name: str, macros: dict[str, int], library: ctypes.CDLL) -> None:
        self._gpu = gpu
        self._name = name
        self._macros = macros
        self._library = library

    def launch(self, grid: tuple[int, int], threads: int, arguments: Sequence[Any], *, overlap: bool = False) -> None:
        self._gpu.launches.append((self._name, self._macros, grid))
        order = np.random.default_rng(self._gpu.seed).permutation(grid[0] * grid[1]).astype(np.int32)
        if self._name == "gather_gemv":  # blocks of the last share wait for others, which a GPU starts before them
            waits = order >= grid[0] * (grid[1] - 1)
            order = np.concatenate((order[~waits], np.sort(order[waits])))
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
        self._library.launch(pointers, *grid, threads, order.ctypes.data_as(ctypes.c_void_p))


def translated(path: Path, name: str) -> str:
    """The source at ``path`` for a C++ compiler, with ``launch`` to run its kernel ``name``."""
    text = re.sub(r'#include "(\w+\.cuh)"', lambda found: (path.parent / found[1]).read_text(), path.read_text())
    text = _without_assembly(text.replace('asm volatile("trap;")', "__builtin_trap()")).replace('extern "C"', "static")
    plain = re.sub(r"//[^\n]*", "", text)
    parameters = re.search(rf"\b{name}\(([^{{]*)\) \{{", plain)
    assert parameters is not None
    types = [re.sub(r"__\w+__", "", each).rsplit(None, 1)[0].strip() for each in parameters[1].split(",")]
    values = [f"*reinterpret_cast<{kind.strip()}*>(arguments[{i}])" for i, kind in enumerate(types)]
    return f"""{text}
extern "C" void launch(void** arguments, int width, int height, int n_threads, const int* order) {{
    run_grid([=] {{ {name}({", ".join(values)}); }}, width, height, n_threads, order);
}}
"""


def _without_assembly(text: str) -> str:
    """Give every function with inline assembly its stand-in's body."""
    done, at = "", 0
    for found in _FUNCTION.finditer(text):
        end = found.end() + _length_of_body(text[found.end() :])
        if re.search(r"\basm\b", text[found.end() : end]):
            done += text[at : found.end()] + STAND_INS[found[1]] + "\n"
            at = end
    return done + text[at:]


def _length_of_body(text: str) -> int:
    """Characters up to the brace that closes what is open at the start of ``text``; assembly has balanced braces."""
    depth = 1
    for i, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return i
    raise ValueError("a function without an end")
