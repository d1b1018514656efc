"""The options of ``remuda serve`` as typer shows them. None: not given on the command line."""

from pathlib import Path
from typing import Annotated

import typer

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
SpareRanks = Annotated[
    int | None,
    typer.Option(help="Processes per host that stand by to take a lost CPU rank's place within a second. [0]"),
]
SecretFile = Annotated[
    Path | None,
    typer.Option(help="File with the secret that leaders ask of front ends, for remuda frontend. [a new secret]"),
]
TensorParallelSize = Annotated[
    int | None, typer.Option("--tensor-parallel-size", "--tp", help="Ranks that share each layer. [1]")
]
PipelineParallelSize = Annotated[
    int | None, typer.Option("--pipeline-parallel-size", "--pp", help="Stages of layers, each on ranks of its own. [1]")
]
DataParallelSize = Annotated[
    int | None, typer.Option("--data-parallel-size", "--dp", help="Attention replicas that share the experts. [1]")
]
ExpertParallelSize = Annotated[
    int | None, typer.Option("--expert-parallel-size", "--ep", help="Ranks that share out the experts. [1]")
]
EnableEplb = Annotated[
    bool | None,
    typer.Option("--enable-eplb", help="Move experts between their ranks as their loads ask for it. [no]"),
]
NumRedundantExperts = Annotated[
    int | None,
    typer.Option(help="Room for copies of busy experts in each layer, over all ranks; a multiple of --ep. [0]"),
]
MaxReplicas = Annotated[
    int | None, typer.Option(help="Add copies up to so many while requests wait. [as many as --replicas]")
]
TpAcrossHosts = Annotated[
    bool | None,
    typer.Option("--tp-across-hosts", help="A layer's ranks may be on several hosts where no host has room for all."),
]
Replicas = Annotated[int | None, typer.Option(help="Whole copies of the model. [1]")]
Host = Annotated[str | None, typer.Option(help="Address of both APIs. [127.0.0.1]")]
Port = Annotated[int | None, typer.Option(help="HTTP port. [8000]")]
GrpcPort = Annotated[int | None, typer.Option(help="gRPC port. [50051]")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32 or bfloat16. [auto: the checkpoint's]")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda. [auto]")]
MaxModelLen = Annotated[str | None, typer.Option(help="Tokens of one request, or auto for the most that fits. [auto]")]
MaxNumSeqs = Annotated[int | None, typer.Option(help="Requests that run at once. [by device]")]
MaxNumBatchedTokens = Annotated[int | None, typer.Option(help="Tokens in one step. [by device]")]
GpuMemoryUtilization = Annotated[float | None, typer.Option(help="Share of each GPU's memory. [0.9]")]
KvCacheMemory = Annotated[str | None, typer.Option(help="KV cache of each CPU rank. [512MiB]")]
LoadFormat = Annotated[
    str | None, typer.Option(help="safetensors, or dummy (random weights, for sizing). [safetensors]")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model. [main]")]
Quantization = Annotated[
    str | None, typer.Option(help="int8, int4 or fp8: quantize a float checkpoint while loading. [as it is]")
]
ServedModelName = Annotated[str | None, typer.Option(help="Name for clients. [the model's last part]")]
MaxLoras = Annotated[int | None, typer.Option(help="Adapters that may be loaded at once. [8]")]
GuidedDecodingBackend = Annotated[
    str | None,
    typer.Option(help="What follows grammars: llguidance, or xgrammar where that extra is installed. [llguidance]"),
]
AttentionBackend = Annotated[
    str | None,
    typer.Option(help="Attention on GPUs: auto, triton (our kernels), or flashinfer where it is installed. [auto]"),
]
AsyncScheduling = Annotated[
    bool | None,
    typer.Option(
        "--async-scheduling/--no-async-scheduling", help="Send the next step's plan while a step runs. [on GPUs]"
    ),
]
EnablePrefixCaching = Annotated[
    bool | None,
    typer.Option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        help="Requests share what the KV cache holds of equal beginnings. [yes]",
    ),
]
MaxLoraRank = Annotated[int | None, typer.Option(help="Largest rank of an adapter. [64]")]
ApiKeyFile = Annotated[Path | None, typer.Option(help="Keys that clients may use; see remuda keys. [no keys]")]
SecurityFile = Annotated[
    Path | None, typer.Option(help="YAML: tokens, certificates, gateways, TLS; see docs/security.md. [nothing of it]")
]
Insecure = Annotated[
    bool | None, typer.Option("--insecure", help="Let everybody in at a --host that others reach. [no]")
]
Tenants = Annotated[
    Path | None,
    typer.Option(help="YAML or JSON file with each tenant's limits; read again when it changes. [no limits]"),
]
LimitsStore = Annotated[
    str | None,
    typer.Option(
        metavar="redis://HOST:PORT/N", help="Where several front ends keep limits and usage. [each by itself]"
    ),
]
LimitsStorePasswordFile = Annotated[Path | None, typer.Option(help="File with that store's password. [none]")]
UsageLog = Annotated[Path | None, typer.Option(help="File that gets one JSON line for what each request used. [none]")]
AuditLog = Annotated[
    Path | None, typer.Option(help="File that gets one JSON line per request, however it ended; no text. [none]")
]
OtlpEndpoint = Annotated[
    str | None,
    typer.Option(
        metavar="http://HOST:PORT",
        help="OpenTelemetry collector (OTLP over gRPC) that gets traces. [OTEL_EXPORTER_OTLP_ENDPOINT, or none]",
    ),
]
LogFormat = Annotated[
    str | None, typer.Option(metavar="text|json", help="json: a line of JSON per event, with request and trace. [text]")
]
Address = Annotated[str | None, typer.Option(help="host:port of a running Ray to join. [a private one is started]")]
CpuSlots = Annotated[int | None, typer.Option(help="CPU ranks this host may hold. [8]")]
Deterministic = Annotated[
    str | None,
    typer.Option(
        metavar="[d1|d2]",
        help="A request's tokens and logits do not depend on its batch (d1, meant by the flag alone), nor on the "
        "layout (d2). [off]",
    ),
]
Pooling = Annotated[
    str | None,
    typer.Option(metavar="last|mean", help="Hidden states that embeddings are made of: the last, or all. [last]"),
]
RequestTimeout = Annotated[float | None, typer.Option(help="Seconds that a request may take. [600]")]
QueueTimeout = Annotated[float | None, typer.Option(help="Seconds that it may wait before it runs. [60]")]
FirstTokenTimeout = Annotated[float | None, typer.Option(help="Seconds until its first token. [120]")]
Config = Annotated[Path | None, typer.Option(help="YAML file with the same options, with underscores.")]
