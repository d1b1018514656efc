"""How a server was started, as results keep it: what it takes to start it again, without this machine's paths."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import aiohttp
import psutil

from engine.errors import CheckpointError
from engine.gguf.block_types import type_name
from engine.gguf.header import is_gguf, read_header

_PATH = re.compile(r"(?<![\w./}$~-])~?/(?!/)[^\s:,=]+")
_SPEED_VARIABLES = ("VLLM_", "OMP_", "KMP_", "GOMP_", "MKL_", "GGML_", "LLAMA_", "LD_PRELOAD", "MALLOC_")
"""How variables begin that say how a server computes: its threads and where they run, its allocator, its cache."""
_SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD")
_VERSION_URLS = {"version": "version", "api/version": "version", "props": "build_info"}
"""Where servers tell their version, and its name in the answer: vLLM, ourselves and Ollama, llama.cpp."""
_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class StartedServer:
    """``version``, ``precision`` (of the weights, as "bfloat16" or "Q8_0"): None where it is not known."""

    command: str
    environment: dict[str, str]
    version: str | None
    precision: str | None


async def started_server(pid: int, command: Sequence[str], url: str) -> StartedServer:
    """Of the server that ``command`` has become: a script that ends in ``exec`` leaves the command that it started."""
    words = list(command)
    environment: dict[str, str] = {}
    try:
        process = psutil.Process(pid)
        words, environment = process.cmdline() or words, process.environ()
    except psutil.Error:
        pass  # what was asked for is recorded then; a server that is gone fails in its first case
    return StartedServer(
        command=" ".join(map(without_paths, words)),
        environment=speed_variables(environment),
        version=await _version(url),
        precision=precision(words) or precision(command),
    )


def without_paths(text: str) -> str:
    """The text with the last part only of each absolute path."""
    return _PATH.sub(lambda found: Path(found.group()).name, text)


def speed_variables(environment: dict[str, str]) -> dict[str, str]:
    chosen = {name for name in environment if name.startswith(_SPEED_VARIABLES) and not _SECRET.search(name)}
    return {name: without_paths(environment[name]) for name in sorted(chosen)}


def precision(words: Sequence[str]) -> str | None:
    """What the weights are held in: by ``--quantization``, else the GGUF file, else ``--dtype``."""
    options = [part for word in words for part in word.split("=", 1)]
    files = [word for word in options if is_gguf(word)]
    return _after("--quantization", options) or (_gguf_type(files[0]) if files else _after("--dtype", options))


def _after(option: str, options: Sequence[str]) -> str | None:
    return next((value for name, value in pairwise(options) if name == option), None)


def _gguf_type(path: str) -> str | None:
    """The format of most of its numbers."""
    num_elements: Counter[int] = Counter()
    try:
        for tensor in read_header(path).tensors.values():
            num_elements[tensor.type_number] += math.prod(tensor.shape)
    except CheckpointError:
        return None
    return type_name(num_elements.most_common(1)[0][0]) if num_elements else None


async def _version(url: str) -> str | None:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)) as session:
        for path, name in _VERSION_URLS.items():
            try:
                async with session.get(f"{url}/{path}") as response:
                    answer = await response.json(content_type=None) if response.status == 200 else {}
            except (aiohttp.ClientError, TimeoutError, ValueError):
                continue  # other servers have other pages there, or none
            if isinstance(answer, dict) and isinstance(answer.get(name), str):
                return str(answer[name])
    return None
