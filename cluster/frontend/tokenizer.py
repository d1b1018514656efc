"""Text to token ids and back, with a checkpoint's own tokenizer.json and chat template.

What a user wrote is text, also where it looks like a control token (``<|eot_id|>``): only a chat template, token ids,
or a caller who asks for it can put control tokens into a prompt. To that end a second tokenizer is made in which every
control token bears a name that nobody can guess. Plain text is encoded with it; in a rendered template the control
tokens that the template wrote are renamed and those in the messages are not. So the whole text is still encoded at
once, exactly as the original would, and no piece of text loses its neighbours.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from cluster.frontend.chat_template import ChatTemplate
from cluster.frontend.detokenizer import decode_text
from cluster.frontend.model_files import ModelFiles
from cluster.frontend.token_bytes import TokenBytes
from engine.errors import CheckpointError, InvalidRequest
from engine.gguf.header import is_gguf
from engine.gguf.tokenizer import tokenizer_definition

# Unicode noncharacters: they stand in no text that was meant as such.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_ESCAPED_OPEN, _ESCAPED_CLOSE = r"\\ufdd0", r"\\ufdd1"


class Tokenizer:
    """One checkpoint's tokenizer. Threads may share it; encoding releases the interpreter lock.

    Args:
        files: where the tokenizer and the template are: a directory with tokenizer.json, or a GGUF file.

    Raises:
        CheckpointError: the tokenizer is missing, broken or of an unsupported kind.
    """

    def __init__(self, files: ModelFiles) -> None:
        definition, self._original = _read(files.path)
        special = {entry["content"]: entry["id"] for entry in definition["added_tokens"] if entry["special"]}
        self._nonce = secrets.token_hex(8)
        # The longest first, so that the pattern prefers it.
        self._special = sorted(special, key=len, reverse=True)
        names = {content: f"{_CLOSE}{self._nonce}.{index}{_OPEN}" for index, content in enumerate(self._special)}
        self._quotes = {content: f"{_OPEN}{self._nonce}.{index}{_CLOSE}" for index, content in enumerate(self._special)}
        self._names = names
        self._plain = _load(json.dumps(_renamed(definition, names)))
        self._id_of_renamed = {
            renamed_id: special[content]
            for content, name in names.items()
            if (renamed_id := self._plain.token_to_id(name)) is not None and renamed_id != special[content]
        }
        self._special_pattern = re.compile("|".join(map(re.escape, self._special)) or r"(?!)")
        # Python's repr and JSON in ASCII, either of which a template may use, write the two characters as escapes.
        opening, closing = f"(?:{_OPEN}|{_ESCAPED_OPEN})", f"(?:{_CLOSE}|{_ESCAPED_CLOSE})"
        self._quoted_pattern = re.compile(f"{opening}{self._nonce}\\.([0-9]+){closing}")
        self._named_pattern = re.compile(f"{_CLOSE}{self._nonce}\\.[0-9]+{_OPEN}")
        self._prefix, self._suffix = _added_around(self._original)
        self.special_ids = frozenset(special.values())
        self._id_of_special = special
        vocabulary = {id_: token for token, id_ in self._original.get_vocab(with_added_tokens=True).items()}
        self.bytes = TokenBytes(vocabulary, self.special_ids, definition.get("decoder") or {})
        self._longest_token_bytes = self.bytes.longest
        self._template = ChatTemplate(files.chat_template, files.named_tokens) if files.chat_template else None
        self._tool_template = ChatTemplate(files.tool_template, files.named_tokens) if files.tool_template else None

    @property
    def takes_tools(self) -> bool:
        """Whether the checkpoint has a chat template that shows tools to the model."""
        template = self._tool_template or self._template
        return template is not None and template.takes_tools

    def encode(self, text: str, add_special_tokens: bool = True, parse_special_tokens: bool = False) -> list[int]:
        """The ids of a text. ``add_special_tokens`` puts around it what the tokenizer puts around every text (a BOS,
        mostly); ``parse_special_tokens`` takes control tokens in the text for what they look like.
        """
        ids = _ids(self._original, text) if parse_special_tokens else self._encode_plain(text)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        add_special_tokens: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """The prompt of a conversation. A template writes its BOS itself, hence ``add_special_tokens`` is off.

        Raises:
            InvalidRequest: there is no template, it does not know tools and there are some, or it refuses the messages.
        """
        return self.encode(self.render_chat(messages, add_generation_prompt, variables, tools), add_special_tokens)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """What ``encode`` takes for a conversation: its control tokens bear their other names. Raises as above."""
        template = self._tool_template if tools and self._tool_template else self._template
        if template is None:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions, or a checkpoint with chat_template.jinja",
                "messages",
            )
        if tools and not template.takes_tools:
            raise InvalidRequest("this model's chat template does not take tools; leave tools out", "tools")
        rendered = template.render(
            self._quote(messages), add_generation_prompt, self._quote(variables or {}), self._quote(tools)
        )
        named = self._special_pattern.sub(lambda found: self._names[found[0]], rendered)
        return self._quoted_pattern.sub(lambda found: self._special[int(found[1])], named)

    def decode(self, token_ids: Sequence[int], with_special: bool = False) -> str:
        """A whole text. ``with_special`` shows control tokens."""
        return decode_text(self.bytes, token_ids, with_special)

    def control_tokens(self, names: Iterable[str]) -> frozenset[int]:
        """The ids of those of these that are control tokens here."""
        return frozenset(self._id_of_special[name] for name in names if name in self._id_of_special)

    def token_id(self, name: str) -> int | None:
        """The token that tokenizer.json writes so."""
        token_id: int | None = self._original.token_to_id(name)
        return token_id

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as tokenizer.json writes it."""
        return [self._original.id_to_token(token_id) or "" for token_id in token_ids]

    def fewest_tokens(self, text: str) -> int:
        """A bound that needs no encoding: what the user's or a template's text has at least."""
        return len(self._named_pattern.sub("", text)) // self._longest_token_bytes

    def enough_of(self, text: str, num_tokens: int) -> str:
        """As much of a text as decides its first so many tokens, where it is much longer."""
        return text[: (num_tokens + 1) * self._longest_token_bytes]

    def _encode_plain(self, text: str) -> list[int]:
        ids = _ids(self._plain, text)
        if not self._id_of_renamed:
            return ids
        return [self._id_of_renamed.get(token_id, token_id) for token_id in ids]

    def _quote(self, value: Any) -> Any:
        """The value with every control token in its strings replaced by a sign that survives the template."""
        if isinstance(value, str):
            return self._special_pattern.sub(lambda found: self._quotes[found[0]], value)
        if isinstance(value, Mapping):
            return {self._quote(key): self._quote(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self._quote(entry) for entry in value]
        return value


def _ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    """As ``encode``, which holds Python's lock all the while, for seconds if the text is long. This lets others run."""
    ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


def _read(checkpoint: Path) -> tuple[dict[str, Any], tokenizers.Tokenizer]:
    """What tokenizer.json says, or would say, and the tokenizer made of it. Raises CheckpointError."""
    if is_gguf(checkpoint):
        path, text = checkpoint, json.dumps(tokenizer_definition(checkpoint))
    else:
        path = checkpoint / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; Remuda needs a fast tokenizer's tokenizer.json")
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return json.loads(text), _load(text)
    except Exception as error:  # tokenizers raises no narrower class
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _load(text: str) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _added_around(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after every text."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise CheckpointError("tokenizer.json's post-processor changes the text's own tokens, which is not supported")


def _renamed(definition: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """tokenizer.json with its control tokens renamed, and no post-processor (which would name them)."""
    added = [
        {**entry, "content": names.get(entry["content"], entry["content"])} for entry in definition["added_tokens"]
    ]
    model = dict(definition["model"])
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {names.get(token, token): token_id for token, token_id in model["vocab"].items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return {**definition, "added_tokens": added, "model": model, "post_processor": None}
