"""What a checkpoint says about sampling and its end tokens, and that a request's own values win."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from cluster.frontend.calls import SamplingOptions
from cluster.frontend.model_files import read_model_files
from cluster.frontend.sampling import build_sampling
from cluster.frontend.tokenizer import Tokenizer
from engine.errors import CheckpointError, InvalidRequest
from engine.request import SamplingParams
from tests.frontend import tokenizers_for_tests
from tests.frontend.bodies import completion
from tests.frontend.scripted import says
from tests.frontend.servers import served

# As published: the instruct models' generation_config.json and what of their config.json matters here.
LLAMA31 = {"bos_token_id": 128000, "do_sample": True, "eos_token_id": [128001, 128008, 128009], "temperature": 0.6}
LLAMA31_CONFIG = {"vocab_size": 128256, "eos_token_id": [128001, 128008, 128009]}
LLAMA4 = {"bos_token_id": 200000, "do_sample": True, "eos_token_id": [200001, 200007, 200008], "temperature": 0.6}
LLAMA4_CONFIG = {"text_config": {"vocab_size": 202048, "eos_token_id": [200001, 200007, 200008]}}


def write(path: Path, generation: dict[str, Any] | None, config: dict[str, Any]) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def sampling(path: Path, **options: Any) -> SamplingParams:
    files = read_model_files(path)
    wishes = SamplingOptions(**options)
    return build_sampling(wishes, 10, 7, files.eos_ids, files.sampling_defaults, files.vocab_size)


@pytest.mark.parametrize(("generation", "config"), [(LLAMA31, LLAMA31_CONFIG), (LLAMA4, LLAMA4_CONFIG)])
def test_the_true_values(generation: dict[str, Any], config: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, {**generation, "top_p": 0.9, "transformers_version": "4.42.3"}, config)
    theirs = GenerationConfig.from_pretrained(path)
    ours = sampling(path)
    assert (ours.temperature, ours.top_p) == (theirs.temperature, theirs.top_p) == (0.6, 0.9)
    assert list(ours.stop_token_ids) == theirs.eos_token_id == generation["eos_token_id"]
    assert (ours.top_k, ours.min_p, ours.repetition_penalty) == (0, 0.0, 1.0)


def test_a_request_wins(tmp_path: Path) -> None:
    path = write(tmp_path, {**LLAMA31, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1}, LLAMA31_CONFIG)
    assert sampling(path).top_k == 50
    ours = sampling(
        path, temperature=0.0, top_p=1.0, top_k=-1, repetition_penalty=1.0, stop_token_ids=(5,), min_tokens=3
    )
    assert (ours.temperature, ours.top_p, ours.top_k, ours.repetition_penalty) == (0.0, 1.0, 0, 1.0)
    assert ours.stop_token_ids == (128001, 128008, 128009, 5)
    assert ours.min_tokens == 3
    assert sampling(path, ignore_eos=True).stop_token_ids == ()
    assert sampling(path, ignore_eos=True, stop_token_ids=(5,)).stop_token_ids == (5,)
    with pytest.raises(InvalidRequest, match="min_tokens"):
        sampling(path, min_tokens=11)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, LLAMA4_CONFIG, (200001, 200007, 200008)),
        (None, {"vocab_size": 9, "eos_token_id": 2}, (2,)),
        ({"eos_token_id": 3}, {"vocab_size": 9, "eos_token_id": [2, 3]}, (3, 2)),
        ({"eos_token_id": None}, {"eos_token_id": 4, "text_config": {"vocab_size": 9}}, (4,)),
        ({"temperature": 1.0}, {"vocab_size": 9}, ()),
    ],
)
def test_end_tokens_of_every_file_count(generation: Any, config: Any, expected: Any, tmp_path: Path) -> None:
    assert read_model_files(write(tmp_path, generation, config)).eos_ids == expected


def test_a_model_that_does_not_sample_is_greedy(tmp_path: Path) -> None:
    path = write(tmp_path, {"do_sample": False, "temperature": 0.6, "top_p": 0.9}, LLAMA31_CONFIG)
    assert sampling(path).temperature == 0.0
    assert sampling(path, temperature=0.5).temperature == 0.5


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"temperature": "abc"}, "generation_config.json: temperature is 'abc'; it must be a number"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_p": 3}, "generation_config.json: top_p must be .* not 3"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be"),
        ({"min_p": [0.1]}, r"min_p is \[0.1\]"),
    ],
)
def test_values_of_no_use_are_refused_at_the_start(generation: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Not with an error for every request."""
    with pytest.raises(CheckpointError, match=message):
        read_model_files(write(tmp_path, generation, LLAMA31_CONFIG))


@pytest.mark.parametrize(
    "template", [5, {"a": 1}, [1], ["a"], [{"x": 1}], [None], [{"name": "default", "template": 3}]]
)
def test_a_chat_template_that_is_no_text_is_refused(template: Any, tmp_path: Path) -> None:
    path = write(tmp_path, None, LLAMA31_CONFIG)
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(CheckpointError, match="chat_template must be a text, or a list"):
        read_model_files(path)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, None, LLAMA31_CONFIG)
    (path / "chat_template.jinja").write_bytes(b"\xff{{ messages }}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read"):
        read_model_files(path)
    (path / "generation_config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not valid JSON"):
        read_model_files(path)


async def test_served_with_what_the_checkpoint_says(tmp_path: Path) -> None:
    """The whole way; the tokenizer's own end token is one, though no configuration names it."""
    path = tokenizers_for_tests.byte_level(tmp_path / "m")
    tokenizer = Tokenizer(read_model_files(path))
    eot, other = (tokenizer.encode(name, False, True)[0] for name in ("<|eot_id|>", "<|eom_id|>"))
    write(path, {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [other]}, {"vocab_size": 500})
    async with served(says([65]), model_path=path) as one:
        for more in ({}, {"temperature": 0.25, "ignore_eos": True}):
            assert (await one.http.post("/v1/completions", json=completion(**more))).status_code == 200
        plain, own = (request.sampling for request in one.backend.requests)
        assert (plain.temperature, plain.top_p, plain.stop_token_ids) == (0.6, 0.9, (other, eot))
        assert (own.temperature, own.top_p, own.stop_token_ids) == (0.25, 0.9, ())
