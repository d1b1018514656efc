"""``remuda status``: the replicas of a server and where their ranks run."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli import options
from cluster.cli.progress import PHASE_TEXT
from cluster.rpc.inference_client import ServerStatus
from cluster.types import RankInfo
from engine.executor.watchdog import RankState

EXAMPLES = "Examples: remuda status --json | remuda status --dump record.jsonl --replica r0"


def status(
    target: options.Target = options.DEFAULT,
    api_key_file: options.ApiKeyFile = None,
    ca_file: options.CaFile = None,
    certificate_file: options.CertificateFile = None,
    as_json: options.Json = False,
    dump: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a replica's flight record: its last plans, results and events as JSON lines. It holds the "
            "requests' tokens.",
            show_default=False,
        ),
    ] = None,
    replica: Annotated[
        str, typer.Option(metavar="ID", help="Whose flight record. [the only one's]", show_default=False)
    ] = "",
) -> None:
    """Show what a running server serves, with which replicas, and what every rank is about.

    A rank is idle, busy, stalled or dead, in a step and an operation, for so long.
    """
    with options.connect(target, api_key_file, ca_file, certificate_file) as client:
        if dump is not None:
            num_bytes = _write(dump, client.dump(replica))
            print(f"wrote {dump}: {num_bytes:,} bytes", file=sys.stderr)
        answer = client.status()
    if as_json:
        sys.stdout.write(json.dumps(as_object(answer)) + "\n")
    else:
        _print_text(answer)


def as_object(answer: ServerStatus) -> dict[str, Any]:
    """The JSON form; its fields are part of the product's contract."""
    return {
        "model": answer.model,
        "version": answer.version,
        "draining": answer.draining,
        "num_live_requests": answer.num_live_requests,
        "replicas": [
            {
                "id": replica.id,
                "state": replica.state.value,
                "address": replica.address,
                "max_model_len": replica.max_model_len,
                "num_running": replica.num_running,
                "num_waiting": replica.num_waiting,
                "kv_cache_usage": replica.kv_cache_usage,
                "num_steps": replica.num_steps,
                "progress_age_s": replica.progress_age_s,
                "progress_limit_s": replica.progress_limit_s,
                "experts": None if replica.experts is None else asdict(replica.experts),
                "phase_seconds": replica.phase_seconds,
                "error": replica.error,
                "ranks": [asdict(rank) for rank in replica.ranks],
            }
            for replica in answer.replicas
        ],
    }


def _print_text(answer: ServerStatus) -> None:
    draining = ", draining" if answer.draining else ""
    print(f"{answer.model}: {answer.num_live_requests} live requests{draining}")
    for replica in answer.replicas:
        print(
            f"replica {replica.id}: {replica.state.value}, {replica.num_running} running, "
            f"{replica.num_waiting} waiting, {replica.kv_cache_usage:.0%} of the KV cache in use, {replica.address}"
        )
        if replica.phase_seconds:
            phases = ", ".join(f"{PHASE_TEXT.get(name, name)} {s:.1f} s" for name, s in replica.phase_seconds.items())
            print(f"  start: {phases}")
        if replica.experts is not None:
            experts = replica.experts
            print(
                f"  experts: the busiest ranks have {experts.imbalance:.2f} of the mean, {experts.num_moves} tables "
                f"changed ({experts.num_moved_experts} experts read), {experts.num_failed_moves} given up"
            )
        if replica.error:
            print(f"  {replica.error}")
        for rank in replica.ranks:
            print(f"  rank {rank.rank}: {_doing(rank)}, {rank.device} on {rank.host}, pid {rank.pid}")


def _doing(rank: RankInfo) -> str:
    if not rank.operation:
        return rank.state
    if rank.state == RankState.IDLE:
        return f"{rank.state} since step {rank.step}"
    return f"{rank.state} in step {rank.step}, {rank.operation}, for {rank.since_s:.1f} s"


def _write(path: Path, parts: Iterator[bytes]) -> int:
    """Readable by this user alone. Returns the number of bytes."""
    num_bytes = 0
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        for part in parts:
            num_bytes += file.write(part)
    return num_bytes
