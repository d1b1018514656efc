"""Where a gang's ranks find each other: one key-value store per gang and epoch, kept by the supervisor, because any
rank, rank 0 too, may be the one that is lost."""

import torch.distributed as dist

from engine.parallel.store import serve_store


class Rendezvous:
    """A TCPStore that listens on one address only.

    Args:
        host: address of this host that all ranks reach.
        timeout_s: longest wait of any rank for a key.
    """

    def __init__(self, host: str, timeout_s: float = 120.0) -> None:
        self.host = host
        self._store: dist.TCPStore | None = serve_store(host, timeout_s)
        self.port: int = self._store.port

    def close(self) -> None:
        """Closes the listener; the store's destructor is its only way to stop."""
        self._store = None
