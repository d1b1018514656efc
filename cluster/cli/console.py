"""Where a command that runs for long tells what happens: on the terminal, or in the log."""

import logging
from typing import IO, cast

from rich.console import Console

from cluster.telemetry.logs import LogLines, log_as_json
from engine.errors import InvalidOption


def open_console(log_format: str | None, service: str) -> Console:
    """On standard error. With ``log_format`` ``json`` everything that this process says there, from now on, is a line
    of JSON. ``service`` names the process in it.

    Raises:
        InvalidOption: of another format.
    """
    if log_format in (None, "text"):
        return Console(stderr=True, soft_wrap=True, highlight=False)
    if log_format != "json":
        raise InvalidOption(f"--log-format {log_format}: write text or json")
    log_as_json(service)
    lines = cast(IO[str], LogLines(logging.getLogger("cluster.cli")))
    return Console(file=lines, soft_wrap=True, highlight=False)
