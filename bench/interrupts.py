"""A benchmark that is told to end stops the servers that it started."""

import signal
import sys
from collections.abc import Callable
from typing import NoReturn

INTERRUPTED = 130


def run_main(main: Callable[[], int]) -> NoReturn:
    """Ends the process with what ``main`` returns, and with 130 after SIGTERM or Ctrl-C, either of which ``main`` sees
    as KeyboardInterrupt; asyncio's tasks are cancelled before that."""
    # A shell that starts a command in the background without job control has it ignore SIGINT, and asyncio cancels its
    # tasks only where Python's own handler is there.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        status = main()
    except KeyboardInterrupt:
        print("stopped before its end", file=sys.stderr)
        status = INTERRUPTED
    sys.exit(status)
