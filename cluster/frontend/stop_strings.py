"""Stop strings in a text that comes in pieces.

An Aho-Corasick automaton (Aho and Corasick, Efficient String Matching, CACM 1975) over all stop strings. Its state
after each character is the longest suffix of the text that begins some stop string, and that suffix is exactly what
must be held back. So how the text was cut into pieces makes no difference.
"""

from collections import deque
from collections.abc import Sequence


class _Node:
    __slots__ = ("children", "depth", "failure", "match")

    def __init__(self, depth: int) -> None:
        self.children: dict[str, _Node] = {}
        self.depth = depth
        self.failure: _Node = self
        self.match: str | None = None
        """The longest stop string that ends here."""


def _automaton(stops: Sequence[str]) -> _Node:
    root = _Node(0)
    for stop in stops:
        node = root
        for char in stop:
            if char not in node.children:
                node.children[char] = _Node(node.depth + 1)
            node = node.children[char]
        node.match = stop
    queue: deque[_Node] = deque()
    for child in root.children.values():
        child.failure = root
        queue.append(child)
    while queue:
        node = queue.popleft()
        for char, child in node.children.items():
            child.failure = _next(node.failure, char)
            child.match = child.match or child.failure.match
            queue.append(child)
    return root


def _next(node: _Node, char: str) -> _Node:
    while True:
        if (child := node.children.get(char)) is not None:
            return child
        if node.depth == 0:
            return node
        node = node.failure


class StopStrings:
    """Cuts a text before the stop string that is complete first (of two that end together, the longer one).

    Args:
        stops: non-empty strings; may be none at all.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "a stop string is empty"
        self._root = _automaton(stops) if stops else None
        self._node = self._root
        self._held = ""
        self.matched: str | None = None

    @property
    def looks_for_any(self) -> bool:
        """Whether there are stop strings."""
        return self._root is not None

    def feed(self, text: str) -> str:
        """The next piece of the text → what can be shown now. After a match nothing more is to be fed."""
        assert self.matched is None
        if self._root is None or not text:
            return text
        node = self._node
        assert node is not None
        for index, char in enumerate(text):
            node = _next(node, char)
            if node.match is not None:
                self.matched = node.match
                whole = self._held + text[: index + 1]
                self._held = ""
                return whole[: -len(node.match)]
        self._node = node
        whole = self._held + text
        shown = len(whole) - node.depth
        self._held = whole[shown:]
        return whole[:shown]

    def finish(self) -> str:
        """The text is over without a match: what was held back."""
        held, self._held = self._held, ""
        self._node = self._root
        return held
