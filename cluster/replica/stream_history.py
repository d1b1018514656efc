"""All that the engine gave one request, kept by its leader: for a reader that is slow, and for one that comes back."""

from array import array
from collections.abc import Sequence

from cluster.errors import TakenOver
from cluster.replica.attachment import Attachment
from engine.errors import RemudaError
from engine.request import Output, TopLogprobs
from engine.timeline import Waits

_NO_BOUND = 1 << 62


class StreamHistory:
    """What came so far, and how much of it went where. Belongs to the event loop's thread.

    Tokens take 4 bytes each. Those that the reader's credit does not cover wait here. Positions count from the first
    token that was ever generated for the request, also where another leader had it before: so they mean the same to
    whoever comes back for it.

    Args:
        request_id: as the engine knows it.
        is_resumable: its client may come back, so it is not aborted when nobody reads it.
        client_request: what the front end said of it, for whoever goes on with it.
        given: tokens that were generated elsewhere, and that it came with.
        has_logprobs: the engine gives log-probabilities of what it generates. Nobody here has those of ``given``.
    """

    __slots__ = (
        "_attachment",
        "_end",
        "_error",
        "_limit",
        "_logprobs",
        "_num_given",
        "_num_sent",
        "_num_sent_prompt",
        "_prompt_logprobs",
        "_stream",
        "_token_ids",
        "client_request",
        "first_position",
        "is_resumable",
        "kept_until_s",
        "request_id",
    )

    def __init__(
        self,
        request_id: str,
        is_resumable: bool = False,
        client_request: bytes = b"",
        given: Sequence[int] = (),
        has_logprobs: bool = False,
    ) -> None:
        self.request_id = request_id
        self.is_resumable = is_resumable
        self.client_request = client_request
        self.kept_until_s = float("inf")
        """When it may be forgotten, as nobody reads it; set by whoever keeps it."""
        self.first_position = len(given) if has_logprobs else 0
        """From here on a reader can be given all that is due to it."""
        self._num_given = len(given)
        self._token_ids = array("I", given)
        self._logprobs: list[TopLogprobs] = []
        self._prompt_logprobs: list[TopLogprobs | None] = []
        self._end: Output | None = None
        self._error: RemudaError | None = None
        self._attachment: Attachment | None = None
        self._stream = 0
        self._num_sent = 0
        self._num_sent_prompt = 0
        self._limit = 0

    @property
    def num_tokens(self) -> int:
        """Generated, here and before."""
        return len(self._token_ids)

    @property
    def weight(self) -> int:
        """About a quarter of its bytes."""
        entries = [*self._logprobs, *(entry for entry in self._prompt_logprobs if entry is not None)]
        embedding = b"" if self._end is None else self._end.pooled or b""
        num_logprobs = sum(50 + 16 * len(entry.token_ids) for entry in entries)
        return 100 + len(self._token_ids) + num_logprobs + (len(embedding) + len(self.client_request)) // 4

    @property
    def has_reader(self) -> bool:
        return self._attachment is not None

    def attach(
        self, attachment: Attachment, stream: int, num_tokens: int = 0, num_prompt_logprobs: int = 0, window: int = 0
    ) -> None:
        """From now on everything behind this position goes to ``stream``, and nothing to whoever read it before.
        ``window``: tokens until the first credit; 0 is no bound."""
        self.turn_away(TakenOver("another connection goes on reading this request"))
        self._attachment = attachment
        self._stream = stream
        attachment.streams[stream] = self
        self._num_sent, self._num_sent_prompt = num_tokens, num_prompt_logprobs
        self._limit = num_tokens + window if window else _NO_BOUND
        self._send_waiting(attachment)

    def turn_away(self, error: RemudaError) -> None:
        """Whoever reads it gets no more than ``error``."""
        if self._attachment is not None:
            before, number = self._attachment, self._stream
            self.detach()
            before.put_error(number, error)
            before.wake.set()

    def detach(self) -> None:
        """Nobody reads it."""
        if self._attachment is not None:
            self._attachment.streams.pop(self._stream, None)
            self._attachment.forget(self._stream)
        self._attachment = None

    def credit(self, position: int) -> None:
        """Tokens up to this position may be sent."""
        self._limit = max(self._limit, position)
        if self._attachment is not None:
            self._send_waiting(self._attachment)

    def begin(self, waits: Waits) -> None:
        """Its first token comes with this step. Who comes to read it later need not know."""
        if self._attachment is not None:
            self._attachment.put_begun(self._stream, waits)

    def add_token(self, token_id: int) -> None:
        """As ``add`` with an output that has one token and nothing else."""
        token_ids = self._token_ids
        num_before = len(token_ids)
        token_ids.append(token_id)
        attachment = self._attachment
        if attachment is None:
            return
        if self._num_sent != num_before or num_before >= self._limit:
            self._send_waiting(attachment)
            return
        self._num_sent = num_before + 1
        attachment.put_token(self._stream, token_id)

    def add(self, output: Output) -> None:
        """What a step gave. The attachment's ``wake`` is the caller's business."""
        token_ids = self._token_ids
        is_up_to_date = self._num_sent == len(token_ids)
        token_ids.extend(output.token_ids)
        if output.logprobs:
            self._logprobs += output.logprobs
        if output.prompt_logprobs:
            self._prompt_logprobs += output.prompt_logprobs
        if output.finish_reason is not None:
            self._end = output
        attachment = self._attachment
        if attachment is None:
            return
        if not is_up_to_date or len(token_ids) > self._limit:
            self._send_waiting(attachment)
            return
        attachment.put(self._stream, output)
        self._num_sent, self._num_sent_prompt = len(token_ids), len(self._prompt_logprobs)
        if self._end is not None:
            self._leave(attachment)

    def fail(self, error: RemudaError) -> None:
        """It ended with ``error``, which the reader gets behind what it has yet to get."""
        self._error = error
        if self._attachment is not None:
            self._send_waiting(self._attachment)

    def _send_waiting(self, attachment: Attachment) -> None:
        """All that the credit covers, and the end if that is all."""
        start, stop = self._num_sent, min(len(self._token_ids), self._limit)
        prompt = self._prompt_logprobs[self._num_sent_prompt :]
        is_all = stop >= len(self._token_ids)
        end = self._end if is_all else None
        if stop > start or prompt or end is not None:
            attachment.put(self._stream, self._piece(start, max(start, stop), prompt, end))
            self._num_sent, self._num_sent_prompt = max(start, stop), len(self._prompt_logprobs)
        if is_all and self._error is not None:
            attachment.put_error(self._stream, self._error)
        if end is not None or (is_all and self._error is not None):
            self._leave(attachment)

    def _piece(self, start: int, stop: int, prompt: list[TopLogprobs | None], end: Output | None) -> Output:
        return Output(
            self.request_id,
            self._token_ids[start:stop].tolist(),
            finish_reason=end.finish_reason if end is not None else None,
            stop_token_id=end.stop_token_id if end is not None else None,
            logprobs=self._logprobs[max(0, start - self._num_given) : max(0, stop - self._num_given)] or None,
            prompt_logprobs=prompt or None,
            num_cached_tokens=end.num_cached_tokens if end is not None else 0,
            error=end.error if end is not None else None,
            pooled=end.pooled if end is not None else None,
        )

    def _leave(self, attachment: Attachment) -> None:
        """Everything is on its way."""
        attachment.streams.pop(self._stream, None)
        self._attachment = None
