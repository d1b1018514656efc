"""One choice: the engine's outputs → text, held back where it must be, in deltas as large as what has arrived."""

from collections.abc import Sequence

from cluster.frontend.calls import Delta, Echo, Finished, ToolCallDelta
from cluster.frontend.detokenizer import Detokenizer
from cluster.frontend.stop_strings import StopStrings
from cluster.frontend.tools.parser import Piece, ToolCallParser
from engine.request import FinishReason, Output, TopLogprobs
from engine.timeline import Waits


class EchoedPrompt:
    """The prompt as the first part of a choice's text.

    Args:
        text: what is shown.
        token_ids: all of the prompt's.
        text_offsets: where each begins in ``text``.
        waits_for_logprobs: whether the engine was asked for the prompt's log-probabilities.
    """

    def __init__(
        self, text: str, token_ids: Sequence[int], text_offsets: Sequence[int], waits_for_logprobs: bool
    ) -> None:
        self.text = text
        self.token_ids = token_ids
        self.text_offsets = text_offsets
        self.waits_for_logprobs = waits_for_logprobs


class Choice:
    """Args:
    index: the choice's number in the client's request.
    detokenizer: set up with the prompt as its context.
    stops: strings that end the text.
    min_tokens: stop strings are looked for only after so many tokens.
    wants_logprobs: whether the engine gives log-probabilities of generated tokens.
    echo: the prompt, where it is shown.
    scores_only: what the engine generates is thrown away (``max_tokens`` 0).
    tools: finds the tool calls in what the stop strings leave of the text.
    """

    def __init__(
        self,
        index: int,
        detokenizer: Detokenizer,
        stops: StopStrings,
        min_tokens: int = 0,
        wants_logprobs: bool = False,
        echo: EchoedPrompt | None = None,
        scores_only: bool = False,
        tools: ToolCallParser | None = None,
    ) -> None:
        self.index = index
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finished: Finished | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        """When tokens came, for whoever measures."""
        self.waits: Waits | None = None
        """Before the first of them, at the replica that gave it."""
        self._detokenizer = detokenizer
        self._stops = stops
        self._min_tokens = min_tokens
        self._echo = echo
        self._scores_only = scores_only
        self._tools = tools
        self._tool_calls: list[ToolCallDelta] = []
        self._prompt_logprobs: list[TopLogprobs | None] = []
        self._text: list[str] = []
        self._num_chars = 0
        """Decoded, shown or not."""
        self._num_shown = 0
        """Past the stop strings: text, or a tool call's, or held back until it shows which."""
        self._token_ids: list[int] = []
        self._offsets: list[int] = []
        self._ends: list[int] = []
        """Of each token not given away yet: one past its last character."""
        self._logprobs: list[TopLogprobs] | None = [] if wants_logprobs else None
        self._position = 0

    @property
    def num_unread(self) -> int:
        """Tokens that ``take_delta`` has yet to give."""
        return len(self._token_ids)

    def feed(self, output: Output) -> None:
        """Take one output; ``finished`` is set when it was the last one, or when a stop string is complete."""
        assert self.finished is None, "an output after the end"
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        if output.prompt_logprobs:
            self._prompt_logprobs += output.prompt_logprobs
        if output.pooled is not None:
            self.finished = Finished(self.index, FinishReason.STOP, pooled=output.pooled)
            return
        if self._scores_only:
            if output.token_ids or output.finish_reason is not None:
                self.finished = Finished(self.index, FinishReason.LENGTH)
            return
        if not self._feed_plain(output) and self._feed_each(output):
            return
        if output.finish_reason is not None:
            self._finish(output.finish_reason, output.stop_token_id)

    def _feed_plain(self, output: Output) -> bool:
        """All tokens in one go, where nothing is to be known of each: no log-probabilities with their offsets, nothing
        looked for in the text, no unfinished character. False: nothing was done."""
        if self._logprobs is not None or self._tools is not None or self._stops.looks_for_any:
            return False
        token_ids = output.token_ids
        text = self._detokenizer.feed_whole(token_ids if output.stop_token_id is None else token_ids[:-1])
        if text is None:
            return False
        self._offsets += [self._num_chars] * len(token_ids)
        self.num_tokens += len(token_ids)
        self._token_ids += token_ids
        self._num_chars += len(text)
        self._ends += [self._num_chars] * len(token_ids)
        self._show(text)
        return True

    def _feed_each(self, output: Output) -> bool:
        """Whether the text has come to its end, with a stop string or a tool call."""
        last = len(output.token_ids) - 1
        for index, token_id in enumerate(output.token_ids):
            is_silent = index == last and output.stop_token_id is not None
            self._add_token(token_id, is_silent)
            if self._logprobs is not None and output.logprobs:
                self._logprobs.append(output.logprobs[index])
            if self._stops.matched is not None or (self._tools is not None and self._tools.is_done):
                self._end(FinishReason.STOP, None)
                return True
        return False

    def _add_token(self, token_id: int, is_silent: bool) -> None:
        """A silent token ends the sequence: it counts, and its text is not part of the answer."""
        text = "" if is_silent else self._detokenizer.feed(token_id)
        self.num_tokens += 1
        self._token_ids.append(token_id)
        self._offsets.append(self._num_chars)
        self._num_chars += len(text)
        self._ends.append(self._num_chars + self._detokenizer.is_inside_character)
        if text:
            self._show(text if self.num_tokens <= self._min_tokens else self._stops.feed(text))

    def _show(self, text: str) -> None:
        if not text:
            return
        self._num_shown += len(text)
        if self._tools is None:
            self._text.append(text)
        elif not self._tools.is_done:
            self._sort(self._tools.feed(text))

    def _sort(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if isinstance(piece, str):
                self._text.append(piece)
            else:
                self._tool_calls.append(piece)

    def _finish(self, reason: FinishReason, stop_token_id: int | None) -> None:
        if tail := self._detokenizer.finish():
            self._show(self._stops.feed(tail))
        if self._stops.matched is not None:
            self._end(FinishReason.STOP, None)
            return
        self._show(self._stops.finish())
        self._end(reason, stop_token_id)

    def _end(self, reason: FinishReason, stop_token_id: int | None) -> None:
        calls_tools = False
        if self._tools is not None:
            self._sort(self._tools.finish())
            calls_tools = self._tools.has_only_complete_calls
        self.finished = Finished(self.index, reason, self._stops.matched, stop_token_id, calls_tools)

    def take_echo(self) -> Echo | None:
        """The prompt, once, as soon as it is complete."""
        echo = self._echo
        if echo is None:
            return None
        is_scored = len(self._prompt_logprobs) >= len(echo.token_ids)
        if echo.waits_for_logprobs and not is_scored and not self._token_ids and self.finished is None:
            return None
        self._echo = None
        logprobs = self._prompt_logprobs if echo.waits_for_logprobs else None
        return Echo(self.index, echo.text, echo.token_ids, logprobs, echo.text_offsets)

    def take_delta(self) -> Delta | None:
        """Everything since the last call that can be shown."""
        num_ready = len(self._ends)
        if self.finished is None:
            while num_ready and self._ends[num_ready - 1] > self._num_shown:
                num_ready -= 1
        if not num_ready and not self._text and not self._tool_calls:
            return None
        logprobs = None
        if self._logprobs is not None:
            logprobs, self._logprobs = self._logprobs[:num_ready], self._logprobs[num_ready:]
        delta = Delta(
            self.index,
            "".join(self._text),
            self._token_ids[:num_ready],
            logprobs,
            self._position,
            self._offsets[:num_ready],
            tuple(self._tool_calls),
        )
        self._position += num_ready
        self._text.clear()
        self._tool_calls.clear()
        del self._token_ids[:num_ready], self._offsets[:num_ready], self._ends[:num_ready]
        return delta
