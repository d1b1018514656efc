"""What Ollama's clients are told of the served model and its adapters."""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.errors import ModelNotFound, Unavailable
from cluster.frontend.service import Service
from engine.gguf.header import is_gguf

_TAG = ":latest"
_NEVER = "9999-12-31T23:59:59Z"
"""A model stays loaded for as long as it is served."""


class OllamaModels:
    """Args:
    service: what is served.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        weights = _weight_files(service.files.path)
        self._num_bytes = sum(size for _, size in weights)
        self._digest = hashlib.sha256(repr((sorted(weights), sorted(service.files.config))).encode()).hexdigest()

    def served(self, name: str) -> str:
        """The model that is meant: Ollama's names end with a tag, ours have none. Raises ModelNotFound."""
        try:
            self._service.check_model(name)
            return name
        except ModelNotFound:
            if not name.endswith(_TAG):
                raise
        bare = name.removesuffix(_TAG)
        self._service.check_model(bare)
        return bare

    def tags(self) -> list[dict[str, Any]]:
        """/api/tags: the model, then its adapters."""
        created = datetime.fromtimestamp(self._service.created_unix_s, UTC).isoformat().replace("+00:00", "Z")
        return [
            {
                "name": name,
                "model": name,
                "modified_at": created,
                "size": self._num_bytes,
                "digest": self._digest,
                "details": self._details(name),
            }
            for name in self._names()
        ]

    def loaded(self) -> list[dict[str, Any]]:
        """/api/ps: the same, as far as a replica takes requests."""
        try:
            context_length = self._service.max_model_len
        except Unavailable:
            return []
        return [
            {
                "name": name,
                "model": name,
                "size": self._num_bytes,
                "digest": self._digest,
                "details": self._details(name),
                "expires_at": _NEVER,
                "size_vram": self._num_bytes,
                "context_length": context_length,
            }
            for name in self._names()
        ]

    def show(self, name: str) -> dict[str, Any]:
        """/api/show. Raises ModelNotFound."""
        served = self.served(name)
        files, kind = self._service.files, self._kind
        info: dict[str, Any] = {"general.architecture": kind, "general.file_type": self._format}
        for key, field in (
            ("context_length", "max_position_embeddings"),
            ("embedding_length", "hidden_size"),
            ("block_count", "num_hidden_layers"),
            ("attention.head_count", "num_attention_heads"),
            ("attention.head_count_kv", "num_key_value_heads"),
            ("vocab_size", "vocab_size"),
            ("expert_count", "num_local_experts"),
        ):
            if files.config.get(field) is not None:
                info[f"{kind}.{key}"] = files.config[field]
        parameters = [f"{key} {value}" for key, value in files.sampling_defaults.items()]
        return {
            "modelfile": f"FROM {served}",
            "parameters": "\n".join(parameters),
            "template": files.chat_template or "",
            "license": self._service.licence.name,
            "modified_at": self.tags()[0]["modified_at"],
            "details": self._details(served),
            "model_info": info,
            "capabilities": self._capabilities(),
        }

    def _names(self) -> list[str]:
        return self._service.model_names()

    @property
    def _kind(self) -> str:
        return str(self._service.files.config.get("model_type", "unknown"))

    @property
    def _format(self) -> str:
        return "gguf" if is_gguf(self._service.files.path) else "safetensors"

    def _details(self, name: str) -> dict[str, Any]:
        quantization = self._service.files.config.get("quantization_config")
        kind = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        return {
            "parent_model": "" if name == self._service.name else self._service.name,
            "format": self._format,
            "family": self._kind,
            "families": [self._kind],
            "parameter_size": "",
            "quantization_level": str(kind or self._service.files.config.get("dtype") or ""),
        }

    def _capabilities(self) -> list[str]:
        known = ["completion"]
        if self._service.tokenizer.takes_tools:
            known.append("tools")
        if self._service.encoder.infilling.end_ids:
            known.append("insert")
        if "enable_thinking" in (self._service.files.chat_template or ""):
            known.append("thinking")
        return known


def _weight_files(path: Path) -> list[tuple[str, int]]:
    """Names and sizes in bytes."""
    found = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return [(file.name, file.stat().st_size) for file in found]
