"""``remuda keys``: the API keys of a server, in the file that its front ends watch."""

import json
import re
import secrets
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from cluster.cli import options
from cluster.identity.key_file import KeyRecord, changing, default_pepper_file, new_key, pepper_for, read_key_file
from cluster.identity.principal import DEFAULT_TENANT, INFER
from engine.errors import InvalidOption

app = typer.Typer(help="Create, list and revoke the API keys of a server.", no_args_is_help=True)

_FILE_HELP = "The keys file that --api-key-file names at the server; it is made if need be."
File = Annotated[Path, typer.Option(help=_FILE_HELP, envvar="REMUDA_API_KEY_FILE")]
Pepper = Annotated[Path | None, typer.Option(help="The server's secret, in a file. [FILE.pepper]", show_default=False)]

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@app.command(
    epilog="Examples: remuda keys create --file keys.jsonl --tenant team-a --expires 90d | "
    "remuda keys create --file keys.jsonl --tenant ops --scope admin --scope metrics > ops.key"
)
def create(
    file: File,
    tenant: Annotated[str, typer.Option(help="Whom requests with this key are counted for.")] = DEFAULT_TENANT,
    scope: Annotated[list[str], typer.Option(help="infer, admin or metrics; once for each.")] = [INFER],  # noqa: B006
    name: Annotated[str, typer.Option(help="What you know the key by.")] = "",
    expires: Annotated[str, typer.Option(help="After so long, as in 12h or 90d. [never]", show_default=False)] = "",
    pepper_file: Pepper = None,
    as_json: options.Json = False,
) -> None:
    """Make a key and print it, once: the file has only its HMAC. Running servers take it within seconds."""
    lifetime_s = _seconds(expires) if expires else None
    with changing(file) as records:
        pepper = pepper_for(pepper_file or default_pepper_file(file), file, records, secrets.token_bytes)
        key, record = new_key(tenant, scope, pepper, time.time(), secrets.token_bytes, name, lifetime_s)
        records.append(record)
    if as_json:
        sys.stdout.write(json.dumps({"key": key, **_as_object(record, time.time())}) + "\n")
    else:
        sys.stdout.write(key + "\n")
        print(f"key {record.id} of tenant {tenant} may {', '.join(record.scopes)}", file=sys.stderr)


@app.command(name="list", epilog="Example: remuda keys list --file keys.jsonl --json")
def list_keys(file: File, as_json: options.Json = False) -> None:
    """Show the keys: whose they are, what they may, and until when. The keys themselves are not known any more."""
    found, now_unix_s = read_key_file(file), time.time()
    if as_json:
        sys.stdout.write(json.dumps([_as_object(record, now_unix_s) for record in found.records]) + "\n")
        return
    for record in found.records:
        expires = "" if record.expires_unix_s is None else f", expires {_date(record.expires_unix_s)}"
        name = f" ({record.name})" if record.name else ""
        scopes, state = "+".join(record.scopes), record.state(now_unix_s)
        print(f"{record.id}  {record.tenant}{name}  {scopes}  {state}, created {_date(record.created_unix_s)}{expires}")
    if found.plain:
        print(f"and {len(found.plain)} in plain text, of the tenant {DEFAULT_TENANT}, which may do everything")


@app.command(epilog="Example: remuda keys revoke 3f9a0c12be77 --file keys.jsonl")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As remuda keys list shows it.")],
    file: File,
    as_json: options.Json = False,
) -> None:
    """End a key. Running servers refuse it within seconds; its line stays, so that its id keeps its meaning."""
    with changing(file) as records:
        index = next((index for index, record in enumerate(records) if record.id == key_id), None)
        if index is None:
            raise InvalidOption(f"{file} has no key {key_id}; see remuda keys list")
        if records[index].revoked_unix_s is None:
            records[index] = msgspec.structs.replace(records[index], revoked_unix_s=int(time.time()))
        revoked = records[index]
    if as_json:
        sys.stdout.write(json.dumps(_as_object(revoked, time.time())) + "\n")
    else:
        print(f"revoked {key_id} of tenant {revoked.tenant}")


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if match is None or not int(match[1]):
        raise InvalidOption(f"--expires {text}: write a number and s, m, h or d, as in 90d")
    return int(match[1]) * _UNITS_S[match[2]]


def _date(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _as_object(record: KeyRecord, now_unix_s: float) -> dict[str, Any]:
    """All that may be shown."""
    return {
        "id": record.id,
        "tenant": record.tenant,
        "name": record.name,
        "scopes": list(record.scopes),
        "state": record.state(now_unix_s),
        "created_unix_s": record.created_unix_s,
        "expires_unix_s": record.expires_unix_s,
        "revoked_unix_s": record.revoked_unix_s,
    }
