"""``remuda status``: the replicas of a server and where their ranks run."""

import json
import sys
from typing import Any

from cluster.cli import options
from cluster.rpc.inference_client import InferenceClient, ServerStatus

EXAMPLES = "Example: remuda status --json"


def status(
    target: options.Target = options.DEFAULT,
    api_key_file: options.ApiKeyFile = None,
    as_json: options.Json = False,
) -> None:
    """Show what a running server serves, with which replicas, and the state of every rank."""
    with InferenceClient(target, options.read_api_key(api_key_file)) as client:
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
                "error": replica.error,
                "ranks": [
                    {"rank": rank.rank, "pid": rank.pid, "host": rank.host, "device": rank.device, "state": rank.state}
                    for rank in replica.ranks
                ],
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
        if replica.error:
            print(f"  {replica.error}")
        for rank in replica.ranks:
            print(f"  rank {rank.rank}: {rank.state}, {rank.device} on {rank.host}, pid {rank.pid}")
