"""Which servers are compared, and how each is started on a checkpoint.

A peer's command comes from the environment (or ``--peer NAME=COMMAND``), else from what is installed. In a command,
{model} is the checkpoint's directory, {name} the name that clients use, {port} where to listen on 127.0.0.1, {threads}
the number of threads, and {gguf} the same checkpoint as GGUF. Peers answer GET /health with 200 when they are ready.
"""

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.bench_cache import cache_dir


@dataclass(frozen=True)
class KnownPeer:
    """``variable``: of the environment, with its start command. ``program``: looked for where there is none, and
    started by ``command``, in which {python} is the interpreter that has ``module``."""

    variable: str
    program: str
    command: str
    module: str | None = None

    def installed_command(self) -> str | None:
        """None where it is not installed: neither here, nor in the environment of a program on the path."""
        program = shutil.which(self.program)
        if self.module is None:
            return self.command if program else None
        if importlib.util.find_spec(self.module):
            return self.command.replace("{python}", shlex.quote(sys.executable))
        python = Path(program).resolve().parent / "python" if program else None
        return self.command.replace("{python}", shlex.quote(str(python))) if python and python.exists() else None


KNOWN_PEERS = {
    "vllm": KnownPeer(
        "REMUDA_BENCH_VLLM",
        "vllm",
        # Not "vllm serve": of the wheel for CPUs, which has another name, it ends with PackageNotFoundError.
        "{python} -m vllm.entrypoints.openai.api_server --model {model} --served-model-name {name} --host 127.0.0.1 "
        "--port {port} --dtype bfloat16 --max-model-len 2048 --max-num-seqs 64 --max-num-batched-tokens 2048 "
        "--enable-prompt-tokens-details",
        module="vllm",
    ),
    "llama.cpp": KnownPeer(
        "REMUDA_BENCH_LLAMACPP",
        "llama-server",
        "llama-server -m {gguf} --alias {name} --host 127.0.0.1 --port {port} -t {threads} -tb {threads} -np 32 "
        "-c 36864 --no-kv-unified -b 2048 -ub 512",
    ),
}


@dataclass(frozen=True)
class ServedModel:
    """A checkpoint, as peers are told of it. ``gguf`` need not exist."""

    name: str
    directory: Path
    gguf: Path
    num_threads: int

    @classmethod
    def of(cls, directory: Path, num_threads: int, gguf: Path | None) -> "ServedModel":
        return cls(directory.name, directory, gguf or cache_dir() / "gguf" / f"{directory.name}-q8_0.gguf", num_threads)

    def command(self, template: str, port: int) -> list[str]:
        """Raises KeyError for a placeholder that there is not."""
        values = {
            "model": self.directory,
            "name": self.name,
            "port": port,
            "threads": self.num_threads,
            "gguf": self.gguf,
        }
        return [word.format_map(values) for word in shlex.split(template)]


def find_peers(
    model: ServedModel, given: Mapping[str, str], environment: Mapping[str, str] = os.environ
) -> tuple[dict[str, str], dict[str, str]]:
    """Command templates of the peers that can be run, and of the others why not. ``given``: commands by name."""
    commands, skipped = dict(given), {}
    for name, peer in KNOWN_PEERS.items():
        if name in commands:
            continue
        if environment.get(peer.variable):
            commands[name] = environment[peer.variable]
        elif installed := peer.installed_command():
            commands[name] = installed
        else:
            skipped[name] = f"not installed: no {peer.program}, and neither --peer nor {peer.variable} names one"
    for name, command in list(commands.items()):
        if "{gguf}" in command and not model.gguf.exists():
            skipped[name] = f"there is no {model.gguf}; give --gguf FILE"
            del commands[name]
    return commands, skipped
