"""What a process runs: package versions, our own files, the checkpoint. Ranks tell their leader, the doctor compares
hosts. Imports neither torch nor Ray."""

import hashlib
import importlib.util
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cluster.errors import StartFailed
from engine.errors import CheckpointError
from engine.weights.identity import checkpoint_identity

# Those whose versions decide what ranks compute or how they talk to each other.
PACKAGES = ("remuda", "ray", "torch", "numpy", "safetensors", "msgspec", "grpcio", "protobuf", "tokenizers")
CODE, CHECKPOINT = "remuda's files", "checkpoint"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def code_digest() -> str:
    """Of our own Python files: two hosts may call different code by one version."""
    digest = hashlib.blake2b(digest_size=8)
    for package in ("cluster", "engine"):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        root = Path(spec.submodule_search_locations[0])
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def software() -> dict[str, str]:
    """By name, as it lies on the disk: to be asked when a process begins, for files may change under it."""
    return versions() | {CODE: code_digest()}


def with_checkpoint(software: Mapping[str, str], checkpoint: Path) -> dict[str, str]:
    """Reads samples of the weights, no more. Raises CheckpointError where they cannot be read."""
    try:
        return {**software, CHECKPOINT: checkpoint_identity(checkpoint)}
    except OSError as error:
        raise CheckpointError(f"{checkpoint} cannot be read: {error}") from error


def check_same(rank: str, theirs: Mapping[str, str], leader_host: str, ours: Mapping[str, str]) -> None:
    """Raises StartFailed where a rank runs something else than its leader.

    Args:
        rank: names the rank and its host.
    """
    odd = [name for name in ours if theirs.get(name) != ours[name]]
    if not odd:
        return
    found = ", ".join(f"{name} {theirs.get(name, 'not told')}" for name in odd)
    wanted = ", ".join(f"{name} {ours[name]}" for name in odd)
    remedies = ["install the same wheels there"] * (odd != [CHECKPOINT])
    remedies += ["copy the same checkpoint there"] * (CHECKPOINT in odd)
    raise StartFailed(
        f"{rank} may not join: {found}, where the leader on {leader_host} has {wanted}; {' and '.join(remedies)}"
    )
