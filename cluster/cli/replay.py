"""``remuda replay``: a flight record once more, through the real scheduler."""

import sys
from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = (
    "Examples: remuda status --dump record.jsonl --replica r0 && remuda replay record.jsonl | "
    "remuda replay ~/.local/state/remuda/r0-20260102T030405Z-77.jsonl"
)


def replay(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="As `remuda status --dump` writes it.", exists=True, dir_okay=False)
    ],
) -> None:
    """Do again what a replica did: its requests and its ranks' answers through scheduler, supervisor and journal.

    Every plan that the scheduler makes must be the recorded one. The first that is not is shown with what led there,
    and the exit status is 1. A record that has lost its beginning is replayed from the first state of the engine that
    is left in it. The exit status is 2 where it does not have all that the scheduler saw from there on. Needs no model
    and no device.
    """
    from cluster.simulate.recorded import Recorded
    from cluster.simulate.replay import Differs, Replay

    recorded = Recorded(file.read_bytes())
    run = Replay(recorded)
    try:
        run.run()
    except Differs as difference:
        for line in recorded.before(difference.line):
            print(line)
        print(f"line {difference.line + 1} differs: {difference}")
        sys.exit(1)
    begin = (
        "" if recorded.begin is None else f" from line {recorded.begin[0] + 1} on, where the engine's state is noted"
    )
    num_epochs = len(recorded.epochs)
    print(f"{run.num_steps:,} steps in {num_epochs} epochs replay exactly{begin}: {run.num_tokens:,} tokens")
