"""A rank is killed while it serves: how long streams stand still, and what of that is not the re-prefill.

``python -m bench.recovery dense-0.5b --tp 4``: once with a spare that has imported everything, once without. In the
same run are measured: the gap that a client sees in its stream, what a prefill of just these tokens takes afterwards,
what the slowest rank spent on its import, the rendezvous and its shard, what the survivors read from files, and tokens
per second before and after. Each run is printed as a line of JSON and held against what is promised
(bench.recovery_verdict); exit status 1 where a promise was missed.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from bench.bench_cache import model_dir
from bench.interrupts import run_main
from bench.recovery_verdict import verdicts
from bench.serving import free_port, serving

PROMPT_TOKENS = 128
WINDOW_S = 6.0
"""Of the throughput before and after."""
SETTLE_S = 8.0
"""Before either window: a spare, at first or in place of the one that was taken, imports meanwhile."""
REPAIR_TIMEOUT_S = 60.0


@dataclass
class Stream:
    """When chunks of one stream came, and how many tokens each brought."""

    prompt: list[int]
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    """Of each chunk."""

    async def run(self, session: aiohttp.ClientSession, url: str, max_tokens: int) -> None:
        body = {
            "model": "bench",
            "prompt": self.prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        async with session.post(f"{url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[len(b"data: ") :])
                if "error" in chunk:
                    raise RuntimeError(f"a stream was lost: {chunk['error']['message']}")
                for choice in chunk["choices"]:
                    self.note(time.monotonic(), choice.get("token_ids") or [])

    def note(self, at_s: float, token_ids: list[int]) -> None:
        """A chunk has come."""
        self.token_ids += token_ids
        self.times_s.append(at_s)
        self.num_tokens.append(len(token_ids))

    def gap_s(self, since_s: float) -> float:
        """The longest pause that ended after ``since_s``."""
        return max((b - a for a, b in zip(self.times_s, self.times_s[1:], strict=False) if b > since_s), default=0.0)

    def num_between(self, first_s: float, last_s: float) -> int:
        """Tokens."""
        return sum(count for at, count in zip(self.times_s, self.num_tokens, strict=True) if first_s <= at < last_s)


async def _ranks(remuda: str, target: str) -> list[dict[str, Any]]:
    process = await asyncio.create_subprocess_exec(
        remuda, "status", "--json", "--target", target, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    ranks: list[dict[str, Any]] = json.loads(output)["replicas"][0]["ranks"]
    return ranks


def _bytes_read(pid: int) -> int:
    """By this process so far, from files, pipes and the page cache alike (sockets are not counted there)."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(fields["rchar"])


def _phases(log: str) -> dict[str, float]:
    """Of the last formation, from what the server printed."""
    line = [line for line in log.splitlines() if " serves as epoch " in line][-1]
    return {name: float(seconds) for name, seconds in re.findall(r"(\w+) ([\d.]+) s", line.split(": ", 1)[1])}


async def measure(model: str, tp: int, victim: int, num_streams: int, spares: int, directory: str) -> dict[str, Any]:
    remuda = str(Path(sys.executable).parent / "remuda")
    port, grpc_port = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    options = ["--tp", str(tp), "--served-model-name", "bench", "--spare-ranks", str(spares), "--port", str(port)]
    options += ["--grpc-port", str(grpc_port), "--cpu-slots", str(tp), "--max-model-len", "2048"]
    log = Path(directory) / "serve.log"
    command = ["/bin/sh", "-c", 'log=$1; shift; exec "$@" 2> "$log"', "sh", str(log)]
    async with (
        serving([*command, remuda, "serve", model, *options], f"{url}/readyz"),
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session,
    ):
        streams = [Stream([(17 * i + 31 * n) % 1000 + 100 for i in range(PROMPT_TOKENS)]) for n in range(num_streams)]
        tasks = [asyncio.create_task(stream.run(session, url, 1500)) for stream in streams]
        await asyncio.sleep(SETTLE_S + WINDOW_S)
        before = await _ranks(remuda, f"127.0.0.1:{grpc_port}")
        read = {rank["pid"]: _bytes_read(rank["pid"]) for rank in before}
        killed_s = time.monotonic()
        os.kill(before[victim]["pid"], signal.SIGKILL)
        held = [len(stream.token_ids) for stream in streams]
        while min(stream.times_s[-1] for stream in streams) < killed_s + 0.5:
            if time.monotonic() > killed_s + REPAIR_TIMEOUT_S:
                raise RuntimeError("the streams did not go on")
            await asyncio.sleep(0.05)
        resumed_s = min(next(at for at in stream.times_s if at > killed_s + 0.2) for stream in streams)
        await asyncio.sleep(SETTLE_S + WINDOW_S)
        after = await _ranks(remuda, f"127.0.0.1:{grpc_port}")
        survivors = [rank for rank in range(tp) if rank != victim]
        kept = [before[rank]["pid"] for rank in survivors if before[rank]["pid"] == after[rank]["pid"]]
        most_read = max((_bytes_read(pid) - read[pid] for pid in kept), default=0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # The same tokens, under other block hashes: nothing of them is cached.
        again = [
            Stream([1 + i, *stream.prompt, *stream.token_ids[:num_held]])
            for i, (stream, num_held) in enumerate(zip(streams, held, strict=True))
        ]
        began_s = time.monotonic()
        await asyncio.gather(*(stream.run(session, url, 2) for stream in again))
        prefill_s = max(stream.times_s[0] for stream in again) - began_s
    gap_s = max(stream.gap_s(killed_s) for stream in streams)
    rate = [
        sum(stream.num_between(first, first + WINDOW_S) for stream in streams) / WINDOW_S
        for first in (killed_s - WINDOW_S, resumed_s + SETTLE_S)
    ]
    return {
        "spare_ranks": spares,
        "gap_s": round(gap_s, 3),
        "prefill_again_s": round(prefill_s, 3),
        "gap_less_prefill_s": round(gap_s - prefill_s, 3),
        "slowest_rank_s": _phases(log.read_text()),
        "survivors_keep_pid": len(kept) == len(survivors),
        "survivors_read_bytes": most_read,
        "tokens_per_s": [round(value, 1) for value in rate],
        "throughput_ratio": round(rate[1] / rate[0], 3),
    }


def report(found: dict[str, Any]) -> bool:
    """Print a run's figures and whether each promise was kept. Whether all were."""
    print(json.dumps(found))
    judged = verdicts(found)
    print(*(f"  {each}" for each in judged), sep="\n", flush=True)
    return all(each.was_kept for each in judged)


def main() -> int:
    """Exit status 1 where a promise was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m bench.recovery dense-0.5b --tp 4 --spares 1",
    )
    parser.add_argument("model", nargs="?", default="dense-0.5b", help="of bench.make_models, or a directory")
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--victim", type=int, default=2, help="the rank that is killed")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--spares", type=int, nargs="*", default=[1, 0], help="--spare-ranks of each run")
    arguments = parser.parse_args()
    model = arguments.model if Path(arguments.model).is_dir() else str(model_dir(arguments.model))
    were_kept = True
    for spares in arguments.spares:
        with tempfile.TemporaryDirectory(prefix="remuda-recovery-") as directory:
            found = asyncio.run(measure(model, arguments.tp, arguments.victim, arguments.streams, spares, directory))
        were_kept &= report(found)
    return int(not were_kept)


if __name__ == "__main__":
    run_main(main)
