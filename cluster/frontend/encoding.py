"""What comes of a request before it is admitted to a replica, off the event loop: prompts to token ids, and whether
its grammar can be followed."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cluster.frontend.calls import ChatPrompt, Prompt, StructuredOutput, TextPrompt, TokenPrompt
from cluster.frontend.fair_threads import FairThreads
from cluster.frontend.infilling import Infilling
from cluster.frontend.sampling import check_token_ids
from cluster.frontend.tokenizer import Tokenizer
from engine.config import GrammarBackend
from engine.errors import ContextLengthExceeded, InvalidRequest
from engine.grammar import check_grammar, further_check

_LONG_CHARS = 50_000
"""From here on a text takes tens of milliseconds."""


class PromptEncoder:
    """Long texts have a thread of their own, so that short ones never wait behind them; and grammars, which take
    seconds, two. Tenants take turns at all of them.

    Args:
        tokenizer: shared by the threads.
        vocab_size: the model's; ids must be below it.
        grammar_backend: what follows grammars on the replicas.

    Raises:
        InvalidOption: the backend is not installed.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, grammar_backend: GrammarBackend = GrammarBackend.LLGUIDANCE
    ) -> None:
        further_check(grammar_backend)  # now: no request is to wait for what it imports
        self._grammar_backend = grammar_backend
        self.tokenizer = tokenizer
        self.infilling = Infilling(tokenizer)
        self.vocab_size = vocab_size
        self._short = FairThreads(2, "encode")
        self._long = FairThreads(1, "encode-long")
        self._grammars = FairThreads(2, "grammars")

    def close(self) -> None:
        """Ends the threads; what they are at is finished first."""
        self._short.close()
        self._long.close()
        self._grammars.close()

    async def check_structured(self, wish: StructuredOutput) -> None:
        """Raises InvalidRequest where the replicas could not follow it."""
        await self._grammars.run(check_grammar, wish.grammar, wish.param, self._grammar_backend)

    async def encode(self, prompt: Prompt, max_tokens: int | None = None, *, truncates: bool = False) -> list[int]:
        """The prompt's ids.

        Args:
            prompt: text, ids or messages.
            max_tokens: a text that must give more than this is refused without being encoded.
            truncates: it is not; text and ids are cut to ``max_tokens`` instead.

        Raises:
            InvalidRequest: an empty prompt, ids that the model does not have, messages that the template refuses.
            ContextLengthExceeded: see ``max_tokens``.
        """
        if truncates and max_tokens is not None:
            if isinstance(prompt, TextPrompt):
                prompt = replace(prompt, text=self.tokenizer.enough_of(prompt.text, max_tokens))
            return (await self.encode(prompt))[:max_tokens]
        if isinstance(prompt, TokenPrompt):
            token_ids = list(prompt.token_ids)
            check_token_ids(token_ids, self.vocab_size, "prompt")
        else:
            threads = self._long if _num_chars(prompt) >= _LONG_CHARS else self._short
            token_ids = await threads.run(self._encode_now, prompt, max_tokens)
        if not token_ids:
            raise InvalidRequest("prompt must not be empty", _param(prompt))
        return token_ids

    def _encode_now(self, prompt: TextPrompt | ChatPrompt, max_tokens: int | None) -> list[int]:
        tokenizer = self.tokenizer
        if isinstance(prompt, TextPrompt):
            if not prompt.text and not prompt.suffix and not prompt.add_special_tokens:
                return []
            _check_length(tokenizer.fewest_tokens(prompt.text + prompt.suffix), max_tokens)
            if prompt.suffix:
                return self.infilling.encode(prompt.text, prompt.suffix, prompt.add_special_tokens)
            return tokenizer.encode(prompt.text, prompt.add_special_tokens, prompt.parse_special_tokens)
        text = tokenizer.render_chat(prompt.messages, prompt.add_generation_prompt, prompt.variables, prompt.tools)
        # Of the template's output: it may leave out what the client wrote, and write what the client did not.
        _check_length(tokenizer.fewest_tokens(text), max_tokens)
        return tokenizer.encode(text, prompt.add_special_tokens)


def _check_length(fewest: int, max_tokens: int | None) -> None:
    if max_tokens is not None and fewest > max_tokens:
        raise ContextLengthExceeded(
            f"this model's maximum context length is {max_tokens} tokens, but the prompt has at least {fewest};"
            " shorten it",
            "prompt",
        )


def _num_chars(value: Any) -> int:
    """All that a prompt's encoding may have to go through."""
    if isinstance(value, TextPrompt):
        return len(value.text) + len(value.suffix)
    if isinstance(value, ChatPrompt):
        return _num_chars(value.messages) + _num_chars(value.variables) + _num_chars(value.tools)
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_num_chars, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_num_chars, value))
    return 1


def _param(prompt: Prompt) -> str:
    return "messages" if isinstance(prompt, ChatPrompt) else "prompt"
