"""What an oracle computed. Knows no transformers: ranks, which are many processes, import it."""

from dataclasses import dataclass
from pathlib import Path

from tests.support.model_driver import Generated

NUM_NEW = 14


@dataclass(frozen=True)
class Reference:
    """A checkpoint, and the oracle's greedy continuation of some prompts."""

    directory: Path
    prompts: list[list[int]]
    generated: list[Generated]
