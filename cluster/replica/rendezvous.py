"""Where a gang's ranks find each other: one key-value store per gang and epoch, kept by the supervisor, because any
rank, rank 0 too, may be the one that is lost."""

import socket
from datetime import timedelta

import torch.distributed as dist


class Rendezvous:
    """A TCPStore that listens on one address only. torch's own listener would take every interface.

    Args:
        host: address of this host that all ranks reach.
        timeout_s: longest wait of any rank for a key.
    """

    def __init__(self, host: str, timeout_s: float = 120.0) -> None:
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.host = host
        self.port: int = listener.getsockname()[1]
        self._store: dist.TCPStore | None = dist.TCPStore(
            host,
            self.port,
            None,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )

    def close(self) -> None:
        """Closes the listener; the store's destructor is its only way to stop."""
        self._store = None
