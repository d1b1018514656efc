"""A checkpoint's chat template: messages → the prompt's text, in the environment that transformers gives templates."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import CheckpointError, InvalidRequest


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


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One compiled template.

    Args:
        source: its jinja text.
        named_tokens: ``bos_token`` and its like.

    Raises:
        CheckpointError: the text is no template.
    """

    def __init__(self, source: str, named_tokens: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"the checkpoint's chat template, line {error.lineno}: {error.message}") from error
        self._named_tokens = dict(named_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. ``variables`` are more names for the template (a client's ``chat_template_kwargs``).

        Raises:
            InvalidRequest: the template refuses these messages; its own words are in the message.
        """
        names = {**self._named_tokens, "tools": None, "documents": None, **(variables or {})}
        names.update(messages=messages, add_generation_prompt=add_generation_prompt)
        try:
            return self._template.render(names)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", "messages") from error
