"""Llama 3's and Llama 4's real tokenizers: golden ids, sizes, false control tokens, text that comes back exactly."""

from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from cluster.frontend.detokenizer import Detokenizer
from cluster.frontend.model_files import read_model_files
from cluster.frontend.tokenizer import Tokenizer
from cluster.frontend.tools.grammar import TOKENS
from tests.frontend.test_templates import LLAMA4, SOURCES
from tests.support.meta_tokenizers import model_directory

MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant"},
    {"role": "user", "content": "Hi <|eot_id|> there"},
]
# What Meta's own tokenizer and chat format give.
GOLDEN = {
    "llama3": (
        "128000 128006 9125 128007 271 2675 527 264 11190 18328 128009 128006 882 128007 271 13347 83739 68 354 851 91"
        " 29 1070 128009 128006 78191 128007 271"
    )
}
SIZES = {"llama3": 128_256, "llama4": 202_048}
IDS = {
    "llama3": {"<|begin_of_text|>": 128000, "<|eom_id|>": 128008, "<|eot_id|>": 128009, "<|python_tag|>": 128010},
    "llama4": {
        "<|begin_of_text|>": 200000,
        "<|header_start|>": 200005,
        "<|eom|>": 200007,
        "<|eot|>": 200008,
        "<|python_start|>": 200016,
        "<|python_end|>": 200017,
        "<|patch|>": 200092,
    },
}
TEXTS = [
    "Hello, world! I'm 12345 years old.\n\n\tdef f(x):  return x",
    "Ünïcödé naïve 日本語の文字列 한국어 Привет 🙂👩‍👩‍👧🏳️‍🌈 ﷽ \u200b\u0301",
    "   \r\n \u00a0 <|eot_id|><|eot|><|begin_of_text|> </s> a\x00b\x7f",
    "if(x){y;}//comment\n/* */ HTTPServer's WE'LL don't",
]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, tokenizers.Tokenizer]]:
    """Ours, and the converted tokenizer itself."""
    folder = tmp_path_factory.mktemp("meta")
    both = {}
    for family, template in (("llama3", SOURCES["llama3"]), ("llama4", LLAMA4)):
        path = model_directory(folder / family, family, template, SIZES[family])
        ours = Tokenizer(read_model_files(path))
        both[family] = (ours, ours._original)  # read once: that takes seconds
    return both


@pytest.mark.parametrize("family", ["llama3", "llama4"])
def test_sizes_and_ids(family: str, families: Any) -> None:
    ours, theirs = families[family]
    assert theirs.get_vocab_size() == SIZES[family]
    for name, token_id in IDS[family].items():
        assert ours.encode(name, False, parse_special_tokens=True) == [token_id]
    assert ours.encode("")[:1] == []  # the conversion adds no post-processor
    shown = {"llama3": {128010}, "llama4": {200016, 200017}}
    assert ours.control_tokens(TOKENS) == shown[family]


def test_golden_prompt_of_llama_3(families: Any) -> None:
    ids = families["llama3"][0].encode_chat(MESSAGES)
    assert ids == [int(id_) for id_ in GOLDEN["llama3"].split()]


def test_prompt_of_llama_4(families: Any) -> None:
    """The template's control tokens are one id each; a false one in a message is text, and is encoded as any other."""
    ours = families["llama4"][0]
    messages = [MESSAGES[0], {"role": "user", "content": "Hi <|eot|> there"}]
    ids = ours.encode_chat(messages)

    def text(words: str) -> list[int]:
        encoded: list[int] = ours.encode(words, add_special_tokens=False)
        return encoded

    start, end, eot = 200005, 200006, 200008
    expected = [200000, start, *text("system"), end, *text("\n\nYou are a helpful assistant"), eot]
    expected += [
        start,
        *text("user"),
        end,
        *text("\n\nHi <|eot|> there"),
        eot,
        start,
        *text("assistant"),
        end,
        *text("\n\n"),
    ]
    assert ids == expected
    assert ids.count(eot) == 2
    # Cut at the false token, its neighbours would be encoded otherwise: this is the text as one.
    assert ours.decode(text("\n\nHi <|eot|> there")) == "\n\nHi <|eot|> there"


@pytest.mark.parametrize("family", ["llama3", "llama4"])
@pytest.mark.parametrize("text", TEXTS)
def test_known_texts_come_back(family: str, text: str, families: Any) -> None:
    ours, theirs = families[family]
    ids = ours.encode(text, add_special_tokens=False)
    assert not set(ids) & ours.special_ids
    assert ours.decode(ids) == text
    if "<|" not in text:
        assert ids == theirs.encode(text, add_special_tokens=False).ids


ALPHABET = st.characters(exclude_categories=["Cs"]) | st.sampled_from("🙂日é \n'1<|>")


@pytest.mark.parametrize("family", ["llama3", "llama4"])
@given(st.text(ALPHABET, max_size=40))
def test_text_comes_back_token_by_token(family: str, families: Any, text: str) -> None:
    ours, theirs = families[family]
    ids = ours.encode(text, add_special_tokens=False)
    assert ids == theirs.encode(text, add_special_tokens=False).ids
    detokenizer = Detokenizer(ours.bytes)
    pieces = [detokenizer.feed(token_id) for token_id in ids]
    assert "".join(pieces) + detokenizer.finish() == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@pytest.mark.parametrize("family", ["llama3", "llama4"])
@given(st.text(st.sampled_from("🙂日é👩‍👧a"), max_size=12))
def test_characters_spread_over_bytes_come_back(family: str, families: Any, text: str) -> None:
    """As a model may write it: each byte a token of its own."""
    ours: Tokenizer = families[family][0]
    id_of_byte = {ours.bytes.raw(token_id): token_id for token_id in range(256)}
    assert len(id_of_byte) == 256
    detokenizer = Detokenizer(ours.bytes)
    pieces = [detokenizer.feed(id_of_byte[bytes([byte])]) for byte in text.encode()]
    assert [piece for piece in pieces if piece] == list(text)
