"""Text of a completion while its tokens arrive."""

from collections.abc import Sequence
from typing import Any


class TextStream:
    """Incremental decoding: what `push` and `finish` return, joined, is the decoded text of all tokens.

    A character may take several tokens, and a decoder may treat the first token of a text differently (a leading space
    vanishes). So new tokens are decoded behind the tokens already shown since the last piece, and while
    the text ends in U+FFFD, the mark of an unfinished character, nothing is given out.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0
        self._shown = 0

    def push(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        self._ids += ids
        text = self._pending()
        return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else self._show(text)

    def finish(self) -> str:
        """What is left, unfinished characters included."""
        return self._show(self._pending())

    def _pending(self) -> str:
        shown = self._decode(self._ids[self._context : self._shown])
        return self._decode(self._ids[self._context :])[len(shown) :]

    def _show(self, text: str) -> str:
        self._context, self._shown = self._shown, len(self._ids)
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
