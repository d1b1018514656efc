"""A process that serves gives large blocks back, however large ones it had before."""

import subprocess
import sys

import pytest

CODE = """
import ctypes, sys
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def take(num_bytes):
    block = libc.malloc(num_bytes)
    libc.memset(block, 1, num_bytes)
    return block

def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

if sys.argv[1] == "settled":
    from cluster.replica.heap import settle_heap
    settle_heap()
libc.free(take(24 << 20))
before = resident_bytes()
blocks = [take(4 << 20) for _ in range(8)]
for block in blocks:
    libc.free(block)
print(resident_bytes() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
@pytest.mark.parametrize("is_settled", [True, False])
def test_what_large_requests_took_is_given_back(is_settled: bool) -> None:
    """Without it glibc keeps all of the 32 MiB."""
    command = [sys.executable, "-c", CODE, "settled" if is_settled else "plain"]
    kept_bytes = int(subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout)
    assert (kept_bytes < 8 << 20) == is_settled, kept_bytes
