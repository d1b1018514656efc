"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.config import DEFAULT_TARGET
from cluster.identity.tls import client_credentials
from cluster.rpc.inference_client import InferenceClient
from engine.errors import InvalidOption

Target = Annotated[str, typer.Option(help="host:port of the server's gRPC API.", envvar="REMUDA_TARGET")]
ApiKeyFile = Annotated[
    Path | None, typer.Option(help="File whose first line is the API key.", envvar="REMUDA_API_KEY_FILE")
]
CaFile = Annotated[
    Path | None, typer.Option(help="PEM of who signed the server's certificate; TLS.", envvar="REMUDA_CA_FILE")
]
CertificateFile = Annotated[
    Path | None,
    typer.Option(help="PEM of your own certificate and its key, where asked for.", envvar="REMUDA_CERTIFICATE_FILE"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy. Default: the checkpoint's own.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the smallest set with this much probability.")]
Seed = Annotated[int | None, typer.Option(help="Makes a sampled answer repeatable.")]
Model = Annotated[str, typer.Option(help="Served model name. Default: the only one.")]

DEFAULT = DEFAULT_TARGET


def read_api_key(file: Path | None) -> str | None:
    """The first line of ``file``. Raises InvalidOption."""
    if file is None:
        return None
    try:
        lines = file.read_text(encoding="utf-8").split("\n", 1)
    except OSError as error:
        raise InvalidOption(f"--api-key-file {file} cannot be read: {error.strerror}") from error
    if not lines[0].strip():
        raise InvalidOption(f"--api-key-file {file} has an empty first line")
    if lines[0].startswith("{"):
        raise InvalidOption(
            f"--api-key-file {file} is a server's keys file; give a file with the key that remuda keys create printed"
        )
    return lines[0].strip()


def connect(
    target: str, api_key_file: Path | None, ca_file: Path | None, certificate_file: Path | None
) -> InferenceClient:
    """A client of the gRPC API at ``target``: in plain text, or with TLS where a CA is named. Raises InvalidOption."""
    credentials = None if ca_file is None else client_credentials(ca_file, certificate_file, certificate_file)
    if credentials is None and certificate_file is not None:
        raise InvalidOption("--certificate-file goes with --ca-file: only TLS shows certificates")
    return InferenceClient(target, read_api_key(api_key_file), credentials=credentials)
