"""What a check finds: one cell of the table, good or bad, with what to do about it."""

import enum
from collections.abc import Iterable
from dataclasses import asdict, dataclass


class Level(enum.StrEnum):
    """``FAIL``: serving would fail or be of no use. ``WARN``: it works, and is worse than it could be."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """
    Attributes:
        check: a row of the table, for example ``/dev/shm``.
        where: a host's address, or a pair of ranks with theirs.
        value: what was measured, with its unit.
        limit: what it is held against; empty where it is only told.
        remedy: what to change; empty where nothing is to be.
    """

    check: str
    where: str
    level: Level
    value: str
    limit: str = ""
    remedy: str = ""

    def sentence(self) -> str:
        """For people, in one line."""
        limit = f" ({self.limit})" if self.limit else ""
        remedy = f": {self.remedy}" if self.remedy else ""
        return f"{self.check} of {self.where}: {self.value}{limit}{remedy}"

    def as_object(self) -> dict[str, str]:
        return asdict(self)


def of_level(findings: Iterable[Finding], level: Level) -> list[Finding]:
    return [finding for finding in findings if finding.level is level]


def least(value: float, warn_below: float, fail_below: float) -> Level:
    """The level of something of which more is better."""
    return Level.FAIL if value < fail_below else Level.WARN if value < warn_below else Level.OK


def most(value: float, warn_above: float, fail_above: float) -> Level:
    """The level of something of which less is better."""
    return Level.FAIL if value > fail_above else Level.WARN if value > warn_above else Level.OK
