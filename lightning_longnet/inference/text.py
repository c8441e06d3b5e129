"""Text that appears as its tokens do: whole characters, and nothing of a text at which it is to end."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# What a decoder writes for bytes that are no text, and for a character that is not complete
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
# The number of tokens that are decoded again with each further one, which may change what the ones before it are
_WINDOW = 64
_KEPT = 16


class TextStream:
    """The text of tokens that come one by one.

    The parts that `add` and `end` return are together what the tokenizer decodes of all tokens, up to the first of the
    stop texts.

    Args:
        decode: returns the text of tokens.
        stops: texts at which the text ends; they are not part of it.

    Attributes:
        is_stopped: whether a stop text was reached.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        if any(not isinstance(stop, str) or not stop for stop in stops):
            raise ValueError(f"stops must be texts of at least one character, got {list(stops)!r}")
        self._decode, self._stops = decode, tuple(stops)
        self._ids: list[int] = []
        self._length = 0  # of the text of `_ids` that was taken
        self._held = ""  # what may be the beginning of a stop text
        self.is_stopped = False

    def add(self, token: int) -> str:
        """Return the further text that is certain with one more token."""
        if self.is_stopped:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        certain = len(text) - text.endswith(_UNKNOWN)  # which may be a character that is not complete
        further, self._length = text[self._length : certain], max(self._length, certain)
        if len(self._ids) > _WINDOW and certain == len(text):
            self._ids = self._ids[-_KEPT:]
            self._length = len(self._decode(self._ids))
        return self._before_stop(further)

    def end(self) -> str:
        """Return the rest of the text."""
        if self.is_stopped:
            return ""
        rest = self._before_stop(self._decode(self._ids)[self._length :]) + ("" if self.is_stopped else self._held)
        self._ids, self._length, self._held = [], 0, ""
        return rest

    def _before_stop(self, further: str) -> str:
        """Return the text that is held and the further text, without what may belong to a stop text."""
        text, self._held = self._held + further, ""
        places = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.is_stopped = True
            return text[: min(places)[1]]  # of the one that is complete first, wherever the borders of tokens are
        longest = max(map(len, self._stops), default=1)
        for size in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                self._held = text[-size:]
                return text[:-size]
        return text
