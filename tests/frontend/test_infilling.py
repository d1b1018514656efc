"""Code Llama's infilling: prompts as transformers' CodeLlamaTokenizer writes them, the end, and who is refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import CodeLlamaTokenizer

from cluster.frontend.infilling import Infilling
from cluster.frontend.model_files import read_model_files
from cluster.frontend.tokenizer import Tokenizer
from tests.frontend import tokenizers_for_tests
from tests.frontend.bodies import completion
from tests.frontend.scripted import says
from tests.frontend.servers import served


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vocabulary in the manner of SentencePiece, with Code Llama's four marks."""
    path = tokenizers_for_tests.sentencepiece(tmp_path_factory.mktemp("infilling") / "m")
    definition = json.loads((path / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    for name in ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"):
        vocabulary[name] = len(vocabulary)
        entry = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        definition["added_tokens"].append({"id": vocabulary[name], "content": name, **entry, "special": True})
    (path / "tokenizer.json").write_text(json.dumps(definition))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": len(vocabulary)}))
    return path


@pytest.fixture(scope="module")
def infilling(path: Path) -> Infilling:
    return Infilling(Tokenizer(read_model_files(path)))


@pytest.fixture(scope="module")
def oracle(path: Path) -> CodeLlamaTokenizer:
    """Without a space before the suffix, which 5.23 adds by default, against its own description and the training."""
    return CodeLlamaTokenizer.from_pretrained(path, add_prefix_space=False)


PIECES = st.sampled_from(["the", "fox", " ", "  ", "\n", "(x)", "é", "日", "🙂", "▁", ":"]) | st.characters(
    codec="utf-8"
)
CODE = st.lists(PIECES, max_size=10).map("".join)


@given(prefix=CODE, suffix=CODE.filter(bool))
def test_prompts_equal_transformers(prefix: str, suffix: str, infilling: Infilling, oracle: CodeLlamaTokenizer) -> None:
    assert infilling.encode(prefix, suffix) == oracle(prefix, suffix=suffix)["input_ids"]


def test_the_order_of_a_prompt(path: Path, infilling: Infilling) -> None:
    tokenizer = Tokenizer(read_model_files(path))
    names = tokenizer.token_strings(infilling.encode("the dog", " the fox"))
    joined = "".join(names)
    assert joined == "<s>▁<PRE>▁the▁dog▁<SUF>▁the▁fox▁<MID>"
    plain = CodeLlamaTokenizer.from_pretrained(path)("the dog", suffix=" the fox")["input_ids"]
    assert infilling.encode("the dog", " the fox") == plain
    assert infilling.encode("the dog", " the fox", add_special_tokens=False) == plain[1:]


async def test_served(path: Path, infilling: Infilling) -> None:
    tokenizer = Tokenizer(read_model_files(path))
    ids = tokenizer.encode(" the fox", add_special_tokens=False)
    async with served(says(ids, stop_token_id=infilling.end_ids[0]), model_path=path) as one:
        answer = await one.openai.completions.create(model="m", prompt="the dog", suffix=" the end")
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].text.strip() == "the fox"
        request = one.backend.requests[0]
        assert request.token_ids == infilling.encode("the dog", " the end")
        assert set(infilling.end_ids) < set(request.sampling.stop_token_ids)
        await one.openai.completions.create(model="m", prompt=["a", "the"], suffix="x")
        assert one.backend.requests[2].token_ids == infilling.encode("the", "x")
        # Without a suffix nothing of this happens.
        await one.openai.completions.create(model="m", prompt="the dog", suffix="")
        assert one.backend.requests[3].token_ids == tokenizer.encode("the dog")
        assert not set(infilling.end_ids) & set(one.backend.requests[3].sampling.stop_token_ids)
        for more, param in (
            ({"prompt": [5, 6]}, "suffix"),
            ({"prompt": [[5, 6]]}, "suffix"),
            ({"echo": True}, "echo"),
            ({"parse_special_tokens": True}, "parse_special_tokens"),
        ):
            refused = await one.http.post("/v1/completions", json=completion(suffix="x", **more))
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


async def test_other_models_are_refused_with_the_reason() -> None:
    async with served(says([300])) as one:
        refused = await one.http.post("/v1/completions", json=completion(suffix="x"))
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert (error["param"], "▁<PRE>" in error["message"]) == ("suffix", True)
