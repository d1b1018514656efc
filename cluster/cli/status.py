"""``remuda status``: the replicas of a server and where their ranks run."""

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli import options
from cluster.cli.progress import PHASE_TEXT
from cluster.types import RankInfo, ServerStatus
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
        sys.stdout.write(json.dumps(answer.as_object()) + "\n")
    else:
        print_status(answer)


def print_status(answer: ServerStatus) -> None:
    draining = ", draining" if answer.draining else ""
    print(f"{answer.model}: {answer.num_live_requests} live requests{draining}")
    if not answer.replicas:
        print("no replica has joined; the log of this front end says why")
    for replica in answer.replicas:
        print(
            f"replica {replica.id}: {replica.state.value}, {replica.num_running} running, "
            f"{replica.num_waiting} waiting, {replica.kv_cache_usage:.0%} of the KV cache in use, {replica.address}"
        )
        if replica.phase_seconds:
            print(f"  start: {_phases(replica.phase_seconds)}")
        if replica.experts is not None:
            experts = replica.experts
            print(
                f"  experts: the busiest ranks have {experts.imbalance:.2f} of the mean, {experts.num_moves} tables "
                f"changed ({experts.num_moved_experts} experts read), {experts.num_failed_moves} given up"
            )
            print(f"  experts' load since the start: {_shares(experts.rank_pairs)}")
        if replica.error:
            print(f"  {replica.error}")
        for rank in replica.ranks:
            print(f"  rank {rank.rank}: {_doing(rank)}, {rank.device} on {rank.host}, pid {rank.pid}{_source(rank)}")


def _phases(seconds: Mapping[str, float]) -> str:
    """In the order in which a start goes through them."""
    order = [*PHASE_TEXT, *sorted(seconds.keys() - PHASE_TEXT.keys())]
    return ", ".join(f"{PHASE_TEXT.get(name, name)} {seconds[name]:.1f} s" for name in order if name in seconds)


def _source(rank: RankInfo) -> str:
    """Of one that took the place of another, whence its weights came."""
    if not rank.weight_bytes_from_peers:
        return ""
    return (
        f", loaded {rank.weight_bytes_from_peers:,} bytes from other ranks, {rank.weight_bytes_from_disk:,} from disk"
    )


def _shares(rank_pairs: Sequence[int]) -> str:
    """Of (token, expert) pairs: each ep rank's."""
    total = sum(rank_pairs)
    if not total:
        return "no token yet"
    return ", ".join(f"ep rank {rank} {pairs / total:.1%}" for rank, pairs in enumerate(rank_pairs))


def _doing(rank: RankInfo) -> str:
    if not rank.operation:
        return rank.state
    if rank.state == RankState.IDLE:
        return f"{rank.state} since step {rank.step}"
    return f"{rank.state} in step {rank.step}, {rank.operation}, for {rank.since_s:.1f} s"


def _write(path: Path, parts: Iterator[bytes]) -> int:
    """Readable by this user alone, and there only when all of it is; a pipe or a terminal is written to as it is.
    Returns the number of bytes."""
    if path.exists() and not path.is_file():
        with path.open("wb") as there:
            return sum(there.write(part) for part in parts)
    path = path.resolve()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:  # of mode 0600
        try:
            num_bytes = sum(file.write(part) for part in parts)
        except BaseException:
            Path(file.name).unlink()
            raise
    Path(file.name).replace(path)
    return num_bytes
