"""Everything that can be refused before any process is started."""

import importlib.util
import secrets
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cluster.config import Device, ServeConfig
from cluster.control.ray_settings import parse_address
from cluster.identity.cluster_tls import ClusterTls
from cluster.identity.config import check_exposure, load_security
from cluster.replica.events import LaunchConfig, ReplicaPlan
from cluster.replica.model_source import ModelSource, resolve
from cluster.rpc.shared_secret import required_secret
from cluster.telemetry.config import otlp_endpoint
from engine.config import Determinism, Dtype, ParallelConfig, SchedulerConfig
from engine.deterministic import deterministic_layout
from engine.errors import InvalidOption, LayoutError
from engine.executor.defaults import default_limits, plans_in_flight
from engine.model_config import ModelConfig, validate_layout
from engine.weights.adapter_config import read_adapter_config


@dataclass(frozen=True)
class Preflight:
    """What the checks found: the launch, the checkpoint on this host, the model and the device of the ranks."""

    launch: LaunchConfig
    directory: Path
    model: ModelConfig


def preflight(config: ServeConfig) -> Preflight:
    """Check options against each other, the checkpoint and this machine.

    Raises InvalidOption, LayoutError, CheckpointError or DoesNotFit; nothing has been started then.
    """
    parallel = ParallelConfig(
        tp=config.tensor_parallel_size,
        pp=config.pipeline_parallel_size,
        dp=config.data_parallel_size,
        ep=config.expert_parallel_size,
        num_redundant_experts=config.num_redundant_experts,
        balances_experts=config.enable_eplb,
    )
    _check_exposure(config)
    _check_backend(config)
    _check_balancing(config)
    device = _device(config)
    num_ranks = parallel.num_ranks * config.replicas
    if config.address is None and device == Device.CPU and num_ranks > config.cpu_slots:
        copies = f", × {config.replicas} replicas = {num_ranks}" if config.replicas > 1 else ""
        raise LayoutError(
            f"{parallel.product}{copies}: more than the {config.cpu_slots} CPU slots of this host; raise --cpu-slots "
            "or lower the degrees"
        )
    check_attention(config.attention_backend, device, is_deterministic=config.deterministic is not Determinism.OFF)
    source = resolve(config.model, config.revision)
    directory = source.directory()
    model = ModelConfig.from_directory(directory, config.quantization)
    validate_layout(model, parallel)
    parallel = deterministic_layout(model, parallel, config.deterministic)
    _check_adapters(config)
    launch = _launch_config(config, _replica_plan(config, parallel, device, source, model))
    if _is_device_open(config):
        launch = msgspec.structs.replace(launch, on_gpus=_replica_plan(config, parallel, Device.CUDA, source, model))
    return Preflight(launch, directory, model)


def _check_balancing(config: ServeConfig) -> None:
    """Raises InvalidOption."""
    if config.num_redundant_experts and not config.enable_eplb:
        raise InvalidOption("--num-redundant-experts is room for copies that --enable-eplb makes; give both")
    if config.enable_eplb and config.deterministic is not Determinism.OFF:
        raise InvalidOption(
            "--enable-eplb moves experts, and with them where sums are rounded: it cannot be --deterministic; "
            "leave one of them out"
        )


def _check_adapters(config: ServeConfig) -> None:
    """Raises InvalidOption, and AdapterError where one is not served."""
    if config.deterministic is not Determinism.OFF and (config.lora_modules or config.lora_dir is not None):
        raise InvalidOption(
            "--deterministic does not serve adapters: what they add depends on the batch; leave out --lora-modules and "
            "--lora-dir, or --deterministic"
        )
    if len(config.lora_modules) > config.max_loras:
        raise InvalidOption(
            f"--lora-modules names {len(config.lora_modules)} adapters; --max-loras {config.max_loras} is less"
        )
    if config.name in config.lora_modules:
        raise InvalidOption(f"--lora-modules: {config.name!r} is the base model's name; choose another")
    for path in config.lora_modules.values():
        read_adapter_config(path, config.max_lora_rank)
    if config.lora_dir is not None and not config.lora_dir.is_dir():
        raise InvalidOption(f"--lora-dir {config.lora_dir}: there is no such directory")


def _check_backend(config: ServeConfig) -> None:
    name = config.guided_decoding_backend
    if importlib.util.find_spec(name) is None:
        raise InvalidOption(f"--guided-decoding-backend {name} is not installed; pip install 'remuda[{name}]'")


def check_attention(name: str, device: Device, *, is_deterministic: bool) -> None:
    """Whether GPUs can attend by ``name``. Raises InvalidOption."""
    if name == "auto":
        return
    if device != Device.CUDA:
        raise InvalidOption(f"--attention-backend {name} is for GPUs; on CPUs leave it out")
    if is_deterministic:
        raise InvalidOption(
            f"--deterministic has an attention of its own; leave out --attention-backend {name}, or --deterministic"
        )
    if importlib.util.find_spec(name) is None:
        package = {"flashinfer": "flashinfer-python"}.get(name, name)
        raise InvalidOption(f"--attention-backend {name} is not installed; pip install {package} on every GPU host")


def check_attention_dtype(name: str, dtype: str) -> None:
    """Whether the kind of attention ``name`` has the model's format. Raises InvalidOption."""
    if name == "flashinfer" and dtype != Dtype.BFLOAT16:
        raise InvalidOption(f"--attention-backend flashinfer computes in bfloat16, not {dtype}; add --dtype bfloat16")


def _secret(file: Path | None) -> str:
    """What leaders ask of front ends. Raises InvalidOption."""
    return secrets.token_hex(32) if file is None else required_secret(file)


def _check_exposure(config: ServeConfig) -> None:
    check_exposure(config.host, load_security(config.security_file, config.api_key_file), config.insecure)
    if config.port == config.grpc_port != 0:
        raise InvalidOption(f"--port and --grpc-port are both {config.port}; give each API a port of its own")
    if config.address is not None:
        parse_address(config.address)


def _is_device_open(config: ServeConfig) -> bool:
    """Whether the cluster's hosts decide it, which may have other devices than this one (device_choice.py)."""
    return config.address is not None and config.device == Device.AUTO and config.attention_backend == "auto"


def _device(config: ServeConfig) -> Device:
    """Of the ranks; the CPU where it is open. Raises InvalidOption."""
    if config.address is None:
        return local_device(config.device)
    if _is_device_open(config):
        return Device.CPU
    # What attends by an engine of GPUs alone runs on them.
    return Device.CUDA if config.device == Device.AUTO else config.device


def local_device(wanted: Device) -> Device:
    """Of ranks on this host. Auto means CUDA where the driver's device files are, without importing torch.

    Raises InvalidOption.
    """
    has_cuda = Path("/dev/nvidiactl").exists()
    if wanted == Device.CUDA and not has_cuda:
        raise InvalidOption("--device cuda: this host has no NVIDIA driver; use --device cpu")
    if wanted == Device.AUTO:
        return Device.CUDA if has_cuda else Device.CPU
    return wanted


def _replica_plan(
    config: ServeConfig, parallel: ParallelConfig, device: Device, source: ModelSource, model: ModelConfig
) -> ReplicaPlan:
    max_model_len = None if config.max_model_len == "auto" else config.max_model_len
    if max_model_len is not None and max_model_len > model.max_context_len:
        raise InvalidOption(
            f"--max-model-len {max_model_len} is more than the model's {model.max_context_len} positions"
        )
    dtype = model.dtype.value if config.dtype == "auto" else config.dtype
    check_attention_dtype(config.attention_backend, dtype)
    limits = default_limits(device.value)
    # What is left out gives way to what is given.
    max_num_seqs = config.max_num_seqs or min(limits.max_num_seqs, config.max_num_batched_tokens or limits.max_num_seqs)
    batched = config.max_num_batched_tokens or max(limits.max_num_batched_tokens, max_num_seqs)
    SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=batched)
    return ReplicaPlan(
        model=source.model,
        revision=source.revision,
        served_name=config.name,
        tensor_parallel_size=parallel.tp,
        pipeline_parallel_size=parallel.pp,
        data_parallel_size=parallel.dp,
        expert_parallel_size=parallel.ep,
        determinism=parallel.determinism,
        num_shards=parallel.num_shards,
        num_redundant_experts=parallel.num_redundant_experts,
        balances_experts=parallel.balances_experts,
        guided_decoding_backend=config.guided_decoding_backend,
        attention_backend=config.attention_backend,
        dtype=dtype,
        device=device.value,
        load_format=config.load_format,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=batched,
        gpu_memory_utilization=config.gpu_memory_utilization,
        kv_cache_memory_bytes=config.kv_cache_memory,
        quantization=config.quantization,
        lora_modules={name: str(Path(path).resolve()) for name, path in config.lora_modules.items()},
        max_loras=config.max_loras,
        max_lora_rank=config.max_lora_rank,
        enable_prefix_caching=config.enable_prefix_caching,
        cluster_tls=ClusterTls.of(load_security(config.security_file, config.api_key_file).cluster),
        depth=plans_in_flight(device.value, parallel.pp, config.async_scheduling),
        spare_ranks=config.spare_ranks,
        otlp_endpoint=otlp_endpoint(config.otlp_endpoint),
        log_format=config.log_format,
    )


def _launch_config(config: ServeConfig, plan: ReplicaPlan) -> LaunchConfig:
    return LaunchConfig(
        replica=plan,
        num_replicas=config.replicas,
        address=config.address,
        cpu_slots=config.cpu_slots,
        secret=_secret(config.secret_file),
        tp_across_hosts=config.tp_across_hosts,
        max_replicas=config.max_replicas or config.replicas,
        drain_timeout_s=config.drain_timeout,
    )
