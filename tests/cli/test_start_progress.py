"""How a start that does not become ready ends for ``remuda serve``."""

import io

import pytest
from rich.console import Console

from cluster.cli.progress import StartProgress
from cluster.errors import StartFailed
from cluster.replica.events import PhaseStarted, Stopped


def progress() -> StartProgress:
    return StartProgress(Console(file=io.StringIO()), num_replicas=1)


def test_a_start_that_was_stopped_is_no_error() -> None:
    assert not progress().follow([PhaseStarted("ray"), Stopped()])


def test_a_control_process_that_dies_without_a_word_is_one() -> None:
    with pytest.raises(StartFailed, match="control process died"):
        progress().follow([PhaseStarted("ray")])
