"""OpenAI's streaming ``/v1/completions`` and ``/v1/chat/completions``, of any server."""

import os
import time
from typing import Any, Self

import aiohttp
import msgspec

from cluster.bench.target import LoadRequest
from cluster.bench.timing import Timing
from cluster.errors import ModelNotFound, ServingError, Unauthenticated, Unavailable
from engine.errors import InvalidOption

_LINE_BYTES = 1 << 20
_MAX_WORDS = 300
"""Characters of a server's error that are shown."""


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    @property
    def has_output(self) -> bool:
        """Of completions a chunk without text is a token whose text is not complete yet, unless it is the last one."""
        if self.delta is None:
            return bool(self.text) or self.finish_reason is None
        return bool(self.delta.content or self.delta.reasoning_content or self.delta.reasoning or self.delta.tool_calls)


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Event)


class HttpTarget:
    """One pool of connections without a bound. Answers are greedy and, with ``ignore_eos``, of full length."""

    def __init__(
        self, session: aiohttp.ClientSession, base_url: str, model: str, *, chat: bool, ignore_eos: bool = True
    ) -> None:
        """``base_url``: up to and with ``/v1``."""
        self._session = session
        self._url = f"{base_url}/{'chat/completions' if chat else 'completions'}"
        self._chat = chat
        self._options: dict[str, Any] = {"ignore_eos": True} if ignore_eos else {}
        self.model = model

    @classmethod
    async def open(
        cls,
        url: str,
        model: str = "",
        *,
        chat: bool = False,
        api_key: str | None = None,
        ignore_eos: bool = True,
        keep_alive: bool = True,
    ) -> Self:
        """``url``: the server's, with or without ``/v1``. Without ``model`` the only one that it serves is taken.

        Without ``keep_alive`` each request has a connection of its own. Raises Unavailable, Unauthenticated,
        InvalidOption.
        """
        base_url = url.rstrip("/").removesuffix("/v1") + "/v1"
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=not keep_alive),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=30),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            read_bufsize=_LINE_BYTES,
        )
        try:
            model = model or await _only_model(session, base_url)
        except BaseException:
            await session.close()
            raise
        return cls(session, base_url, model, chat=chat, ignore_eos=ignore_eos)

    async def run(self, request: LoadRequest, timing: Timing) -> None:
        body = {
            "model": self.model,
            "max_tokens": request.num_output,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._options,
        }
        if self._chat:
            body["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            body["prompt"] = request.prompt
        encoded = msgspec.json.encode(body)
        timing.sent_s = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        try:
            async with self._session.post(self._url, data=encoded, headers=headers) as response:
                if response.status != 200:
                    raise _refusal(self._url, response.status, await response.text())
                async for line in response.content:
                    if line.startswith(b"data:") and (event := line[5:].strip()) != b"[DONE]":
                        _take_event(timing, event)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise _broken(self._url, error) from error
        if not timing.chunks_s and not timing.is_counted:
            raise ServingError(f"{self._url} ended the stream without a token")
        timing.finish(time.perf_counter())

    async def close(self) -> None:
        await self._session.close()


def _take_event(timing: Timing, encoded: bytes) -> None:
    now_s = time.perf_counter()
    event = _decoder.decode(encoded)
    if event.error:
        raise ServingError(f"the stream ended with an error: {_message(event.error)}")
    if event.choices and event.choices[0].has_output:
        timing.chunks_s.append(now_s)
    if event.usage is not None:
        timing.num_input, timing.num_output = event.usage.prompt_tokens, event.usage.completion_tokens
        details = event.usage.prompt_tokens_details
        timing.num_cached = (details.cached_tokens or 0) if details else 0
        timing.is_counted = True


async def _only_model(session: aiohttp.ClientSession, base_url: str) -> str:
    url = f"{base_url}/models"
    try:
        async with session.get(url) as response:
            text = await response.text()
            if response.status != 200:
                raise _refusal(url, response.status, text)
            # An adapter names the model that it belongs to.
            names = [str(each["id"]) for each in msgspec.json.decode(text)["data"] if not each.get("parent")]
    except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError, KeyError, TypeError) as error:
        raise _broken(url, error) from error
    if len(names) != 1:
        raise InvalidOption(f"{base_url} serves {', '.join(names) or 'no model'}; choose one with --model")
    return names[0]


def _broken(url: str, error: Exception) -> ServingError:
    if isinstance(error, aiohttp.ClientConnectorError):
        number = error.os_error.errno or 0
        reason = os.strerror(number) if number > 0 else error.os_error
        return Unavailable(f"no server answers at {url} ({reason}); start one, or give --target URL")
    return ServingError(f"{url} did not answer as OpenAI's API does: {type(error).__name__}: {error}")


def _refusal(url: str, status: int, text: str) -> ServingError:
    try:
        answer = msgspec.json.decode(text)
    except msgspec.DecodeError:
        answer = text
    message = (
        f"{url} answered {status}: {_message(answer.get('error', answer) if isinstance(answer, dict) else answer)}"
    )
    if status in (401, 403):
        return Unauthenticated(f"{message}; give --api-key-file FILE")
    return ModelNotFound(message) if status == 404 else ServingError(message)


def _message(error: Any) -> str:
    """OpenAI's errors are objects with a message; some servers send a string."""
    words = error.get("message", error) if isinstance(error, dict) else error
    return str(words)[:_MAX_WORDS]
