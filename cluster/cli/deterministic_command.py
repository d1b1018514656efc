"""What ``--deterministic`` needs of a command line."""

from typing import Any

from typer.core import TyperCommand

from engine.config import Determinism
from engine.errors import InvalidOption


class DeterministicCommand(TyperCommand):
    """Lets ``--deterministic`` stand alone: typer knows no options whose value may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for index, arg in enumerate(args):
            if arg == "--deterministic" and not set(args[index + 1 : index + 2]) & set(Determinism):
                args = [*args[:index], "--deterministic=d1", *args[index + 1 :]]
        return super().parse_args(ctx, args)


def determinism(value: str | None) -> Determinism:
    """Raises InvalidOption."""
    if value is None:
        return Determinism.OFF
    if value not in set(Determinism):
        raise InvalidOption(f"--deterministic {value} is not known; use d1, d2 or off")
    return Determinism(value)
