"""``remuda adapters``: the LoRA adapters of a running server."""

import json
import sys
from typing import Annotated

import typer

from cluster.cli import options
from engine.request import AdapterInfo

app = typer.Typer(help="List, load and unload the LoRA adapters of a running server.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Name by which requests choose it.")]


@app.command(name="list", epilog="Example: remuda adapters list --json")
def list_adapters(
    target: options.Target = options.DEFAULT,
    api_key_file: options.ApiKeyFile = None,
    ca_file: options.CaFile = None,
    certificate_file: options.CertificateFile = None,
    as_json: options.Json = False,
) -> None:
    """Show the adapters that requests can name, and the bytes that all ranks hold for each."""
    with options.connect(target, api_key_file, ca_file, certificate_file) as client:
        adapters = client.adapters()
    if as_json:
        sys.stdout.write(json.dumps([_as_object(adapter) for adapter in adapters]) + "\n")
        return
    for adapter in adapters:
        print(f"{adapter.name}: {adapter.num_bytes} bytes, from {adapter.path}")


@app.command(epilog="Example: remuda adapters load poet poet-r16")
def load(
    name: Name,
    path: Annotated[str, typer.Argument(help="Directory as PEFT saves it, below the server's --lora-dir.")],
    target: options.Target = options.DEFAULT,
    api_key_file: options.ApiKeyFile = None,
    ca_file: options.CaFile = None,
    certificate_file: options.CertificateFile = None,
    as_json: options.Json = False,
) -> None:
    """Load an adapter on all replicas, or, where one cannot, on none."""
    with options.connect(target, api_key_file, ca_file, certificate_file) as client:
        adapter = client.load_adapter(name, path)
    if as_json:
        sys.stdout.write(json.dumps(_as_object(adapter)) + "\n")
    else:
        print(f"loaded {adapter.name}: {adapter.num_bytes} bytes, from {adapter.path}")


@app.command(epilog="Example: remuda adapters unload poet")
def unload(
    name: Name,
    target: options.Target = options.DEFAULT,
    api_key_file: options.ApiKeyFile = None,
    ca_file: options.CaFile = None,
    certificate_file: options.CertificateFile = None,
    as_json: options.Json = False,
) -> None:
    """Unload an adapter; returns when the requests that use it have ended."""
    with options.connect(target, api_key_file, ca_file, certificate_file) as client:
        client.unload_adapter(name)
    if as_json:
        sys.stdout.write(json.dumps({"name": name}) + "\n")
    else:
        print(f"unloaded {name}")


def _as_object(adapter: AdapterInfo) -> dict[str, str | int]:
    return {"name": adapter.name, "path": adapter.path, "num_bytes": adapter.num_bytes}
