"""Code Llama's infilling: what stands between a prefix and a suffix.

The prompt is ``<PRE> prefix <SUF>suffix <MID>`` after the BOS, each mark one control token; the model ends what belongs
in between with ``<EOT>``. The prefix has SentencePiece's leading space, the suffix none, as the model was trained.
"""

from cluster.frontend.tokenizer import Tokenizer
from engine.errors import InvalidRequest

_NAMES = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
_BARRIER = "☺"
"""A character that no token joins with its neighbours. Behind it a text is encoded without a leading space."""


class Infilling:
    """Args:
    tokenizer: of the served checkpoint, which may not know infilling.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = [tokenizer.token_id(name) for name in _NAMES]
        known = [token_id for token_id in ids if token_id is not None]
        self._marks = known if len(known) == len(_NAMES) else None
        self._tokenizer = tokenizer

    @property
    def end_ids(self) -> list[int]:
        """What ends a filled gap."""
        return self._marks[3:] if self._marks else []

    def encode(self, prefix: str, suffix: str, add_special_tokens: bool = True) -> list[int]:
        """The prompt's ids. Raises InvalidRequest where the checkpoint does not know infilling."""
        if self._marks is None:
            raise InvalidRequest(
                "this model does not fill in: its tokenizer lacks ▁<PRE>, ▁<SUF>, ▁<MID> or ▁<EOT>, which Code Llama"
                " has; leave suffix out",
                "suffix",
            )
        begin, middle, end = self._marks[:3]
        bos = self._tokenizer.encode("") if add_special_tokens else []
        return [*bos, begin, *self._bare(" " + prefix), middle, *self._bare(suffix), end]

    def _bare(self, text: str) -> list[int]:
        barrier = self._tokenizer.encode(_BARRIER, add_special_tokens=False)
        ids = self._tokenizer.encode(_BARRIER + text, add_special_tokens=False)
        assert ids[: len(barrier)] == barrier, "the barrier joined with the text"
        return ids[len(barrier) :]
