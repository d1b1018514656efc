"""The command line is a contract: its options are frozen, their precedence is stated, bad values say what to change."""

from pathlib import Path

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.config import ServeConfig, load_serve_config, misspelt_variables, parse_bytes
from engine.errors import InvalidOption

SERVE_OPTIONS = {
    "--tensor-parallel-size", "--tp", "--pipeline-parallel-size", "--pp", "--data-parallel-size", "--dp",
    "--expert-parallel-size", "--ep", "--replicas", "--max-replicas", "--tp-across-hosts",
    "--enable-eplb", "--num-redundant-experts",
    "--host", "--port", "--grpc-port", "--dtype", "--device",
    "--max-model-len", "--max-num-seqs", "--max-num-batched-tokens", "--gpu-memory-utilization", "--kv-cache-memory",
    "--load-format", "--revision", "--quantization", "--served-model-name", "--api-key-file", "--address",
    "--lora-modules", "--lora-dir", "--max-loras", "--max-lora-rank", "--enable-prefix-caching",
    "--async-scheduling", "--guided-decoding-backend", "--attention-backend",
    "--cpu-slots", "--spare-ranks", "--deterministic", "--request-timeout", "--queue-timeout", "--first-token-timeout",
    "--drain-timeout", "--pooling", "--config", "--secret-file", "--security-file", "--insecure",
    "--tenants", "--limits-store", "--limits-store-password-file", "--usage-log", "--audit-log",
    "--otlp-endpoint", "--log-format",
}  # fmt: skip


def _options(name: str) -> set[str]:
    command = typer.main.get_command(app)
    sub = command.commands[name]  # type: ignore[attr-defined]
    return {option for parameter in sub.params if parameter.param_type_name == "option" for option in parameter.opts}


def test_serve_options_are_frozen() -> None:
    assert _options("serve") == SERVE_OPTIONS


def test_doctor_can_be_asked_about_what_serve_will_do() -> None:
    decisive = {"--replicas", "--dtype", "--enable-eplb", "--num-redundant-experts", "--tp", "--pp", "--dp", "--ep"}
    assert decisive <= _options("doctor")


def test_every_config_field_is_an_option_of_serve() -> None:
    fields = {"--" + name.replace("_", "-") for name in ServeConfig.model_fields} - {"--model"}
    assert fields <= _options("serve")


@pytest.mark.parametrize("name", ["plan", "doctor", "generate", "chat", "status", "drain", "verify", "bench"])
def test_commands_that_print_have_json(name: str) -> None:
    assert "--json" in _options(name)


@pytest.mark.parametrize("name", ["serve", "plan", "doctor", "generate", "chat", "status", "drain", "verify", "bench"])
def test_help_has_an_example(name: str) -> None:
    result: Result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.stdout


def test_flag_wins_over_environment_wins_over_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("port: 1\ngrpc_port: 2\ncpu-slots: 3\n")
    monkeypatch.setenv("REMUDA_PORT", "11")
    monkeypatch.setenv("REMUDA_GRPC_PORT", "12")
    config = load_serve_config({"port": 21, "host": None}, file)
    assert (config.port, config.grpc_port, config.cpu_slots, config.host) == (21, 12, 3, "127.0.0.1")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"port": 70000}, ["--port", "70000"]),
        ({"dtype": "float8"}, ["--dtype", "float8", "bfloat16"]),
        ({"max_model_len": "long"}, ["--max-model-len", "long", "auto"]),
        ({"max_model_len": "-4"}, ["--max-model-len", "-4"]),
        ({"kv_cache_memory": "9 apples"}, ["--kv-cache-memory", "9 apples", "MiB"]),
        ({"tensor_parallel_size": 0}, ["--tensor-parallel-size", "0"]),
        ({"gpu_memory_utilization": 1.5}, ["--gpu-memory-utilization", "1.5"]),
    ],
)
def test_a_bad_value_is_named_with_the_remedy_in_one_line(flags: dict[str, object], words: list[str]) -> None:
    with pytest.raises(InvalidOption) as caught:
        load_serve_config(flags)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_file_with_an_unknown_option_or_no_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("tensor_paralel_size: 2\n")
    with pytest.raises(InvalidOption, match="tensor_paralel_size is not an option; did you mean tensor_parallel_size"):
        load_serve_config({}, file)
    for broken, words in (("a: [", "line 1"), ("- a", "name: value")):
        file.write_text(broken)
        with pytest.raises(InvalidOption, match=words):
            load_serve_config({}, file)
    with pytest.raises(InvalidOption, match="none.yaml cannot be read: No such file"):
        load_serve_config({}, tmp_path / "none.yaml")


def test_a_bad_value_is_named_where_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("grpc_port: x\n")
    with pytest.raises(InvalidOption, match="^grpc_port in the --config file: "):
        load_serve_config({}, file)
    monkeypatch.setenv("REMUDA_PORT", "abc")
    with pytest.raises(InvalidOption, match="^REMUDA_PORT: "):
        load_serve_config({})


def test_a_misspelt_variable_is_told() -> None:
    told = misspelt_variables(
        {"REMUDA_TENSOR_PARALEL_SIZE": "2", "REMUDA_TARGET": "x", "REMUDA_PORT": "1", "HOME": "y"}
    )
    assert told == [
        "REMUDA_TENSOR_PARALEL_SIZE is not an option and has no effect; did you mean REMUDA_TENSOR_PARALLEL_SIZE?"
    ]


def test_sizes() -> None:
    assert [parse_bytes(text) for text in ("7", "2KiB", "1.5 MiB", "3g")] == [7, 2048, 1572864, 3_000_000_000]
