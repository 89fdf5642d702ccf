"""Loads and launches kernels by the CUDA driver's C interface, which is public and stable."""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
LOCAL_SIZE = 3  # CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES
# More shared memory than this has to be asked for.
FREE_SHARED = 48 * 1024


@functools.cache
def _library() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    pointer, number = ctypes.c_void_p, ctypes.c_uint
    library.cuModuleLoadData.argtypes = [ctypes.POINTER(pointer), ctypes.c_char_p]
    library.cuModuleGetFunction.argtypes = [ctypes.POINTER(pointer), pointer, ctypes.c_char_p]
    library.cuFuncSetAttribute.argtypes = [pointer, ctypes.c_int, ctypes.c_int]
    library.cuFuncGetAttribute.argtypes = [ctypes.POINTER(ctypes.c_int), ctypes.c_int, pointer]
    library.cuLaunchKernel.argtypes = [pointer, *[number] * 7, pointer, pointer, pointer]
    return library


def check(error: int) -> None:
    """Raises RuntimeError unless a call of the driver went well."""
    if error:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(error, ctypes.byref(text))
        said = (text.value or b"unknown").decode()
        raise RuntimeError(f"CUDA driver: got error {error}: {said}")


class Function:
    """A kernel in the current context, which stays loaded."""

    def __init__(self, cubin: bytes, name: str, shared: int):
        module, function, local = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
        library = _library()
        check(library.cuModuleLoadData(ctypes.byref(module), cubin))
        check(library.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
        if shared > FREE_SHARED:
            check(library.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE, shared))
        check(library.cuFuncGetAttribute(ctypes.byref(local), LOCAL_SIZE, function))
        self.handle, self.shared, self.local_bytes = function.value, shared, local.value


class Launch:
    """A launch with its arguments in place: pointers, which may be changed between launches."""

    def __init__(
        self, function: Function, grid: tuple[int, int, int], threads: int, pointers: Sequence[int]
    ):
        count = len(pointers)
        self.pointers = (ctypes.c_void_p * count)(*pointers)
        first = ctypes.addressof(self.pointers)
        size = ctypes.sizeof(ctypes.c_void_p)
        self._places = (ctypes.c_void_p * count)(*(first + size * i for i in range(count)))
        self._head = (function.handle, *grid, threads, 1, 1, function.shared)
        self._tail = (ctypes.addressof(self._places), None)
        self._launch = _library().cuLaunchKernel

    def __call__(self, stream: int) -> None:
        """Puts the kernel on a stream of the current context."""
        error = self._launch(*self._head, stream, *self._tail)
        if error:
            check(error)
