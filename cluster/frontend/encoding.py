"""Prompts to token ids, off the event loop."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from cluster.frontend.calls import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from cluster.frontend.sampling import check_token_ids
from cluster.frontend.tokenizer import Tokenizer
from engine.errors import ContextLengthExceeded, InvalidRequest

_LONG_CHARS = 50_000
"""From here on a text takes tens of milliseconds."""


class PromptEncoder:
    """Long texts have a thread of their own, so that short ones never wait behind them.

    Args:
        tokenizer: shared by the threads.
        vocab_size: the model's; ids must be below it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._short = ThreadPoolExecutor(2, thread_name_prefix="encode")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="encode-long")

    def close(self) -> None:
        """Ends the threads; what they are at is finished first."""
        self._short.shutdown()
        self._long.shutdown()

    async def encode(self, prompt: Prompt, max_tokens: int | None = None) -> list[int]:
        """The prompt's ids.

        Args:
            prompt: text, ids or messages.
            max_tokens: a text that must give more than this is refused without being encoded.

        Raises:
            InvalidRequest: an empty prompt, ids that the model does not have, messages that the template refuses.
            ContextLengthExceeded: see ``max_tokens``.
        """
        if isinstance(prompt, TokenPrompt):
            token_ids = list(prompt.token_ids)
            check_token_ids(token_ids, self.vocab_size, "prompt")
        else:
            num_chars = _num_chars(prompt)
            self._check_length(num_chars, max_tokens)
            pool = self._long if num_chars >= _LONG_CHARS else self._short
            token_ids = await asyncio.get_running_loop().run_in_executor(pool, self._encode_now, prompt)
        if not token_ids:
            raise InvalidRequest("prompt must not be empty", _param(prompt))
        return token_ids

    def _encode_now(self, prompt: TextPrompt | ChatPrompt) -> list[int]:
        if isinstance(prompt, TextPrompt):
            if not prompt.text and not prompt.add_special_tokens:
                return []
            return self.tokenizer.encode(prompt.text, prompt.add_special_tokens, prompt.parse_special_tokens)
        return self.tokenizer.encode_chat(
            prompt.messages, prompt.add_generation_prompt, prompt.variables, prompt.add_special_tokens
        )

    def _check_length(self, num_chars: int, max_tokens: int | None) -> None:
        fewest = self.tokenizer.fewest_tokens(num_chars)
        if max_tokens is not None and fewest > max_tokens:
            raise ContextLengthExceeded(
                f"this model's maximum context length is {max_tokens} tokens, but the prompt has at least {fewest};"
                " shorten it",
                "prompt",
            )


def _num_chars(prompt: TextPrompt | ChatPrompt) -> int:
    """Characters that surely become part of the prompt, or nearly so for messages (a template may trim them)."""
    if isinstance(prompt, TextPrompt):
        return len(prompt.text)
    return sum(len(str(message.get("content", ""))) for message in prompt.messages)


def _param(prompt: Prompt) -> str:
    return "messages" if isinstance(prompt, ChatPrompt) else "prompt"
