"""A server that asks who calls: its files, and credentials to show it, right ones and wrong ones.

``python -m tests.fuzz.guarded FOLDER`` makes the files for a server that is started by hand.
"""

import base64
import json
import ssl
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Self

from typer.testing import CliRunner

from cluster.cli.main import app
from tests.identity.authority import Authority, b64, write_pair

SECURITY_FILE, KEYS_FILE = "security.yaml", "keys.jsonl"
_SCOPES: dict[str, tuple[str, ...]] = {
    "infer": ("infer",),
    "infer-2": ("infer",),
    "admin": ("admin",),
    "metrics": ("metrics",),
    "all": ("infer", "admin", "metrics"),
    "revoked": ("infer", "admin", "metrics"),
    "expired": ("infer", "admin", "metrics"),
}
_GOOD = ("infer", "infer", "infer-2", "admin", "metrics", "all")
_PIECE_CHARS, _PIECE_STEP = 12, 4
"""Whatever repeats 15 characters of a secret has one of its pieces; one found by chance takes 16^12 tries."""
_RIGHT_SHARE = 0.5


@dataclass(frozen=True)
class Shown:
    """What a request shows of its identity. ``scopes``: what that may; none: it is wrong. ``is_text``: printable ASCII,
    so that the answer is our decision and not that of a parser before it."""

    name: str
    pairs: tuple[tuple[bytes, bytes], ...]
    scopes: frozenset[str] = frozenset()
    is_text: bool = True

    @property
    def lines(self) -> bytes:
        """As headers of HTTP/1.1."""
        return b"".join(b"%b: %b\r\n" % pair for pair in self.pairs)


@dataclass(frozen=True)
class Guard:
    """Args:
    folder: of the files.
    keys: by what they are for; ``revoked`` and ``expired`` are not good any more.
    health_port: of the server's probes, in clear text.
    """

    folder: Path
    keys: dict[str, str] = field(repr=False)
    health_port: int = 0

    @classmethod
    def make(cls, folder: Path, health_port: int = 0) -> Self:
        """Writes the files. ``health_port``: 0: any free one."""
        servers = Authority("servers")
        (folder / "servers.pem").write_bytes(servers.pem)
        write_pair(folder, "server", servers.issue_for_host())
        file = str(folder / KEYS_FILE)
        made = {}
        for name, scopes in _SCOPES.items():
            more = ["--expires", "1s"] if name == "expired" else []
            named = [argument for scope in scopes for argument in ("--scope", scope)]
            made[name] = _remuda("keys", "create", "--file", file, "--tenant", name, "--json", *named, *more)
        _remuda("keys", "revoke", made["revoked"]["id"], "--file", file, "--json")
        keys = {name: one["key"] for name, one in made.items()}
        (folder / "keys.json").write_text(json.dumps(keys))
        section = {"certificate_file": "server.crt", "key_file": "server.key", "health_port": health_port}
        (folder / SECURITY_FILE).write_text(json.dumps({"api_keys": {"file": KEYS_FILE}, "tls": section}))
        return cls(folder, keys, health_port)

    @classmethod
    def read(cls, folder: Path) -> Self:
        return cls(folder, json.loads((folder / "keys.json").read_text()))

    def context(self, *protocols: str) -> ssl.SSLContext:
        """A client's."""
        context = ssl.create_default_context(cafile=self.folder / "servers.pem")
        if protocols:
            context.set_alpn_protocols(protocols)
        return context

    def shown(self, rng: Random) -> Shown:
        """Credentials, good ones and others."""
        if rng.random() < _RIGHT_SHARE:
            name = rng.choice(_GOOD)
            key = self.keys[name].encode()
            pair = rng.choice(((b"authorization", b"Bearer " + key), (b"x-api-key", key)))
            return Shown(f"key {name}", (pair,), frozenset(_SCOPES[name]))
        maker = rng.choice((self._nothing, self._dead, self._near, self._near, self._other_schemes, self._several))
        return rng.choice((maker, maker, self._malformed))(rng)

    def pieces(self) -> list[bytes]:
        """Parts of what nobody may be told."""
        secrets = [key.rpartition("_")[2].encode() for key in self.keys.values()]
        return [
            secret[start : start + _PIECE_CHARS]
            for secret in secrets
            for start in range(0, len(secret) - _PIECE_CHARS + 1, _PIECE_STEP)
        ]

    def _nothing(self, rng: Random) -> Shown:
        """None at all, or claims that only a gateway may make."""
        claims: tuple[tuple[bytes, bytes], ...] = (
            (b"x-remuda-tenant", b"infer"),
            (b"x-remuda-key", b"infer"),
            (b"x-forwarded-client-cert", b"URI=spiffe://corp/client"),
            (b"x-forwarded-for", b"127.0.0.1"),
        )
        return Shown("nothing", tuple(rng.sample(claims, rng.choice((0, 0, 1, 4)))))

    def _dead(self, rng: Random) -> Shown:
        name = rng.choice(("revoked", "expired"))
        return _bearer(name, self.keys[name].encode(), rng)

    def _near(self, rng: Random) -> Shown:
        """Nearly a good key."""
        key, other = self.keys["all"], self.keys["infer"]
        at = rng.randrange(len(key))
        wrong: tuple[str, ...] = (
            key[:at] + ("0" if key[at] != "0" else "1") + key[at + 1 :],
            key[:at],
            key + "0",
            key + rng.choice((",", ";", "\\", "=", "%00")),
            key[1:],
            key.upper(),
            f"{key},{other}",
            key.rpartition("_")[0],
            key.rpartition("_")[0] + "_",
            f"{key.rpartition('_')[0]}_{other.rpartition('_')[2]}",
            key.rpartition("_")[2],
            "rmd_" + "0" * 12 + "_" + "0" * 64,
            "*",
            "' or 1=1 --",
        )
        return _bearer("near", rng.choice(wrong).encode(), rng)

    def _other_schemes(self, rng: Random) -> Shown:
        """A good key where none is looked for, and tokens that nobody signed."""
        key = self.keys["all"].encode()
        unsigned = ".".join(
            b64(json.dumps(part).encode()) for part in ({"alg": "none"}, {"iss": "a", "sub": "b", "exp": 2**33})
        )
        return rng.choice(
            (
                Shown("basic", ((b"authorization", b"Basic " + base64.b64encode(b"user:" + key)),)),
                Shown("scheme", ((b"authorization", b"Token " + key),)),
                Shown("no scheme", ((b"authorization", key),)),
                Shown("tab", ((b"authorization", b"Bearer\t" + key),)),
                Shown("cookie", ((b"cookie", b"authorization=" + key),)),
                Shown("proxy", ((b"proxy-authorization", b"Bearer " + key),)),
                Shown("token", ((b"authorization", f"Bearer {unsigned}.".encode()),)),
            )
        )

    def _several(self, rng: Random) -> Shown:
        """Which of them counts would be anybody's guess, but for a bad Authorization beside a good key."""
        key, other = self.keys["all"].encode(), self.keys["infer"].encode()
        bearer = (b"authorization", b"Bearer " + key)
        return rng.choice(
            (
                Shown("twice", (bearer, bearer)),
                Shown("two keys", (bearer, (b"authorization", b"Bearer " + other))),
                Shown("good and bad", (bearer, (b"authorization", b"Bearer a"))),
                Shown("bad and good", ((b"authorization", b"Bearer a"), (b"x-api-key", key))),
                Shown("two of x-api-key", ((b"x-api-key", key), (b"x-api-key", other))),
            )
        )

    def _malformed(self, rng: Random) -> Shown:
        key = self.keys["all"].encode()
        wrong: tuple[bytes, ...] = (
            b"Bearer " + key[:-1] + b"\xff",
            b"Bearer \xff" + key,
            b"Bearer " + key[:20] + b"\x00" + key[20:],
            b"Bearer " + key[:20] + b"\x7f" + key[20:],
            b"\xc2\xa0Bearer " + key,
            b"Bearer " + "\N{FULLWIDTH LATIN SMALL LETTER R}".encode() + key[1:],
            b"Bearer " + b"a" * 9000,
            b"Bearer " + rng.randbytes(40).replace(b"\r", b"").replace(b"\n", b""),
        )
        return Shown("malformed", ((rng.choice((b"authorization", b"x-api-key")), rng.choice(wrong)),), is_text=False)


def _bearer(name: str, key: bytes, rng: Random) -> Shown:
    return Shown(name, (rng.choice(((b"authorization", b"Bearer " + key), (b"x-api-key", key))),))


def _remuda(*arguments: str) -> dict[str, Any]:
    invoke: Callable[..., Any] = CliRunner().invoke
    result = invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


if __name__ == "__main__":
    made = Path(sys.argv[1])
    made.mkdir(parents=True, exist_ok=True)
    Guard.make(made)
    print(f"remuda serve --security-file {made / SECURITY_FILE}")
