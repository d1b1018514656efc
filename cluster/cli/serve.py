"""``remuda serve``: the options, and nothing else."""

from typing import Any

import typer

from cluster.cli import serve_options as options
from cluster.cli.serve_run import run
from cluster.config import load_serve_config

EXAMPLES = (
    "Examples: remuda serve | remuda serve /models/Llama-3.1-8B --tp 2 | "
    "remuda serve meta-llama/Llama-3.2-1B --address 10.0.0.1:6379 | "
    "remuda serve /models/Mixtral-8x7B --tp 4 --ep 4 --enable-eplb --num-redundant-experts 4 | "
    "remuda serve --tp 2 --deterministic"
)


def serve(
    model: options.ModelArgument = None,
    tensor_parallel_size: options.TensorParallelSize = None,
    pipeline_parallel_size: options.PipelineParallelSize = None,
    data_parallel_size: options.DataParallelSize = None,
    expert_parallel_size: options.ExpertParallelSize = None,
    enable_eplb: options.EnableEplb = None,
    num_redundant_experts: options.NumRedundantExperts = None,
    replicas: options.Replicas = None,
    max_replicas: options.MaxReplicas = None,
    tp_across_hosts: options.TpAcrossHosts = None,
    host: options.Host = None,
    port: options.Port = None,
    grpc_port: options.GrpcPort = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = None,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    gpu_memory_utilization: options.GpuMemoryUtilization = None,
    kv_cache_memory: options.KvCacheMemory = None,
    load_format: options.LoadFormat = None,
    revision: options.Revision = None,
    quantization: options.Quantization = None,
    served_model_name: options.ServedModelName = None,
    lora_modules: options.LoraModules = None,
    lora_dir: options.LoraDirectory = None,
    max_loras: options.MaxLoras = None,
    max_lora_rank: options.MaxLoraRank = None,
    enable_prefix_caching: options.EnablePrefixCaching = None,
    async_scheduling: options.AsyncScheduling = None,
    guided_decoding_backend: options.GuidedDecodingBackend = None,
    attention_backend: options.AttentionBackend = None,
    api_key_file: options.ApiKeyFile = None,
    security_file: options.SecurityFile = None,
    insecure: options.Insecure = None,
    tenants: options.Tenants = None,
    limits_store: options.LimitsStore = None,
    limits_store_password_file: options.LimitsStorePasswordFile = None,
    usage_log: options.UsageLog = None,
    audit_log: options.AuditLog = None,
    address: options.Address = None,
    cpu_slots: options.CpuSlots = None,
    spare_ranks: options.SpareRanks = None,
    secret_file: options.SecretFile = None,
    deterministic: options.Deterministic = None,
    pooling: options.Pooling = None,
    request_timeout: options.RequestTimeout = None,
    queue_timeout: options.QueueTimeout = None,
    first_token_timeout: options.FirstTokenTimeout = None,
    drain_timeout: options.DrainTimeout = None,
    otlp_endpoint: options.OtlpEndpoint = None,
    log_format: options.LogFormat = None,
    config: options.Config = None,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API and over gRPC; Ctrl-C lets running requests finish.

    Options may also stand in the environment (REMUDA_TENSOR_PARALLEL_SIZE=2), which wins over a --config file.
    """
    raise typer.Exit(_serve(locals()))


def _serve(options_given: dict[str, Any]) -> int:
    flags = {name: value for name, value in options_given.items() if name != "config"}
    return run(load_serve_config(flags, options_given["config"]))
