"""What ``remuda serve`` can be told. A flag wins over the environment (``REMUDA_*``), which wins over the file."""

import difflib
import enum
import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from engine.config import Determinism, GrammarBackend
from engine.errors import InvalidOption
from engine.request import Pooling

EMBEDDED_MODEL = "remuda-tiny"
DEFAULT_TARGET = "127.0.0.1:50051"

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class Device(enum.StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def parse_bytes(text: str | int) -> int:
    """``512MiB``, ``2g``, ``1000`` → bytes. Raises InvalidOption."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", text.lower())
    if match is None:
        raise InvalidOption(f"{text!r} is not a size; write bytes, or a number with KiB, MiB or GiB, as in 512MiB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _bytes_field(value: Any) -> Any:
    return parse_bytes(value) if isinstance(value, str) else value


def _length_field(value: Any) -> Any:
    if value == "auto":
        return value
    if str(value).isdecimal() and int(value) > 0:
        return int(value)
    raise ValueError("write auto or a number of tokens")


def _determinism_field(value: Any) -> Any:
    """The flag alone, and "yes" elsewhere, mean d1."""
    known = {"true": "d1", "1": "d1", "yes": "d1", "false": "off", "0": "off", "no": "off"}
    text = str(value).lower()
    text = known.get(text, text)
    if text not in set(Determinism):
        raise ValueError(f"write d1, d2 or off, not {value!r}")
    return Determinism(text)


def _adapters_field(value: Any) -> Any:
    """Several ``name=path`` (flags), one text with commas between them (the environment), or a mapping (the file)."""
    if isinstance(value, Mapping):
        return {str(name): str(path) for name, path in value.items()}
    pairs: dict[str, str] = {}
    for text in value.split(",") if isinstance(value, str) else value:
        name, _, path = str(text).partition("=")
        if not name.strip() or not path.strip():
            raise ValueError(f"write name=path, not {text!r} as in {value!r}")
        if name.strip() in pairs:
            raise ValueError(f"the name {name.strip()!r} is given twice, in {value!r}")
        pairs[name.strip()] = path.strip()
    return pairs


Degree = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0)]


class ServeConfig(BaseSettings):
    """All options of ``remuda serve``, validated each by itself. What depends on the model is checked later."""

    model_config = SettingsConfigDict(env_prefix="REMUDA_", extra="forbid", frozen=True)

    model: str = EMBEDDED_MODEL
    tensor_parallel_size: Degree = 1
    pipeline_parallel_size: Degree = 1
    data_parallel_size: Degree = 1
    expert_parallel_size: Degree = 1
    enable_eplb: bool = False
    num_redundant_experts: Annotated[int, Field(ge=0)] = 0
    replicas: Degree = 1
    max_replicas: Degree | None = None
    tp_across_hosts: bool = False
    host: str = "127.0.0.1"
    port: Port = 8000
    grpc_port: Port = 50051
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Device = Device.AUTO
    max_model_len: Annotated[Literal["auto"] | int, BeforeValidator(_length_field)] = "auto"
    max_num_seqs: Degree | None = None
    max_num_batched_tokens: Degree | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    kv_cache_memory: Annotated[int, BeforeValidator(_bytes_field), Field(gt=0)] = 512 * 2**20
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    revision: str | None = None
    quantization: str | None = None
    served_model_name: str | None = None
    lora_modules: Annotated[dict[str, str], NoDecode, BeforeValidator(_adapters_field)] = {}
    lora_dir: Path | None = None
    max_loras: Annotated[int, Field(ge=1, le=1024)] = 8
    enable_prefix_caching: bool = True
    guided_decoding_backend: GrammarBackend = GrammarBackend.LLGUIDANCE
    attention_backend: Literal["auto", "triton", "flashinfer"] = "auto"
    async_scheduling: bool | None = None
    max_lora_rank: Annotated[int, Field(ge=1, le=4096)] = 64
    api_key_file: Path | None = None
    security_file: Path | None = None
    insecure: bool = False
    tenants: Path | None = None
    limits_store: str | None = None
    limits_store_password_file: Path | None = None
    usage_log: Path | None = None
    audit_log: Path | None = None
    otlp_endpoint: str | None = None
    log_format: Literal["text", "json"] = "text"
    address: str | None = None
    cpu_slots: Degree = 8
    spare_ranks: Annotated[int, Field(ge=0, le=64)] = 0
    secret_file: Path | None = None
    deterministic: Annotated[Determinism, BeforeValidator(_determinism_field)] = Determinism.OFF
    pooling: Pooling = Pooling.LAST
    request_timeout: Seconds = 600.0
    queue_timeout: Seconds = 60.0
    first_token_timeout: Seconds = 120.0
    drain_timeout: Annotated[float, Field(ge=0)] = 30.0

    @property
    def name(self) -> str:
        """The name under which clients ask for the model."""
        return self.served_model_name or Path(self.model).name.removesuffix(".gguf") or self.model


def load_serve_config(flags: Mapping[str, Any], file: Path | None = None, *, environment: bool = True) -> ServeConfig:
    """Merge flags (None: not given), environment and file. ``environment``: False for commands that share some of the
    options and read no ``REMUDA_*``. Raises InvalidOption with one line that names the option."""
    given = {name: value for name, value in flags.items() if value is not None}
    in_file = _read_file(file) if file is not None else {}

    class FlagsEnvironmentFile(ServeConfig):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            file_settings = InitSettingsSource(settings_cls, init_kwargs=in_file)
            return (init_settings, env_settings, file_settings) if environment else (init_settings, file_settings)

    try:
        return FlagsEnvironmentFile(**given)
    except ValidationError as error:
        raise InvalidOption(_one_line(error, given, in_file)) from error


def _read_file(file: Path) -> dict[str, Any]:
    """The options of a YAML file, with underscores or dashes. Raises InvalidOption."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise InvalidOption(f"--config {file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        raise InvalidOption(f"--config {file}{where}: this is not YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(content, dict):
        raise InvalidOption(f"--config {file} must hold options, one `name: value` a line")
    options = {str(name).replace("-", "_"): value for name, value in content.items()}
    for name in options.keys() - ServeConfig.model_fields.keys():
        raise InvalidOption(f"--config {file}: {name} is not an option{_suggestion(name)}")
    return options


def _suggestion(name: str) -> str:
    near = difflib.get_close_matches(name, ServeConfig.model_fields, 1)
    return f"; did you mean {near[0]}?" if near else "; see remuda serve --help"


def misspelt_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """REMUDA_* variables that are no option but look like one, each with what was probably meant."""
    names = {f"REMUDA_{name.upper()}" for name in ServeConfig.model_fields}
    unknown = [name for name in environment if name.startswith("REMUDA_") and name not in names]
    near = {name: difflib.get_close_matches(name, names, 1, 0.9) for name in unknown}
    return [
        f"{name} is not an option and has no effect; did you mean {found[0]}?" for name, found in near.items() if found
    ]


def _one_line(error: ValidationError, flags: Mapping[str, Any], in_file: Mapping[str, Any]) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "configuration"
    option = "--" + name.replace("_", "-")
    if name not in flags:
        option = f"{name} in the --config file" if name in in_file else f"REMUDA_{name.upper()}"
    if first["type"] == "extra_forbidden":
        return f"{name} is not an option{_suggestion(name)}"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{option}: {message}" if repr(first["input"]) in message else f"{option}: {message}, not {first['input']!r}"


def quiet_libraries() -> None:
    """To be called once, when a command begins: gRPC's core would tell on stderr of every peer that goes away."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
