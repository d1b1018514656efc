"""A checkpoint's chat template: messages → the prompt's text, in the environment that transformers gives templates.

A template comes from whoever published the checkpoint, so it runs in jinja's sandbox, and what it can write, count
through and repeat is bounded.
"""

import json
from collections.abc import Callable, Mapping, Sequence, Sized
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import CheckpointError, InvalidRequest

MAX_OUTPUT_CHARS = 2**25
_MAX_RANGE_STEPS = 1_000_000
"""Of all ranges of one rendering together."""
_MAX_REPEATED = 2**20
_MAX_POWER_BITS = 4096


class _GenerationBlocks(Extension):
    """``{% generation %}…{% endgeneration %}`` marks an assistant's words for training; here it is its contents."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own declaration is not a ClassVar

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which a prompt does not want."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _Environment(ImmutableSandboxedEnvironment):
    """Without the two operators with which a short template makes a value of any size."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, Sized) and isinstance(count, int) and len(value) * count > _MAX_REPEATED:
                    raise jinja2.TemplateError("it repeats a value too often")
        elif isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _MAX_POWER_BITS:
            raise jinja2.TemplateError("it computes too large a number")
        return super().call_binop(context, operator, left, right)


def _range_within_bounds() -> Callable[..., range]:
    """Python's range, for one rendering."""
    num_left = _MAX_RANGE_STEPS

    def bounded(*arguments: int) -> range:
        nonlocal num_left
        steps = range(*arguments)
        num_left -= len(steps)
        if num_left < 0:
            raise jinja2.TemplateError("it counts through too much")
        return steps

    return bounded


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class ChatTemplate:
    """One compiled template.

    Args:
        source: its jinja text.
        named_tokens: ``bos_token`` and its like.

    Raises:
        CheckpointError: the text is no template.
    """

    def __init__(self, source: str, named_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            names = meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"the checkpoint's chat template, line {error.lineno}: {error.message}") from error
        self.takes_tools = "tools" in names
        """Whether it looks at the tools that a request has."""
        self._named_tokens = dict(named_tokens)
        self._wants_parts = not self._shows("probe") and self._shows([{"type": "text", "text": "probe"}])

    def _shows(self, content: Any) -> bool:
        """Whether a message in this form gets into the prompt: templates for text and images drop a plain string."""
        try:
            return "probe" in self._render([{"role": "user", "content": content}], True, {}, ())
        except InvalidRequest:
            return False

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The prompt's text. ``variables`` are more names for the template (a client's ``chat_template_kwargs``).

        Raises:
            InvalidRequest: the template refuses these messages; its own words are in the message.
        """
        if self._wants_parts:
            messages = [{**message, "content": _as_parts(message["content"])} for message in messages]
        return self._render(messages, add_generation_prompt, variables or {}, tools)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]],
    ) -> str:
        names = {**self._named_tokens, "tools": None, "documents": None, **variables}
        names.update(messages=messages, add_generation_prompt=add_generation_prompt, range=_range_within_bounds())
        if tools:
            names["tools"] = tools
        try:
            return self._write(names)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", "messages") from error
        except RecursionError as error:
            raise InvalidRequest("the model's chat template goes too deep for these messages", "messages") from error

    def _write(self, names: Mapping[str, Any]) -> str:
        pieces: list[str] = []
        num_chars = 0
        for piece in self._template.generate(names):
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars > MAX_OUTPUT_CHARS:
                raise jinja2.TemplateError(f"its text has more than {MAX_OUTPUT_CHARS} characters")
        return "".join(pieces)
