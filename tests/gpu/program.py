"""A CUDA program without a CUDA toolkit, run as a process: it takes a context on its first device, then obeys its input.

It prints `ready MIB`, the memory that CUDA says the device has; `allocate MIB` prints `ok`, or CUDA's error code (2 is
"out of memory", cuda.h); it ends with its input, and with status 1 where CUDA fails before that.
"""

from __future__ import annotations

import ctypes
import sys


def main() -> int:
    cuda = ctypes.CDLL("libcuda.so.1")
    device, context, free, total = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    for name, *arguments in (
        ("cuInit", 0),
        ("cuDeviceGet", ctypes.byref(device), 0),
        ("cuDevicePrimaryCtxRetain", ctypes.byref(context), device),
        ("cuCtxSetCurrent", context),
        ("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total)),
    ):
        if error := getattr(cuda, name)(*arguments):
            print(f"{name} {error}", flush=True)  # noqa: T201  it is a program
            return 1
    print(f"ready {total.value >> 20}", flush=True)  # noqa: T201
    for line in sys.stdin:
        _, mib = line.split()
        error = cuda.cuMemAlloc_v2(ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(int(mib) << 20))
        print(error or "ok", flush=True)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
