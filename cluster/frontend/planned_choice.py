"""What takes the engine's answer to a planned prompt: its choices, and the prompt as the first part of their text."""

from cluster.frontend.calls import Call, TextPrompt
from cluster.frontend.choice import Choice, EchoedPrompt
from cluster.frontend.detokenizer import Detokenizer
from cluster.frontend.run import Planned
from cluster.frontend.stop_strings import StopStrings
from cluster.frontend.token_bytes import TokenBytes
from cluster.frontend.tools.parser import ToolCallParser


def choice_of(
    index: int, plan: Planned, call: Call, echo: EchoedPrompt | None, table: TokenBytes, tool_token_ids: frozenset[int]
) -> Choice:
    """``table``: the tokenizer's bytes. ``tool_token_ids``: control tokens that calls of tools are written with."""
    return Choice(
        index,
        Detokenizer(table, plan.token_ids, tool_token_ids if call.tools else frozenset()),
        StopStrings(call.stop),
        min_tokens=plan.sampling.min_tokens,
        wants_logprobs=plan.sampling.logprobs is not None,
        echo=echo,
        scores_only=call.options.max_tokens == 0,
        tools=ToolCallParser(call.tools, call.one_tool_call) if call.tools else None,
    )


def echoed(plan: Planned, table: TokenBytes) -> EchoedPrompt:
    """A text comes back as it was written; ids, as the text that they stand for."""
    detokenizer = Detokenizer(table)
    offsets: list[int] = []
    pieces: list[str] = []
    num_chars = 0
    for token_id in plan.token_ids:
        offsets.append(num_chars)
        pieces.append(detokenizer.feed(token_id))
        num_chars += len(pieces[-1])
    decoded = "".join(pieces)
    if table.strips_leading_space and decoded.startswith(" "):
        decoded = decoded[1:]
        offsets = [max(offset - 1, 0) for offset in offsets]
    text = plan.prompt.text if isinstance(plan.prompt, TextPrompt) else decoded
    return EchoedPrompt(text, plan.token_ids, offsets, plan.sampling.prompt_logprobs is not None)
