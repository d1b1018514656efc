"""The LoRA adapters that clients name as models, and how they come and go while the server runs."""

import asyncio
import re
from pathlib import Path

from cluster.errors import ModelNotFound
from cluster.frontend.backend import Backend
from engine.config import LoraConfig
from engine.errors import AdapterError, InvalidRequest
from engine.request import AdapterInfo
from engine.weights.adapter_config import read_adapter_config

_NAME = re.compile(r"[^\s\x00-\x1f\x7f][^\x00-\x1f\x7f]{0,255}")


class Adapters:
    """Args:
    base: the base model's name.
    backend: the replicas.
    directory: adapters are loaded while serving from below it alone; None: not at all. So a client can never have the
        server read what its operator did not put there.
    max_rank: of an adapter.
    """

    def __init__(
        self, base: str, backend: Backend, directory: Path | None = None, max_rank: int = LoraConfig.max_rank
    ) -> None:
        self._base = base
        self._backend = backend
        self._directory = directory
        self._max_rank = max_rank
        self._leaving: set[str] = set()

    def loaded(self) -> list[AdapterInfo]:
        """Those that every replica that takes requests has, with their bytes over all of these."""
        ready = [info.adapters for info in self._backend.replicas() if info.state.takes_requests]
        if not ready:
            return []
        found = []
        for adapter in ready[0]:
            copies = [info for adapters in ready for info in adapters if info.name == adapter.name]
            if len(copies) == len(ready) and adapter.name not in self._leaving:
                found.append(AdapterInfo(adapter.name, adapter.path, sum(info.num_bytes for info in copies)))
        return found

    def has(self, name: str) -> bool:
        return any(info.name == name for info in self.loaded())

    async def load(self, name: str, path: str) -> AdapterInfo:
        """On all replicas, or on none. ``path``: absolute, or below the directory.

        Raises InvalidRequest where the name or the path is not allowed, AdapterError where the adapter cannot be
        served, and what the backend raises.
        """
        directory = self._allowed_directory()
        if name == self._base:
            raise InvalidRequest(f"{name!r} is the base model's name; choose another for the adapter", "lora_name")
        if not _NAME.fullmatch(name):
            raise InvalidRequest(f"{name!r} cannot name an adapter; write 1 to 256 plain characters", "lora_name")
        resolved = await asyncio.to_thread(_resolve, directory, path)
        await asyncio.to_thread(read_adapter_config, resolved, self._max_rank)
        await self._backend.load_adapter(name, str(resolved))
        return next((info for info in self.loaded() if info.name == name), AdapterInfo(name, str(resolved)))

    async def unload(self, name: str) -> None:
        """From now on no request can name it; returns when those that did have ended.

        Raises ModelNotFound where there is none, InvalidRequest where adapters may not be changed, and what the backend
        raises.
        """
        self._allowed_directory()
        if not self.has(name):
            raise ModelNotFound(f"there is no adapter {name!r} here")
        self._leaving.add(name)
        try:
            await self._backend.unload_adapter(name)
        finally:
            self._leaving.discard(name)

    def _allowed_directory(self) -> Path:
        if self._directory is None:
            raise InvalidRequest(
                "adapters cannot be changed while this server runs; start it with --lora-dir DIRECTORY to allow those "
                "below that directory"
            )
        return self._directory


def _resolve(directory: Path, path: str) -> Path:
    """Links are followed first, so none leads out."""
    root = directory.resolve()
    try:
        resolved = (root / path).resolve()
        is_directory = resolved.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise InvalidRequest(f"{path[:200]!r} is not a path: {type(error).__name__}", "lora_path") from error
    if not resolved.is_relative_to(root):
        raise InvalidRequest("lora_path is not below the directory that --lora-dir allows", "lora_path")
    if not is_directory:
        raise AdapterError(f"there is no directory {path!r} below the one that --lora-dir allows")
    return resolved
