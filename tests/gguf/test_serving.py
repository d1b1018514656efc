"""``remuda serve FILE.gguf``: nothing but the file is there."""

import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import transformers

from cluster.config import ServeConfig
from cluster.frontend.model_files import read_model_files
from cluster.frontend.tokenizer import Tokenizer
from cluster.replica.model_source import ModelSource, resolve
from engine.errors import CheckpointError
from tests.gguf.models import COMMON, WIDE, Case, Reference, make_reference, q4_k_m
from tests.gguf.tokenizers_for_gguf import from_tokenizer_json
from tests.parity.reference import NUM_NEW
from tests.support.conformance import Conforms
from tests.support.served import Served, run_remuda

TINY = Path(__file__).parents[2] / "engine" / "assets" / "remuda-tiny"
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}<|eot|>{% endfor %}"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A Q4_K_M-like model with remuda-tiny's tokenizer."""
    config = transformers.LlamaConfig(**COMMON | WIDE | {"vocab_size": 2048}, intermediate_size=512)
    metadata = from_tokenizer_json(TINY, "qwen2")
    metadata |= {"general.license": "apache-2.0", "tokenizer.chat_template": TEMPLATE}
    case = Case("llama", config, q4_k_m, "GGUF Q4_K + Q6_K")
    return make_reference("pony-Q4_K_M", tmp_path_factory.mktemp("served"), case, metadata)


@pytest.fixture(scope="module")
def served(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("gguf-serve")
    arguments = (str(reference.path), "--tp", "2", "--dtype", "float32", "--kv-cache-memory", "16MiB")
    with Served(arguments, folder / "serve.log") as server:
        yield server
        assert server.stop(signal.SIGTERM) == 0


@pytest.mark.timeout(180)
def test_a_file_is_served_by_two_ranks(served: Served, reference: Reference, conforms: Conforms) -> None:
    """Its greedy tokens are those of the float model with the decoded weights."""
    conforms("Llama, served", "GGUF Q4_K + Q6_K", tp=2, oracle="gguf, transformers")
    (model,) = httpx.get(f"{served.url}/v1/models").json()["data"]
    assert model["id"] == "pony-Q4_K_M"
    assert "Apache-2.0" in str(model)
    tokenizer = Tokenizer(read_model_files(reference.path))
    for prompt, expected in zip(reference.prompts, reference.generated, strict=True):
        body = {"model": "pony-Q4_K_M", "prompt": prompt, "max_tokens": NUM_NEW, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        (choice,) = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).json()["choices"]
        assert choice["token_ids"] == expected.token_ids[len(prompt) :]
        assert choice["text"] == tokenizer.decode(choice["token_ids"])
    chat = {"model": "pony-Q4_K_M", "messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 4}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=chat, timeout=60).json()
    ids = tokenizer.encode("<|begin_of_text|>Hello there<|eot|>", False, parse_special_tokens=True)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert [rank["state"] for rank in served.status()["replicas"][0]["ranks"]] == ["idle", "idle"]


def test_a_damaged_file_is_refused_before_anything_starts(reference: Reference, tmp_path: Path) -> None:
    damaged = tmp_path / "cut.gguf"
    damaged.write_bytes(reference.path.read_bytes()[:100_000])
    result = run_remuda("serve", str(damaged))
    assert result.returncode == 2
    assert f"{damaged} is truncated" in result.stderr


def test_what_model_may_name(tmp_path: Path) -> None:
    file = tmp_path / "pony-Q8_0.gguf"
    file.write_bytes(b"GGUF")
    source = resolve(str(file), None)
    assert source == ModelSource(str(file.resolve()))
    assert source.directory() == file.resolve()
    assert ServeConfig(model=str(file)).name == "pony-Q8_0"
    with pytest.raises(CheckpointError, match="a GGUF file"):
        resolve(str(tmp_path / "none.gguf"), None)
