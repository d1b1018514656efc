"""JSON schemas of what the HTTP APIs answer: what clients can rely on, not every field. Pure data."""

from typing import Any

Schema = dict[str, Any]


def _object(**properties: Schema) -> Schema:
    """All of them are there; there may be more."""
    return {"type": "object", "properties": properties, "required": sorted(properties)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number", "minimum": 0}
TRUTH: Schema = {"type": "boolean"}
ANY_OBJECT: Schema = {"type": "object"}
TEXT_OR_NULL: Schema = {"type": ["string", "null"]}

OPENAI_ERROR = _object(
    error=_object(message=TEXT, type=TEXT, param=TEXT_OR_NULL, code=TEXT),
)
ANTHROPIC_ERROR = _object(type=_one_of("error"), error=_object(type=TEXT, message=TEXT))
OLLAMA_ERROR = _object(error=TEXT)

_NUMBERS = _list({"type": "number"})
_USAGE = _object(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT)
_FINISH = _one_of("stop", "length", "tool_calls")
_MODEL = _object(id=TEXT, object=_one_of("model"), created=COUNT, owned_by=TEXT)
_RESPONSE_STATUS = _one_of("completed", "failed", "in_progress", "cancelled", "incomplete")
_OLLAMA_END = {"done": TRUTH, "model": TEXT, "created_at": TEXT}
_OLLAMA_MODEL = _object(name=TEXT, model=TEXT, size=COUNT, digest=TEXT, details=ANY_OBJECT)

_USAGE_TOTAL = _object(
    day=TEXT,
    tenant=TEXT,
    key_id=TEXT,
    model=TEXT,
    num_requests=COUNT,
    num_prompt_tokens=COUNT,
    num_cached_tokens=COUNT,
    num_completion_tokens=COUNT,
)

_RANK = _object(
    rank=COUNT,
    pid=COUNT,
    host=TEXT,
    device=TEXT,
    state=TEXT,
    step=COUNT,
    operation=TEXT,
    since_s=NUMBER,
    weight_bytes_from_peers=COUNT,
    weight_bytes_from_disk=COUNT,
)
_REPLICA = _object(
    id=TEXT,
    state=_one_of("starting", "ready", "draining", "failed", "repairing"),
    address=TEXT,
    max_model_len=COUNT,
    num_running=COUNT,
    num_waiting=COUNT,
    kv_cache_usage=NUMBER,
    num_steps=COUNT,
    experts={"type": ["object", "null"]},
    error=TEXT,
    ranks=_list(_RANK),
)

ANSWERS: dict[str, Schema] = {
    "Usage": _object(object=_one_of("list"), data=_list(_USAGE_TOTAL)),
    "ServerStatus": _object(
        model=TEXT,
        version=TEXT,
        draining=TRUTH,
        num_live_requests=COUNT,
        num_generated_tokens=COUNT,
        replicas=_list(_REPLICA),
    ),
    "Completion": _object(
        id=TEXT,
        object=_one_of("text_completion"),
        created=COUNT,
        model=TEXT,
        choices=_list(_object(index=COUNT, text=TEXT, finish_reason=_FINISH)),
        usage=_USAGE,
    ),
    "ChatCompletion": _object(
        id=TEXT,
        object=_one_of("chat.completion"),
        created=COUNT,
        model=TEXT,
        choices=_list(
            _object(
                index=COUNT, message=_object(role=_one_of("assistant"), content=TEXT_OR_NULL), finish_reason=_FINISH
            )
        ),
        usage=_USAGE,
    ),
    "Response": _object(
        id=TEXT,
        object=_one_of("response"),
        created_at=COUNT,
        status=_RESPONSE_STATUS,
        model=TEXT,
        output=_list(_object(id=TEXT, type=_one_of("message", "function_call"), status=TEXT)),
        usage={"type": ["object", "null"]},
        error={"type": ["object", "null"]},
    ),
    "DeletedResponse": _object(id=TEXT, object=_one_of("response"), deleted=TRUTH),
    "InputItems": _object(object=_one_of("list"), data=_list(_object(id=TEXT, type=TEXT)), has_more=TRUTH),
    "Embeddings": _object(
        object=_one_of("list"),
        data=_list(_object(object=_one_of("embedding"), index=COUNT, embedding={"anyOf": [TEXT, _NUMBERS]})),
        model=TEXT,
        usage=_object(prompt_tokens=COUNT, total_tokens=COUNT),
    ),
    "Moderation": _object(id=TEXT, model=TEXT, results=_list(_object(flagged=TRUTH, categories=ANY_OBJECT))),
    "Models": _object(object=_one_of("list"), data=_list(_MODEL)),
    "Model": _MODEL,
    "Tokens": _object(count=COUNT, max_model_len=COUNT, tokens=_list(COUNT)),
    "Text": _object(prompt=TEXT),
    "Message": _object(
        id=TEXT,
        type=_one_of("message"),
        role=_one_of("assistant"),
        model=TEXT,
        content=_list(_object(type=_one_of("text", "tool_use"))),
        stop_reason=_one_of("end_turn", "max_tokens", "stop_sequence", "tool_use"),
        usage=_object(input_tokens=COUNT, output_tokens=COUNT),
    ),
    "InputTokens": _object(input_tokens=COUNT),
    "OllamaGenerated": _object(response=TEXT, **_OLLAMA_END),
    "OllamaChat": _object(message=_object(role=_one_of("assistant"), content=TEXT), **_OLLAMA_END),
    "OllamaEmbed": _object(model=TEXT, embeddings=_list(_NUMBERS), prompt_eval_count=COUNT),
    "OllamaEmbedding": _object(embedding=_NUMBERS),
    "OllamaModels": _object(models=_list(_OLLAMA_MODEL)),
    "OllamaModel": _object(details=ANY_OBJECT, model_info=ANY_OBJECT, capabilities=_list(TEXT), template=TEXT),
    "OllamaVersion": _object(version=TEXT),
    "Status": _object(status=TEXT),
}
