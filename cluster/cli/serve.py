"""``remuda serve``: the options, and nothing else."""

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.serve_run import run
from cluster.config import load_serve_config

EXAMPLES = (
    "Examples: remuda serve | remuda serve /models/Llama-3.1-8B --tp 2 | "
    "remuda serve meta-llama/Llama-3.2-1B --address 10.0.0.1:6379"
)

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        help="A directory in Hugging Face form, a hub id, or remuda-tiny (the default).", show_default=False
    ),
]
LoraModules = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=PATH", help="LoRA adapter to load, once for each; clients name it as model. [none]"),
]
LoraDirectory = Annotated[Path | None, typer.Option(help="Adapters below it may be loaded while serving. [none may]")]
DrainTimeout = Annotated[float | None, typer.Option(help="Seconds that running requests get after SIGTERM. [30]")]


def serve(
    model: ModelArgument = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option("--tensor-parallel-size", "--tp", help="Ranks that share each layer. [1]")
    ] = None,
    pipeline_parallel_size: Annotated[
        int | None, typer.Option("--pipeline-parallel-size", "--pp", help="Stages of layers. [1; more comes later]")
    ] = None,
    data_parallel_size: Annotated[
        int | None, typer.Option("--data-parallel-size", "--dp", help="Attention replicas. [1; more comes later]")
    ] = None,
    expert_parallel_size: Annotated[
        int | None, typer.Option("--expert-parallel-size", "--ep", help="Ranks that share out the experts. [1]")
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="Whole copies of the model. [1]")] = None,
    host: Annotated[str | None, typer.Option(help="Address of both APIs. [127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port. [8000]")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="gRPC port. [50051]")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16. [auto: the checkpoint's]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda. [auto]")] = None,
    max_model_len: Annotated[
        str | None, typer.Option(help="Tokens of one request, or auto for the most that fits. [auto]")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Requests that run at once. [by device]")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Tokens in one step. [by device]")] = None,
    gpu_memory_utilization: Annotated[float | None, typer.Option(help="Share of each GPU's memory. [0.9]")] = None,
    kv_cache_memory: Annotated[str | None, typer.Option(help="KV cache of each CPU rank. [512MiB]")] = None,
    load_format: Annotated[
        str | None, typer.Option(help="safetensors, or dummy (random weights, for sizing). [safetensors]")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model. [main]")] = None,
    quantization: Annotated[
        str | None, typer.Option(help="int8, int4 or fp8: quantize a float checkpoint while loading. [as it is]")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name for clients. [the model's last part]")] = None,
    lora_modules: LoraModules = None,
    lora_dir: LoraDirectory = None,
    max_loras: Annotated[int | None, typer.Option(help="Adapters that may be loaded at once. [8]")] = None,
    max_lora_rank: Annotated[int | None, typer.Option(help="Largest rank of an adapter. [64]")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with one API key per line. [no keys]")] = None,
    address: Annotated[
        str | None, typer.Option(help="host:port of a running Ray to join. [a private one is started]")
    ] = None,
    cpu_slots: Annotated[int | None, typer.Option(help="CPU ranks this host may hold. [8]")] = None,
    deterministic: Annotated[bool | None, typer.Option("--deterministic", help="Comes in a later version.")] = None,
    request_timeout: Annotated[float | None, typer.Option(help="Seconds that a request may take. [600]")] = None,
    queue_timeout: Annotated[float | None, typer.Option(help="Seconds that it may wait before it runs. [60]")] = None,
    first_token_timeout: Annotated[float | None, typer.Option(help="Seconds until its first token. [120]")] = None,
    drain_timeout: DrainTimeout = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with the same options, with underscores.")] = None,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API and over gRPC.

    Every option can also be set in the environment (REMUDA_TENSOR_PARALLEL_SIZE=2) or in a --config file; a flag wins
    over the environment, which wins over the file. Ctrl-C or SIGTERM finishes running requests and stops everything
    that was started.
    """
    flags = {name: value for name, value in locals().items() if name != "config"}
    raise typer.Exit(run(load_serve_config(flags, config)))
