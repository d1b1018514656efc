"""An error that crossed a process border by name becomes the class of our tree again."""

from cluster.errors import ERROR_TABLE, StartFailed
from engine.errors import RemudaError

_CLASSES = {kind.__name__: kind for kind in ERROR_TABLE}


def rebuild_error(kind: str, message: str) -> RemudaError:
    """The error of class ``kind``; StartFailed, naming ``kind``, for a class that is not of our tree."""
    if kind in _CLASSES:
        return _CLASSES[kind](message)
    return StartFailed(f"{kind}: {message}")
