"""``python -m engine.executor.worker_process``: one rank. Its configurations, which hold the gang's secret, come on
standard input: a line for each formation."""

import os
import signal
import sys
import threading
from typing import NoReturn

from engine.errors import RemudaError
from engine.executor.formations import Formations
from engine.executor.worker import run_worker
from engine.executor.worker_config import WorkerConfig

_LEASE_S = 60.0
"""The parent's death ends standard input, and with it the rank; this is for a parent that forgets it."""


def _read(formations: Formations) -> None:
    # Unbuffered: while the thread waits in a buffered read it holds a lock that the interpreter's own end would want.
    with os.fdopen(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as lines:
        for line in lines:
            formations.put(WorkerConfig.decode(line))
    formations.close()


def main() -> int:
    # Ctrl-C is for the leader, which then ends its ranks in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    formations = Formations(_LEASE_S)
    threading.Thread(target=_read, args=(formations,), name="formations", daemon=True).start()
    try:
        run_worker(formations)
    except RemudaError as error:
        print(f"rank failed: {error}", file=sys.stderr)
        return 1
    return 0


def end_process(status: int) -> NoReturn:
    """Without the interpreter's own end: where a thread is still in gloo's destructor (an operation that nobody met
    holds the group until its timeout), that end would terminate the process by SIGABRT, and its status be lost."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    end_process(main())
