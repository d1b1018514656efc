"""The real command: an adapter from the start, another one loaded while a stream runs, and unloaded again."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

import engine
from tests.lora.adapters import make_adapter
from tests.support.served import Served, leader_of, processes_with, run_remuda

TINY = Path(engine.__path__[0]) / "assets" / "remuda-tiny"
LONG = 400
PROMPT = "The herd came down to the river"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two adapters of remuda-tiny, on attention and on all its experts."""
    directory = tmp_path_factory.mktemp("adapters")
    experts = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
    make_adapter(TINY, directory / "first", r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"])
    make_adapter(TINY, directory / "second", r=2, lora_alpha=4, target_modules=["down_proj"], target_parameters=experts)
    return directory


@pytest.fixture(scope="module")
def served(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    arguments = ("remuda-tiny", "--tp", "2", "--ep", "2", "--async-scheduling", "--lora-dir", str(adapters))
    log = tmp_path_factory.mktemp("served") / "serve.log"
    with Served((*arguments, "--lora-modules", f"first={adapters / 'first'}"), log) as server:
        yield server


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0, timeout=60) as made:
        yield made


def _text(client: openai.OpenAI, model: str, max_tokens: int = 24) -> str:
    answer = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=max_tokens, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.model == model
    return answer.choices[0].text


class _Reader(threading.Thread):
    """Of a stream that has begun."""

    def __init__(self, client: openai.OpenAI) -> None:
        super().__init__()
        self._client = client
        self._has_begun = threading.Event()
        self.pieces: list[str] = []
        self.start()
        assert self._has_begun.wait(60)

    def run(self) -> None:
        chunks = self._client.completions.create(
            model="remuda-tiny",
            prompt=PROMPT,
            max_tokens=LONG,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        with chunks:
            for chunk in chunks:
                self.pieces.append(chunk.choices[0].text)
                self._has_begun.set()


def test_load_while_a_stream_runs(served: Served, client: openai.OpenAI, adapters: Path) -> None:
    assert [model.id for model in client.models.list()] == ["remuda-tiny", "first"]
    alone = _text(client, "remuda-tiny", LONG)
    first = _text(client, "first")
    assert first != alone[: len(first)]
    with pytest.raises(openai.NotFoundError):
        _text(client, "second")

    for _ in range(10):
        reader = _Reader(client)
        loaded = httpx.post(
            f"{served.url}/v1/load_lora_adapter", json={"lora_name": "second", "lora_path": "second"}, timeout=60
        )
        assert loaded.status_code == 200, loaded.text
        if reader.is_alive():
            break
        assert run_remuda("adapters", "unload", "second", "--target", served.target).returncode == 0
    else:
        raise AssertionError("each stream ended before the adapter was loaded")
    second = _text(client, "second")
    assert _text(client, "first") == first
    reader.join(60)
    assert "".join(reader.pieces) == alone
    assert len({second, first, alone[: len(second)]}) == 3

    listed = json.loads(run_remuda("adapters", "list", "--json", "--target", served.target).stdout)
    assert [(adapter["name"], adapter["num_bytes"] > 0) for adapter in listed] == [("first", True), ("second", True)]
    assert run_remuda("adapters", "unload", "second", "--target", served.target).returncode == 0
    with pytest.raises(openai.NotFoundError):
        _text(client, "second")
    assert _text(client, "remuda-tiny", LONG) == alone


def test_a_bad_adapter_is_refused_and_serving_goes_on(served: Served, client: openai.OpenAI, adapters: Path) -> None:
    bad = Path(shutil.copytree(adapters / "second", adapters / "bad"))
    weights = (bad / "adapter_model.safetensors").read_bytes()
    (bad / "adapter_model.safetensors").write_bytes(weights[:-8])
    result = run_remuda("adapters", "load", "bad", "bad", "--target", served.target)
    assert result.returncode != 0 and "adapter_model.safetensors" in result.stderr
    assert [model.id for model in client.models.list()] == ["remuda-tiny", "first"]
    assert _text(client, "first")


def test_serve_refuses_a_bad_adapter_before_it_starts(tmp_path: Path) -> None:
    result = run_remuda("serve", "--lora-modules", f"x={tmp_path}", "--port", "0", "--grpc-port", "0")
    assert result.returncode == 2 and "adapter_config.json does not exist" in result.stderr
    result = run_remuda("serve", "--lora-modules", "x", "--port", "0", "--grpc-port", "0")
    assert result.returncode == 2 and "name=path" in result.stderr


def test_the_next_leader_has_what_the_one_before_had(served: Served, client: openai.OpenAI) -> None:
    """Not what was there from the beginning."""

    def change(*arguments: str) -> None:
        assert run_remuda("adapters", *arguments, "--target", served.target).returncode == 0

    change("load", "second", "second")
    second = _text(client, "second")
    change("unload", "first")
    leader_of(processes_with(served.mark)).kill()
    deadline_s = time.monotonic() + 60
    while "replica r0 has joined" not in served.log.read_text():
        assert time.monotonic() < deadline_s, served.log.read_text()
        time.sleep(0.1)
    assert [model.id for model in client.models.list()] == ["remuda-tiny", "second"]
    assert _text(client, "second") == second
    change("unload", "second")
    change("load", "first", "first")
