"""Bodies of Ollama's requests. Wrong types are refused, unknown fields are not looked at, and fields that ask for what
is not served are refused rather than ignored.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from cluster.frontend.calls import SamplingOptions, StructuredOutput
from cluster.frontend.openai_schema import MAX_MESSAGES, Body
from cluster.frontend.structured import json_schema_output
from engine.errors import InvalidRequest


class Options(BaseModel):
    """How to choose tokens. What Ollama has beside these sets up llama.cpp, or does nothing any more; it is ignored."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)

    num_predict: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling(self, structured: StructuredOutput | None, logprobs: int | None) -> SamplingOptions:
        """Below 0, ``num_predict`` is the rest of the context."""
        return SamplingOptions(
            max_tokens=None if self.num_predict is None or self.num_predict < 0 else self.num_predict,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=None if self.seed is None or self.seed < 0 else self.seed,
            repetition_penalty=self.repeat_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            structured=structured,
            logprobs=logprobs,
        )


class _ModelBody(Body):
    """``model``, also with Ollama's tag behind it."""

    model_config = ConfigDict(protected_namespaces=())

    model: str = Field(min_length=1)
    keep_alive: float | str | None = None
    """The model stays loaded as long as it is served."""


class _AnswerBody(_ModelBody):
    """What both generating endpoints take."""

    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: Options | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @property
    def streams(self) -> bool:
        """Unlike OpenAI's, unless the client says no."""
        return self.stream is not False

    def structured(self) -> StructuredOutput | None:
        """Raises InvalidRequest."""
        if self.format in (None, ""):
            return None
        if self.format == "json":
            return json_schema_output({"type": "object"}, "format")
        if isinstance(self.format, str):
            raise InvalidRequest(f'format must be "json" or a JSON schema, not {self.format!r}', "format")
        assert self.format is not None
        return json_schema_output(self.format, "format")

    @property
    def stops(self) -> list[str]:
        return (self.options or Options()).stops

    def sampling(self) -> SamplingOptions:
        """Raises InvalidRequest."""
        return (self.options or Options()).sampling(self.structured(), self.num_logprobs())

    def num_logprobs(self) -> int | None:
        """Raises InvalidRequest."""
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", "top_logprobs")
        return None

    def refuse(self, **names: str) -> None:
        """Raises InvalidRequest for a field among ``names`` that asks for something."""
        for name, why in names.items():
            if (self.model_extra or {}).get(name):
                raise InvalidRequest(f"{why}; leave {name} out", name)


class GenerateBody(_AnswerBody):
    """POST /api/generate."""

    prompt: str = ""
    suffix: str = ""
    system: str = ""
    raw: bool = False


class Message(BaseModel):
    """One turn."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    role: str
    content: str | None = None
    thinking: str | None = None
    images: Annotated[list[str], Field(fail_fast=True)] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_name: str | None = None


class ChatBody(_AnswerBody):
    """POST /api/chat."""

    messages: Annotated[list[Message], Field(max_length=MAX_MESSAGES, fail_fast=True)] = Field(default_factory=list)
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None


class EmbedBody(_ModelBody):
    """POST /api/embed. ``truncate``: unless it is false, an input that is too long is cut at its end."""

    input: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    truncate: bool | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input or []


class EmbeddingsBody(_ModelBody):
    """POST /api/embeddings, the older form: one text."""

    prompt: str = ""


class ShowBody(_ModelBody):
    """POST /api/show."""

    verbose: bool | None = None
