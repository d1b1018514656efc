"""``python -m engine.executor.worker_process``: one rank; its configuration comes on standard input, for it holds the
gang's secret."""

import signal
import sys

from engine.errors import RemudaError
from engine.executor.worker import run_worker
from engine.executor.worker_config import WorkerConfig


def main() -> int:
    # Ctrl-C is for the leader, which then ends its ranks in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run_worker(WorkerConfig.decode(sys.stdin.buffer.read()))
    except RemudaError as error:
        print(f"rank failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
