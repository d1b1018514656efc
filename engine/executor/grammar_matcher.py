"""The seam between the sampling rank's masks and the library that follows grammars: llguidance, or xgrammar where that
extra is installed. Both compile for the tokenizer of a checkpoint."""

import importlib
import json
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engine.errors import InvalidOption
from engine.gguf.header import is_gguf
from engine.gguf.tokenizer import tokenizer_definition
from engine.request import Grammar

DEFAULT_BACKEND = "llguidance"
BACKENDS = {
    "llguidance": "engine.executor.llguidance_matcher",
    "xgrammar": "engine.executor.xgrammar_matcher",
}
"""Module of each; it has ``Compiler``."""


class GrammarMatcher(Protocol):
    """One request's place in its grammar."""

    def accept(self, token_id: int) -> None:
        """Goes on by a token. Raises ValueError where the grammar does not allow it."""
        ...

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which of the tokenizer's tokens may come next, tokens that end a text aside: [tokens of the tokenizer].
        Raises ValueError where the grammar has become too complex."""
        ...

    @property
    def may_end(self) -> bool:
        """Whether the text so far follows the whole grammar."""
        ...


class GrammarCompiler(Protocol):
    """For one checkpoint's tokenizer."""

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        """At the beginning of a grammar; compiled grammars are kept. Raises ValueError where it cannot be compiled."""
        ...


def open_compiler(backend: str, checkpoint: Path) -> GrammarCompiler:
    """Raises InvalidOption where the library is not installed, OSError and CheckpointError of the checkpoint."""
    try:
        module = importlib.import_module(BACKENDS[backend])
    except ModuleNotFoundError as error:
        raise InvalidOption(
            f"{backend} is not installed ({error}); pip install remuda[{backend}], or leave the option out"
        ) from error
    compiler: GrammarCompiler = module.Compiler(_tokenizer_json(checkpoint))
    return compiler


def _tokenizer_json(checkpoint: Path) -> str:
    if is_gguf(checkpoint):
        return json.dumps(tokenizer_definition(checkpoint))
    return (checkpoint / "tokenizer.json").read_text(encoding="utf-8")
