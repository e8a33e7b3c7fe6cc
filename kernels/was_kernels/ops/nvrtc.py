"""Compile CUDA C++ at run time with NVRTC, which comes with every CUDA build of PyTorch, and launch it.

No compiler, headers or build step are needed. Launches go to PyTorch's current stream, so that CUDA graphs record
them; they may overlap the end of the kernel before (programmatic dependent launch).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).resolve().parent / "cuda"

_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class NvrtcError(RuntimeError):
    """NVRTC is not there, or does not take a source."""


class _Value(ctypes.Union):
    _fields_ = (("flag", ctypes.c_int), ("padding", ctypes.c_char * 64))


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_char * 4), ("value", _Value))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    )


class CudaKernel:
    """One kernel function on one device."""

    def __init__(self, function: ctypes.c_void_p, device: int) -> None:
        self._function = function
        self._device = device

    def launch(
        self,
        grid: tuple[int, int],
        threads: int,
        arguments: Sequence[Any],
        *,
        overlap: bool = False,
    ) -> None:
        """Enqueue the kernel on its device's current stream, whichever device is the current one.

        Args:
            grid: blocks along x and y.
            threads: threads of a block.
            arguments: ctypes values in the kernel's order, each kept alive until this returns.
            overlap: may start while the kernel before on the stream is still running; it then has to wait itself.
        """
        attributes = (_Attribute * 1)()
        attributes[0].id = _PROGRAMMATIC_STREAM_SERIALIZATION
        attributes[0].value.flag = int(overlap)
        config = _Config(
            (ctypes.c_uint * 3)(*grid, 1),
            (ctypes.c_uint * 3)(threads, 1, 1),
            0,
            torch.cuda.current_stream(self._device).cuda_stream,
            attributes,
            1,
        )
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
        with torch.cuda.device(self._device):
            _require_context(self._device)  # this may be the thread's first call
            _driver_call("cuLaunchKernelEx", ctypes.byref(config), self._function, pointers, None)


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """A kernel's pointer argument; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@lru_cache(maxsize=512)
def _loaded(path: Path, name: str, macros: tuple[tuple[str, int], ...], device: int) -> CudaKernel:
    major, minor = torch.cuda.get_device_capability(device)
    binary = compiled(path, macros, f"sm_{major}{minor}")
    with torch.cuda.device(device):
        _require_context(device)
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _driver_call("cuModuleLoadData", ctypes.byref(module), binary)
        _driver_call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
    return CudaKernel(function, device)


def cuda_kernel(path: Path, name: str, macros: Mapping[str, int], device: int) -> CudaKernel:
    """The kernel ``name`` of the source at ``path`` under ``macros``, compiled once a process, device and macros.

    Raises:
        NvrtcError: NVRTC is not found or does not take the source.
    """
    return _loaded(path, name, tuple(sorted(macros.items())), device)


@lru_cache(maxsize=512)
def compiled(path: Path, macros: tuple[tuple[str, int], ...], architecture: str) -> bytes:
    """The binary of the source at ``path``, which may include the headers (``*.cuh``) beside it; needs no GPU.

    Raises:
        NvrtcError: NVRTC is not found or does not take the source.
    """
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    headers = sorted(path.parent.glob("*.cuh"))
    texts = (ctypes.c_char_p * len(headers))(*(header.read_bytes() for header in headers))
    names = (ctypes.c_char_p * len(headers))(*(header.name.encode() for header in headers))
    made = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), path.read_bytes(), path.name.encode(), len(headers), texts, names
    )
    _check(made, nvrtc)
    try:
        options = [
            f"--gpu-architecture={architecture}",
            "--std=c++17",
            *(f"-D{name}={value}" for name, value in macros),
        ]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), array)
        size = ctypes.c_size_t()
        if status != 0:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise NvrtcError(f"NVRTC refused the kernel for {architecture}: {log.value.decode(errors='replace')}")
        _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), nvrtc)
        binary = ctypes.create_string_buffer(size.value)
        _check(nvrtc.nvrtcGetCUBIN(program, binary), nvrtc)
        return binary.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _check(status: int, nvrtc: ctypes.CDLL) -> None:
    if status != 0:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise NvrtcError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")


@lru_cache(maxsize=1)
def _nvrtc() -> ctypes.CDLL:
    version = torch.version.cuda
    if version is None:
        raise NvrtcError("NVRTC: this PyTorch is not built for CUDA")
    name = f"libnvrtc.so.{version.split('.')[0]}"
    beside = [Path(folder) / "nvidia" for folder in sys.path if folder]
    found = [str(file) for folder in beside if folder.is_dir() for file in sorted(folder.glob(f"*/lib/{name}"))]
    for candidate in (*found, name, "libnvrtc.so"):
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise NvrtcError(f"NVRTC: {name} was not found; install the nvidia-cuda-nvrtc package of PyTorch's CUDA version")


def compiles_here() -> tuple[bool, str]:
    """Whether kernels can be compiled and launched here, and why not in one line."""
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if torch.version.hip is not None or major < 8:
        return False, f"{torch.cuda.get_device_name()}: NVIDIA's compute capability 8.0 is needed, got {major}.{minor}"
    try:
        _nvrtc()
    except NvrtcError as error:
        return False, str(error)
    return True, ""


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _require_context(device: int) -> None:
    """Make the device's context, the one that PyTorch uses, current in this thread if none is."""
    context = ctypes.c_void_p()
    _driver_call("cuCtxGetCurrent", ctypes.byref(context))
    if not context.value:
        _driver_call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        _driver_call("cuCtxSetCurrent", context)


def _driver_call(name: str, *arguments: Any) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status != 0:
        message = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(message))
        raise RuntimeError(f"{name}: {(message.value or b'unknown error').decode()}")
