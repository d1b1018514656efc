"""The C++ library of the package (engine/kernels/native), where it was built."""

import ctypes
import functools
from pathlib import Path

_PATH = Path(__file__).parent / "libremuda_native.so"


def is_built() -> bool:
    return _PATH.exists()


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """The library, loaded once; None where the package was built without it. Its calls let other threads run."""
    return ctypes.CDLL(str(_PATH)) if is_built() else None


@functools.cache
def tile_library() -> ctypes.CDLL | None:
    """The same where the CPU has tile units (AMX), for the kernels that are made of them; else None."""
    library = native_library()
    return library if library is not None and library.remuda_has_tiles() else None
