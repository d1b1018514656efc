"""/openapi.json: what the HTTP APIs take and answer, made from the classes that check what comes in."""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from cluster.errors import ERROR_TABLE
from cluster.frontend.anthropic.schema import CountBody, MessagesBody
from cluster.frontend.ollama import schema as ollama
from cluster.frontend.openai_embeddings import EmbeddingBody
from cluster.frontend.openai_schema import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    LoadAdapterBody,
    ModerationBody,
    TokenizeBody,
    UnloadAdapterBody,
)
from cluster.frontend.openapi_answers import ANSWERS, ANTHROPIC_ERROR, OLLAMA_ERROR, OPENAI_ERROR
from cluster.frontend.responses.schema import CreateBody

_JSON, _TEXT = "application/json", "text/plain"
_EVENTS, _LINES = "text/event-stream", "application/x-ndjson"
_EVENT = {
    "description": "Each event of the stream",
    "type": "object",
    "properties": {name: {"type": "string"} for name in ("id", "event", "data")},
    "required": ["data"],
}
"""Up to OpenAPI 3.1 the schema of a stream of events is that of one of them."""
_MODULE = re.compile(r"cluster__frontend__([a-z]+)(?:_|__)schema__(\w+)")
_RESPONSE_ID = "/v1/responses/{response_id}"


@dataclass(frozen=True)
class Operation:
    """One method of one path. ``answer``: a name in ANSWERS; empty: text. ``streams``: how, where the client may ask
    for a stream. ``query``: parameters with their schemas. ``statuses``: beside those that every operation can have."""

    method: str
    path: str
    summary: str
    answer: str
    body: type[BaseModel] | None = None
    streams: str = ""
    query: tuple[tuple[str, str], ...] = ()
    statuses: tuple[int, ...] = ()

    @property
    def tag(self) -> str:
        """The API that it belongs to."""
        if self.path.startswith("/api/"):
            return "Ollama"
        if self.path.startswith("/v1/messages"):
            return "Anthropic"
        return "OpenAI" if self.path.startswith("/v1/") else "Server"


_PROBES = ("/livez", "/readyz", "/health", "/v2/health/live", "/v2/health/ready")

OPERATIONS: tuple[Operation, ...] = (
    Operation("get", "/v1/models", "The model and its adapters", "Models"),
    Operation("get", "/v1/models/{model}", "One of them", "Model"),
    Operation("post", "/v1/completions", "Continue a text", "Completion", CompletionBody, _EVENTS),
    Operation("post", "/v1/chat/completions", "Answer a conversation", "ChatCompletion", ChatBody, _EVENTS),
    Operation("post", "/v1/responses", "Answer a conversation, stored", "Response", CreateBody, _EVENTS),
    Operation(
        "get",
        _RESPONSE_ID,
        "A stored response; with stream=true its events behind a number",
        "Response",
        None,
        _EVENTS,
        (("stream", "boolean"), ("starting_after", "integer")),
    ),
    Operation("delete", _RESPONSE_ID, "Forget it", "DeletedResponse"),
    Operation("post", f"{_RESPONSE_ID}/cancel", "Stop its work", "Response"),
    Operation("get", f"{_RESPONSE_ID}/input_items", "What it was asked", "InputItems"),
    Operation("post", "/v1/embeddings", "A vector for each text", "Embeddings", EmbeddingBody),
    Operation("post", "/v1/moderations", "A guard's verdict", "Moderation", ModerationBody),
    Operation("post", "/v1/load_lora_adapter", "Load an adapter", "", LoadAdapterBody),
    Operation("post", "/v1/unload_lora_adapter", "Unload it", "", UnloadAdapterBody),
    Operation("post", "/v1/messages", "Answer a conversation", "Message", MessagesBody, _EVENTS),
    Operation("post", "/v1/messages/count_tokens", "How long the prompt is", "InputTokens", CountBody),
    Operation("post", "/api/generate", "Answer a prompt", "OllamaGenerated", ollama.GenerateBody, _LINES),
    Operation("post", "/api/chat", "Answer a conversation", "OllamaChat", ollama.ChatBody, _LINES),
    Operation("post", "/api/embed", "A vector for each text", "OllamaEmbed", ollama.EmbedBody),
    Operation("post", "/api/embeddings", "A vector for one text", "OllamaEmbedding", ollama.EmbeddingsBody),
    Operation("get", "/api/tags", "The model and its adapters", "OllamaModels"),
    Operation("get", "/api/ps", "Those that are loaded: all", "OllamaModels"),
    Operation("post", "/api/show", "One of them", "OllamaModel", ollama.ShowBody),
    Operation("get", "/api/version", "Of this server", "OllamaVersion"),
    Operation(
        "get",
        "/v1/usage",
        "What tenants used, by day, key and model",
        "Usage",
        query=(("tenant", "string"), ("day", "string")),
    ),
    Operation("get", "/v1/status", "Replicas, their ranks and loads, as remuda status shows them", "ServerStatus"),
    Operation("post", "/tokenize", "A text's or a conversation's tokens", "Tokens", TokenizeBody),
    Operation("post", "/detokenize", "The text of tokens", "Text", DetokenizeBody),
    Operation("get", "/metrics", "In Prometheus's form", ""),
    *(Operation("get", path, "Whether it lives, or takes requests", "Status", statuses=(503,)) for path in _PROBES),
)


@functools.cache
def openapi_document(version: str) -> dict[str, Any]:
    """OpenAPI 3.1."""
    bodies = [operation.body for operation in OPERATIONS if operation.body is not None]
    refs, definitions = models_json_schema(
        [(body, "validation") for body in dict.fromkeys(bodies)], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        body = None if operation.body is None else refs[(operation.body, "validation")]
        paths.setdefault(operation.path, {})[operation.method] = _operation_object(operation, body)
    answers = {f"Answer{name}": schema for name, schema in ANSWERS.items()}
    errors = {"ErrorOpenAI": OPENAI_ERROR, "ErrorAnthropic": ANTHROPIC_ERROR, "ErrorOllama": OLLAMA_ERROR}
    document = {
        "openapi": "3.1.0",
        "info": {"title": "Remuda", "version": version, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": {**definitions.get("$defs", {}), **answers, **errors},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{"bearer": []}, {"key": []}, {}],
    }
    # pydantic tells classes of one name apart by their modules, which are nobody's business.
    short = _MODULE.sub(lambda found: f"{found[2]}{found[1].title()}", json.dumps(document))
    renamed: dict[str, Any] = json.loads(short)
    return renamed


def _operation_object(operation: Operation, body: Any) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/Answer{operation.answer}"}
    content: dict[str, Any] = (
        {_JSON: {"schema": schema}} if operation.answer else {_TEXT: {"schema": {"type": "string"}}}
    )
    if operation.streams:
        content[operation.streams] = {"schema": _EVENT if operation.streams == _EVENTS else {"type": "string"}}
    made: dict[str, Any] = {
        "summary": operation.summary,
        "tags": [operation.tag],
        "operationId": f"{operation.method}{operation.path}".translate(str.maketrans("/{}.", "____")),
        "responses": {"200": {"description": "The answer", "content": content}, **_errors(operation)},
    }
    if parameters := _parameters(operation):
        made["parameters"] = parameters
    if body is not None:
        made["requestBody"] = {"required": True, "content": {_JSON: {"schema": body}}}
    return made


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    names = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}} for name in names
    ]
    return in_path + [
        {"name": name, "in": "query", "required": False, "schema": {"type": kind} | _AT_LEAST.get(kind, {})}
        for name, kind in operation.query
    ]


_AT_LEAST = {"integer": {"minimum": 0}}


def _errors(operation: Operation) -> dict[str, Any]:
    name = operation.tag if operation.tag in ("Ollama", "Anthropic") else "OpenAI"
    described = {
        str(status): {
            "description": "An error",
            "content": {_JSON: {"schema": {"$ref": f"#/components/schemas/Error{name}"}}},
        }
        for status in _error_statuses()
    }
    if operation.answer == "Status":
        described = {}
    for status in operation.statuses:
        schema = {"$ref": f"#/components/schemas/Answer{operation.answer}"}
        described[str(status)] = {"description": "No", "content": {_JSON: {"schema": schema}}}
    return described


def _error_statuses() -> Sequence[int]:
    """Those of the error tree; 499 is for nobody to read, for its client has gone."""
    return sorted({mapping.http_status for mapping in ERROR_TABLE.values()} - {499} | {405})
