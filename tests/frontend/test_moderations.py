"""/v1/moderations: who is a guard, what its answers mean, and the whole way with a model that computes."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.frontend.model_files import read_model_files
from cluster.frontend.moderations import guard_categories
from cluster.frontend.tokenizer import Tokenizer
from tests.frontend import tokenizers_for_tests
from tests.frontend.real_engine import RealBackend
from tests.frontend.scripted import ScriptedBackend, replica_info, says
from tests.frontend.servers import served
from tests.frontend.test_templates import SOURCES

CATEGORIES = {"S1": "Violent Crimes", "S2": "Non-Violent Crimes", "S9": "Indiscriminate Weapons"}
# As Llama Guard 4 and 3-1B have it: contents are lists of parts, and a plain string would vanish.
PARTS_ONLY = SOURCES["guard3"].replace("message.content | trim", "message.content[0]['text'] | trim")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizers_for_tests.byte_level(tmp_path_factory.mktemp("guard") / "m", SOURCES["guard3"])


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(read_model_files(path))


def saying(tokenizer: Tokenizer, text: str) -> ScriptedBackend:
    ids = tokenizer.encode(text, add_special_tokens=False)
    backend = ScriptedBackend(says(ids, stop_token_id=tokenizer.encode("<|eot_id|>", False, True)[0]))
    backend.infos = [replica_info(max_model_len=4096)]
    return backend


def test_who_is_a_guard(loaded: Any, tokenizer: Tokenizer) -> None:
    assert guard_categories(tokenizer) == CATEGORIES
    assert [guard_categories(other) for other in loaded.values()] == [None] * len(loaded)


@pytest.mark.parametrize(
    ("answer", "flagged", "codes"),
    [
        ("\n\nsafe", False, []),
        ("safe", False, []),
        ("\n\nunsafe\nS1,S9", True, ["S1", "S9"]),
        ("unsafe\nS14, S2", True, ["S14", "S2"]),
        ("unsafe", True, []),
    ],
)
async def test_answers(answer: str, flagged: bool, codes: list[str], path: Path, tokenizer: Tokenizer) -> None:
    async with served(saying(tokenizer, answer), model_path=path) as one:
        response = await one.openai.moderations.create(model="m", input="How do I build one?")
        result = response.results[0]
        assert response.id.startswith("modr-")
        assert result.flagged is flagged
        categories, scores = result.categories.model_dump(), result.category_scores.model_dump()
        assert {code for code in categories if categories[code]} == set(codes)
        assert set(CATEGORIES) <= set(categories)
        score = result.model_extra["score"]
        assert {code: scores[code] for code in codes} == dict.fromkeys(codes, score)
        assert all(scores[code] == 0 for code in CATEGORIES if code not in codes)
        assert result.model_extra["category_names"] == CATEGORIES | ({"S14": "S14"} if "S14" in codes else {})
        assert 0 <= score <= 1
        assert (score > 0.5) is flagged
        request = one.backend.requests[0]
        assert "User: How do I build one?\n" in tokenizer.decode(request.token_ids)
        assert (request.sampling.temperature, request.sampling.max_tokens) == (0.0, 64)


async def test_inputs(path: Path, tokenizer: Tokenizer) -> None:
    async with served(saying(tokenizer, "safe"), model_path=path) as one:

        async def ask(given: Any) -> Any:
            return await one.http.post("/v1/moderations", json={"input": given})

        answer = (await ask(["one", "two", "three"])).json()
        assert [result["flagged"] for result in answer["results"]] == [False] * 3
        prompts = [tokenizer.decode(request.token_ids) for request in one.backend.requests]
        assert [text in prompt for text, prompt in zip(["one", "two", "three"], prompts, strict=True)] == [True] * 3
        parts = [{"type": "text", "text": "first"}, {"type": "text", "text": "second"}]
        assert len((await ask(parts)).json()["results"]) == 1
        assert "User: first\nsecond\n" in tokenizer.decode(one.backend.requests[-1].token_ids)
        for wrong in (None, 5, [], [1], ["a", {"type": "text", "text": "b"}], [{"type": "image_url"}]):
            refused = await ask(wrong)
            assert refused.status_code == 400, wrong
            assert refused.json()["error"]["param"].startswith("input")


async def test_other_models_say_that_they_are_no_guard() -> None:
    async with served(says([300])) as one:
        response = await one.http.post("/v1/moderations", json={"input": "x"})
        assert response.status_code == 400
        assert "Llama Guard" in response.json()["error"]["message"]


async def test_a_template_for_parts_is_given_parts(tmp_path: Path) -> None:
    path = tokenizers_for_tests.byte_level(tmp_path / "m", PARTS_ONLY)
    tokenizer = Tokenizer(read_model_files(path))
    assert guard_categories(tokenizer) == CATEGORIES
    async with served(saying(tokenizer, "safe"), model_path=path) as one:
        assert (await one.http.post("/v1/moderations", json={"input": "hello there"})).status_code == 200
        assert "User: hello there\n" in tokenizer.decode(one.backend.requests[0].token_ids)


def write_model(path: Path, chain: list[int] | None) -> LlamaForCausalLM:
    """A tiny random Llama; with ``chain`` one whose next token depends on the last alone, along this chain."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    size = read_model_files(path).vocab_size
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    if chain is not None:
        with torch.no_grad():
            model.model.layers[0].self_attn.o_proj.weight.zero_()
            model.model.layers[0].mlp.down_proj.weight.zero_()
            model.lm_head.weight.normal_(std=0.02)
            for last, following in itertools.pairwise(chain):
                row = model.model.embed_tokens.weight[last]
                model.lm_head.weight[following] += 0.12 * row / row.norm()
    model.save_pretrained(path)
    return model


async def test_a_model_that_computes(tmp_path: Path) -> None:
    path = tokenizers_for_tests.byte_level(tmp_path / "m", SOURCES["guard3"])
    tokenizer = Tokenizer(read_model_files(path))
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Hm"}])
    answer = tokenizer.encode("unsafe S9", add_special_tokens=False)
    chain = [prompt[-1], *answer, tokenizer.encode("<|eot_id|>", False, True)[0]]
    assert len(set(chain)) == len(chain), "the next token could not depend on the last alone"
    model = write_model(path, chain)
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    mass = {"safe": 0.0, "unsafe": 0.0}
    for token_id in logprobs.topk(20).indices.tolist():
        for word in mass:
            if (token := tokenizer.bytes.name(token_id).strip().lower()) and word.startswith(token):
                mass[word] += math.exp(logprobs[token_id])
    backend = RealBackend(path)
    try:
        async with served(backend, model_path=path) as one:
            result = (await one.http.post("/v1/moderations", json={"input": "Hm"})).json()["results"][0]
    finally:
        backend.close()
    assert result["flagged"] is True
    assert [code for code, is_named in result["categories"].items() if is_named] == ["S9"]
    assert result["score"] == pytest.approx(mass["unsafe"] / sum(mass.values()), abs=1e-5)


async def test_a_model_that_gives_no_verdict(tmp_path: Path) -> None:
    path = tokenizers_for_tests.byte_level(tmp_path / "m", SOURCES["guard3"])
    write_model(path, None)
    backend = RealBackend(path)
    try:
        async with served(backend, model_path=path) as one:
            response = await one.http.post("/v1/moderations", json={"input": "Hm"})
    finally:
        backend.close()
    assert response.status_code == 500
    assert "neither safe nor unsafe" in response.json()["error"]["message"]
