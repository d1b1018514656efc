"""The tokenizer in a GGUF file's metadata, written as the tokenizer.json that it was made from.

Two models are served: ``gpt2``, byte-level BPE with a list of merges, whose way to cut a text into words has a name
(``tokenizer.ggml.pre``); and ``llama``, SentencePiece's BPE, where a token's score ranks the merges that lead to it and
characters without a token become bytes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.gguf.header import GgufHeader, read_header
from engine.gguf.special_tokens import CONTROL, token_id

_NORMAL, _UNKNOWN, _USER_DEFINED = 1, 2, 4
"""Values of ``tokenizer.ggml.token_type``."""


@dataclass(frozen=True)
class _Words:
    """How a text is cut into words. ``steps``: pre-tokenizers before the byte table; ``own_regex``: that the table's
    own cuts come last. ``whole_words``: a word that is a token needs no merges. ``composes``: text is put into NFC.
    ``adds_bos``: where the metadata is silent."""

    steps: tuple[Mapping[str, Any], ...] = ()
    own_regex: bool = False
    whole_words: bool = False
    composes: bool = False
    adds_bos: bool = False


def _cut(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _Words(
    (_cut(_CONTRACTIONS + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL),), whole_words=True, adds_bos=True
)
_QWEN2 = _Words((_cut(_CONTRACTIONS + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL),), composes=True)
_TEKKEN_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_TEKKEN = _Words((_cut(_TEKKEN_WORDS + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL),), whole_words=True, adds_bos=True)
_WORDS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
    "gpt-2": _Words(own_regex=True),
    "smollm": _Words(({"type": "Digits", "individual_digits": True},), own_regex=True),
}
"""By ``tokenizer.ggml.pre``."""


def tokenizer_definition(path: Path) -> dict[str, Any]:
    """The content of a tokenizer.json. Raises CheckpointError for a tokenizer that is missing, broken or of another
    kind."""
    vocabulary = _Vocabulary(read_header(path))
    kind = vocabulary.get("model")
    if kind == "gpt2":
        return _byte_level(vocabulary)
    if kind == "llama":
        return _sentencepiece(vocabulary)
    raise vocabulary.refused(f"its tokenizer is of kind {kind!r}; served are gpt2 and llama")


class _Vocabulary:
    """The tokens, with typed access to what else is said below ``tokenizer.ggml``."""

    def __init__(self, header: GgufHeader) -> None:
        self._header = header
        self.tokens: list[str] = self.strings("tokens")
        if len(set(self.tokens)) != len(self.tokens):
            token = Counter(self.tokens).most_common(1)[0][0]
            raise self.refused(f"the token {token!r} stands twice in its vocabulary")
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        self.kinds: list[int] = self.get("token_type") or [_NORMAL] * len(self.tokens)
        if len(self.kinds) != len(self.tokens):
            raise self.refused(f"it has {len(self.tokens)} tokens and {len(self.kinds)} token types")

    def get(self, key: str) -> Any:
        """``tokenizer.ggml.<key>``; None where it is not there."""
        return self._header.metadata.get(f"tokenizer.ggml.{key}")

    def strings(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self.refused(f"its metadata has no strings tokenizer.ggml.{key}")
        return value

    def refused(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self._header.path}: {why}; "
            "convert the model again with a current llama.cpp, or serve it from safetensors"
        )

    def special(self) -> list[dict[str, Any]]:
        """Tokens that are found before a text is cut: control tokens, and what a user defined."""
        return [
            {
                "id": number,
                "content": self.tokens[number],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != _USER_DEFINED,
            }
            for number, kind in enumerate(self.kinds)
            if kind in (_UNKNOWN, CONTROL, _USER_DEFINED) and self.tokens[number]
        ]

    def around(self, adds_bos: bool) -> dict[str, Any] | None:
        """The post-processor that puts BOS and EOS around a text; ``adds_bos``: where the metadata is silent."""
        before, after = [], []
        if self._says("add_bos_token", adds_bos):
            before = self._named("bos")
        if self._says("add_eos_token", False):
            after = self._named("eos")
        if not before and not after:
            return None
        pieces: list[dict[str, Any]] = [{"SpecialToken": {"id": token, "type_id": 0}} for token in before]
        pieces.append({"Sequence": {"id": "A", "type_id": 0}})
        pieces += [{"SpecialToken": {"id": token, "type_id": 0}} for token in after]
        known = {token: {"id": token, "ids": [self.ids[token]], "tokens": [token]} for token in before + after}
        pair = [*pieces, {"Sequence": {"id": "B", "type_id": 1}}]
        return {"type": "TemplateProcessing", "single": pieces, "pair": pair, "special_tokens": known}

    def _says(self, key: str, default: bool) -> bool:
        value = self.get(key)
        return default if value is None else bool(value)

    def _named(self, name: str) -> list[str]:
        number = token_id(self._header.metadata, name)
        if number is None or not 0 <= number < len(self.tokens):
            raise self.refused(f"texts are to get a token around them, and tokenizer.ggml.{name}_token_id is {number}")
        return [self.tokens[number]]


def _definition(vocabulary: _Vocabulary, adds_bos: bool, **parts: Any) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.special(),
        "post_processor": vocabulary.around(adds_bos),
        **parts,
    }


def _model(vocabulary: _Vocabulary, merges: Sequence[tuple[str, str]], **options: Any) -> dict[str, Any]:
    fixed = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    return fixed | options | {"vocab": vocabulary.ids, "merges": merges}


def _byte_level(vocabulary: _Vocabulary) -> dict[str, Any]:
    name = vocabulary.get("pre")
    words = _WORDS.get(str(name))
    if words is None:
        raise vocabulary.refused(
            f"it cuts texts into words in the way {name!r} (tokenizer.ggml.pre); known are {', '.join(_WORDS)}"
        )
    merges = []
    for entry in vocabulary.strings("merges"):
        left, space, right = entry.partition(" ")
        if not space or left not in vocabulary.ids or right not in vocabulary.ids or left + right not in vocabulary.ids:
            raise vocabulary.refused(f"the merge {entry!r} is not one of two tokens to a third")
        merges.append((left, right))
    table = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": words.own_regex}
    return _definition(
        vocabulary,
        words.adds_bos,
        normalizer={"type": "NFC"} if words.composes else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*words.steps, table]},
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        model=_model(
            vocabulary, merges, unk_token=None, fuse_unk=False, byte_fallback=False, ignore_merges=words.whole_words
        ),
    )


def _sentencepiece(vocabulary: _Vocabulary) -> dict[str, Any]:
    if vocabulary.get("remove_extra_whitespaces"):
        raise vocabulary.refused("its tokenizer removes extra white space, which is not served")
    adds_space = vocabulary.get("add_space_prefix") is not False
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    normalizers: list[dict[str, Any]] = [mark]
    if adds_space:
        normalizers.insert(0, {"type": "Prepend", "prepend": "▁"})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = [token for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind == _UNKNOWN]
    return _definition(
        vocabulary,
        adds_bos=True,
        normalizer={"type": "Sequence", "normalizers": normalizers},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
        model=_model(
            vocabulary,
            _merges_by_score(vocabulary),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=True,
            ignore_merges=False,
        ),
    )


def _merges_by_score(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the highest score first. Where one token can be made in several ways,
    the longer left half goes first, as in the conversion that transformers does."""
    scores = vocabulary.get("scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens):
        raise vocabulary.refused("its metadata has no tokenizer.ggml.scores, one for each token")
    kinds = zip(vocabulary.tokens, vocabulary.kinds, strict=True)
    normal = {token for token, kind in kinds if kind == _NORMAL}
    ways = [
        (-scores[vocabulary.ids[token]], -cut, token[:cut], token[cut:])
        for token in vocabulary.tokens
        if token in normal
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    ways.sort(key=lambda way: way[:2])
    return [(left, right) for _, _, left, right in ways]
