"""``remuda drain``: no new work; what runs may finish."""

import json
import sys
from typing import Annotated

import typer

from cluster.cli import options

EXAMPLES = "Example: remuda drain"


def drain(
    replica: Annotated[str, typer.Argument(help="Id of one replica; without it, all.")] = "",
    target: options.Target = options.DEFAULT,
    api_key_file: options.ApiKeyFile = None,
    ca_file: options.CaFile = None,
    certificate_file: options.CertificateFile = None,
    as_json: options.Json = False,
) -> None:
    """Take no more work and let what runs finish; follow it with remuda status."""
    with options.connect(target, api_key_file, ca_file, certificate_file) as client:
        left = client.drain(replica)
    if as_json:
        sys.stdout.write(json.dumps({"num_live_requests": left}) + "\n")
    else:
        sys.stdout.write(f"draining {replica or 'all replicas'}; {left} requests still run\n")
