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
    and the exit status is 1. It is 2 where the record does not have all that the scheduler saw: it must reach back to
    the engine's start. Needs no model and no device.
    """
    from cluster.simulate.replay import Differs, Recorded, Replay

    recorded = Recorded(file.read_bytes())
    run = Replay(recorded)
    try:
        run.run()
    except Differs as difference:
        for line in recorded.before(difference.line):
            print(line)
        print(f"line {difference.line + 1} differs: {difference}")
        sys.exit(1)
    print(f"{run.num_steps:,} steps in {len(recorded.epochs)} epochs replay exactly: {run.num_tokens:,} tokens")
