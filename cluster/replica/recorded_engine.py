"""An engine that notes in the flight record what it is asked for: with the plans and answers that the executor notes,
everything that its scheduler saw."""

from typing import Any

from engine.engine import Engine
from engine.executor.flight_record import FlightRecord
from engine.request import Request


class RecordedEngine(Engine):
    """See Engine. ``options``: its arguments."""

    def __init__(self, record: FlightRecord, **options: Any) -> None:
        super().__init__(**options)
        self._record = record
        record.describe(is_live=self.is_live)

    def is_live(self, request_id: str) -> bool:
        """From any thread."""
        return request_id in self._states

    def add(self, request: Request) -> None:
        super().add(request)
        self._record.request(request)

    def abort(self, request_id: str) -> bool:
        was_live = super().abort(request_id)
        if was_live:
            self._record.event("abort", request_id=request_id)
        return was_live
