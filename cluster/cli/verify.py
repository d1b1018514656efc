"""``remuda verify``: write the manifest of a checkpoint's hashes, or check its files against it."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from cluster.cli import options
from cluster.config import load_serve_config
from engine.weights.manifest import Manifest, manifest_path, read_manifest, write_manifest
from engine.weights.verification import Damage, ProgressCallback, describe, find_damage, make_manifest

EXAMPLES = (
    "Examples: remuda verify /models/Llama-3.1-8B | remuda verify model.gguf --json | "
    "remuda verify /models/Llama-3.1-8B --golden --tp 2"
)

_TensorParallelSize = Annotated[
    int, typer.Option("--tensor-parallel-size", "--tp", min=1, help="With --golden, as of serve.")
]
_PipelineParallelSize = Annotated[
    int, typer.Option("--pipeline-parallel-size", "--pp", min=1, help="With --golden, as of serve.")
]
_DataParallelSize = Annotated[
    int, typer.Option("--data-parallel-size", "--dp", min=1, help="With --golden, as of serve.")
]
_ExpertParallelSize = Annotated[
    int, typer.Option("--expert-parallel-size", "--ep", min=1, help="With --golden, as of serve.")
]


def verify(
    checkpoint: Annotated[Path, typer.Argument(help="A directory with safetensors, or a GGUF file.")],
    manifest: Annotated[
        Path | None,
        typer.Option(help="Where the manifest is. [in the directory; serving looks only there]", show_default=False),
    ] = None,
    golden: Annotated[
        bool,
        typer.Option("--golden", help="Record what the model gives, for replicas to reproduce before they serve."),
    ] = False,
    tensor_parallel_size: _TensorParallelSize = 1,
    pipeline_parallel_size: _PipelineParallelSize = 1,
    data_parallel_size: _DataParallelSize = 1,
    expert_parallel_size: _ExpertParallelSize = 1,
    dtype: Annotated[str, typer.Option(help="With --golden: auto, float32 or bfloat16.")] = "auto",
    quantization: Annotated[str | None, typer.Option(help="With --golden: int8, int4 or fp8.")] = None,
    as_json: options.Json = False,
) -> None:
    """Check a checkpoint's files against its manifest of hashes; the first time, write the manifest.

    Names the files, ranges of bytes and tensors that are damaged. Where a manifest is in place, serving checks it while
    it loads. What lies in the hub's cache is compared with the hub's own hashes when the manifest is written.

    With --golden: load the model, continue a few prompts greedily, and write tokens and log-probabilities beside the
    manifest. Replicas of it that do not reproduce them do not become ready. Record on a machine that you trust.

    Exit status 0: written, or all is as it was; 1: something differs; 2: there is nothing to check.
    """
    if golden:
        flags = {
            "model": str(checkpoint),
            "tensor_parallel_size": tensor_parallel_size,
            "pipeline_parallel_size": pipeline_parallel_size,
            "data_parallel_size": data_parallel_size,
            "expert_parallel_size": expert_parallel_size,
            "dtype": dtype,
            "quantization": quantization,
        }
        _record(flags, as_json=as_json)
        return
    path = manifest or manifest_path(checkpoint)
    with _progress() as on_progress:
        try:
            found, is_new = read_manifest(path), False
        except FileNotFoundError:
            is_new = True
            found, damage = make_manifest(checkpoint, on_progress)
        else:
            damage = find_damage(checkpoint, found, on_progress)
    if is_new and not damage:
        write_manifest(path, found)
    if as_json:
        sys.stdout.write(json.dumps(_as_object(checkpoint, path, found, is_new, damage)) + "\n")
    else:
        _print_text(path, found, is_new, damage)
    raise typer.Exit(1 if damage else 0)


def _record(flags: dict[str, Any], *, as_json: bool) -> None:
    from cluster.doctor.config import quiet_torch

    quiet_torch()
    # What it needs takes seconds to import.
    from cluster.cli.golden import record

    found = record(load_serve_config(flags))
    if as_json:
        answer = {"checkpoint": flags["model"], "golden": str(found.path), "action": "recorded", "ok": True}
        sys.stdout.write(json.dumps(answer | {"num_prompts": found.num_prompts}) + "\n")
    else:
        print(f"wrote {found.path}: {found.num_prompts} prompts, {found.num_tokens} tokens after each")


@contextmanager
def _progress() -> Iterator[ProgressCallback]:
    """A bar on stderr, if that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("hashing"), BarColumn(), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("hashing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _as_object(
    checkpoint: Path, path: Path, manifest: Manifest, is_new: bool, damage: Sequence[Damage]
) -> dict[str, Any]:
    return {
        "checkpoint": str(checkpoint),
        "manifest": str(path),
        "action": "written" if is_new and not damage else "checked",
        "ok": not damage,
        "num_files": len(manifest.files),
        "num_bytes": sum(record.size for record in manifest.files.values()),
        "damage": [asdict(item) for item in damage],
    }


def _print_text(path: Path, manifest: Manifest, is_new: bool, damage: Sequence[Damage]) -> None:
    num_bytes = sum(record.size for record in manifest.files.values())
    for item in damage:
        print(describe(item))
    if damage:
        remedy = "download again what is damaged"
        if not is_new:
            remedy += f", or delete {path} and run this once more if the change is meant"
        print(f"{len(damage)} {'difference' if len(damage) == 1 else 'differences'}; {remedy}")
    else:
        what = f"wrote {path}" if is_new else f"all is as {path} says"
        print(f"{what}: {len(manifest.files)} files, {num_bytes:,} bytes")
