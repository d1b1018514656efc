"""Ends what one formation of a gang communicates with: pending operations at once, from any thread, and then for good.

A rank outlives the formation that it is in. When another rank is lost, its main thread waits in a collective, which no
library interrupts by itself; whoever notices calls ``abort``, and the operation fails within a tenth of a second.
"""

import threading
from typing import Protocol


class Endable(Protocol):
    """A group or a link between ranks."""

    def abort(self) -> None:
        """Pending operations, and all that come, fail soon. From any thread; must not block. Comes once at most, and
        not after ``close``."""
        ...

    def close(self) -> None:
        """Gives everything back. No operation is pending."""
        ...


class FormationEnd:
    """Of one formation; see the module."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._members: list[Endable] = []
        self._has_aborted = False

    @property
    def has_aborted(self) -> bool:
        return self._has_aborted

    def add(self, member: Endable) -> None:
        """What is added after the abort is aborted at once."""
        with self._lock:
            self._members.append(member)
            if self._has_aborted:
                member.abort()

    def abort(self) -> None:
        """May be called more than once, and after ``close``."""
        with self._lock:
            if not self._has_aborted:
                self._has_aborted = True
                for member in self._members:
                    member.abort()

    def close(self) -> None:
        """By the thread that used the members, when it uses them no more."""
        self.abort()
        with self._lock:
            members, self._members = self._members, []
        for member in members:
            member.close()
