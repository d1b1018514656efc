"""/v1/embeddings: the request as a call, its events as OpenAI's JSON."""

import base64
from array import array
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, WithJsonSchema

from cluster.frontend.calls import Call, Event, TextPrompt, TimeLimits
from cluster.frontend.embedding import MAX_INPUTS, embedding_call, embeddings_of
from cluster.frontend.model_files import ModelFiles
from cluster.frontend.openai_schema import MAX_IDS, PROMPT_SCHEMA, Body, prompts_of
from engine.errors import InvalidRequest


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    max_values: ClassVar[int] = MAX_IDS

    input: Annotated[Any, WithJsonSchema(PROMPT_SCHEMA)] = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    add_special_tokens: bool = True
    timeout_s: float | None = None
    priority: int | None = None
    cache_salt: str | None = None

    def as_call(self, request_id: str, files: ModelFiles) -> Call:
        """Raises InvalidRequest."""
        return embedding_call(
            request_id,
            prompts_of(self.input, "input", MAX_INPUTS, self._text),
            self.dimensions,
            files,
            model=self.model,
            limits=TimeLimits(self.timeout_s),
            priority=self.priority or 0,
            cache_salt=self.cache_salt or "",
        )

    def _text(self, text: str) -> TextPrompt:
        if not text:
            raise InvalidRequest("an input must not be empty", "input")
        return TextPrompt(text, self.add_special_tokens)

    def answer(self, call: Call, events: list[Event], model: str) -> dict[str, Any]:
        """Raises EngineFailure where an embedding is missing."""
        embeddings, usage = embeddings_of(call, events, self.dimensions)
        num_tokens = usage.num_prompt_tokens
        return {
            "id": call.request_id,
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": self._shown(values)}
                for index, values in enumerate(embeddings)
            ],
            "model": model,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }

    def _shown(self, values: "array[float]") -> str | list[float]:
        if self.encoding_format == "base64":
            return base64.b64encode(values.tobytes()).decode("ascii")
        return values.tolist()
