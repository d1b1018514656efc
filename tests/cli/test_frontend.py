"""``remuda frontend`` takes the limits of requests and of adapters as ``remuda serve`` does."""

import asyncio
import json
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import typer
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.cli.serve_run import front_end_config
from cluster.config import load_serve_config
from cluster.frontend.calls import TimeLimits
from tests.failover.processes import copy_model, front_end, wait_ready
from tests.support.leader_bed import serving

LIMITS = {"--request-timeout", "--queue-timeout", "--first-token-timeout", "--lora-dir", "--max-lora-rank"}


def test_the_limits_are_the_options_of_serve() -> None:
    group = typer.main.get_command(app)
    found = {}
    for name in ("serve", "frontend"):
        command = group.commands[name]  # type: ignore[attr-defined]
        found[name] = {one.opts[0]: (one.help, one.default) for one in command.params if one.opts[0] in LIMITS}
    assert found["serve"] == found["frontend"] and found["serve"].keys() == LIMITS


@pytest.mark.parametrize(
    ("option", "value"),
    [("--request-timeout", "0"), ("--queue-timeout", "-1"), ("--first-token-timeout", "0"), ("--max-lora-rank", "0")],
)
def test_a_bad_limit_is_named(option: str, value: str) -> None:
    result = CliRunner().invoke(app, ["frontend", "remuda-tiny", "--leaders", "r0=127.0.0.1:1", option, value])
    assert result.exit_code != 0 and option in str(result.exception) and value in str(result.exception)


def test_each_limit_is_the_one_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMUDA_QUEUE_TIMEOUT", "5")
    flags = {"request_timeout": "1800", "first_token_timeout": 7.0, "lora_dir": Path("/adapters"), "max_lora_rank": 4}
    config = front_end_config(load_serve_config(flags, environment=False), Path("/models/m"))
    assert config.limits == TimeLimits(total_s=1800.0, queue_s=60.0, first_token_s=7.0)
    assert (config.lora_dir, config.max_lora_rank, config.name) == (Path("/adapters"), 4, "remuda-tiny")


def _adapter(directory: Path, rank: int) -> None:
    directory.mkdir(parents=True)
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": 16}
    (directory / "adapter_config.json").write_text(json.dumps(content))


async def test_the_command_keeps_them(tmp_path: Path) -> None:
    """The process itself, before a leader in this one whose engine waits."""
    _adapter(tmp_path / "adapters" / "small", 2)
    _adapter(tmp_path / "adapters" / "large", 8)
    copy_model(tmp_path / "model")
    limits = ("--request-timeout", "0.5", "--lora-dir", str(tmp_path / "adapters"), "--max-lora-rank", "4")
    with ExitStack() as stack:
        async with serving() as bed:
            one = front_end(stack, f"r0={bed.address}", tmp_path / "front-end.log", *limits)
            await asyncio.to_thread(wait_ready, one, 1)
            async with httpx.AsyncClient(base_url=one.url, timeout=60, trust_env=False) as http:
                body = {"lora_name": "poet", "lora_path": "small"}
                assert (await http.post("/v1/load_lora_adapter", json=body)).status_code == 200
                assert [adapter.path for adapter in bed.engine.adapters] == [str(tmp_path / "adapters" / "small")]
                refused = await http.post("/v1/load_lora_adapter", json={"lora_name": "epic", "lora_path": "large"})
                assert refused.status_code == 400 and "rank 8 is above the 4" in refused.text

                bed.engine.gate.clear()
                asked = {"model": "m", "prompt": "Hello", "max_tokens": 4}
                late = await http.post("/v1/completions", json=asked)
                bed.engine.gate.set()
                assert late.is_error and "was not finished within 0.5" in late.text
