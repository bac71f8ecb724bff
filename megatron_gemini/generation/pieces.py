"""Tokens of an answer -> its pieces: texts and codes in order, of a whole answer or of one that still grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_gemini.contracts import TokenLayout
from megatron_gemini.data.samples.items import Codes
from megatron_gemini.generation.code_runs import CodeRun

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
WINDOW = 64  # pieces that are decoded again with every further one
LONGEST_PART = 3  # bytes of a UTF-8 character that lacks its last byte (RFC 3629: at most 4 bytes a character)


def split_answer(layout: TokenLayout, runs: Sequence[CodeRun], tokens: Sequence[int]) -> list[list[int] | Codes]:
    """The parts of an answer in order: text pieces as a list of ids, and the codes of items."""
    parts: list[list[int] | Codes] = []
    open_run = OpenRun(runs)
    for token in tokens:
        if layout.is_text(token):
            last = parts[-1] if parts else None
            if isinstance(last, list):
                last.append(token)
            else:
                parts.append([token])
        elif (made := open_run.add(token)) is not None:
            parts.append(made)
    return parts


class OpenRun:
    """Collects the codes of an item until its run ends."""

    def __init__(self, runs: Sequence[CodeRun]) -> None:
        self._runs, self._codes = runs, list[int]()

    def add(self, token: int) -> Codes | None:
        """The item, at the token that ends its run."""
        for run in self._runs:
            if token in run.codes:
                self._codes.append(token - run.codes.start)
            elif token == run.end:
                codes, self._codes = tuple(self._codes), []
                return Codes(run.modality, codes)
        return None


class GrowingAnswer:
    """Takes an answer token by token and gives what has become certain: text, or the codes of a whole item.

    decode: ids of a run of text -> its text, where more ids only ever add to the text. SentencePiece does so but for
        bytes: a character that is spelled in byte pieces is a U+FFFD for each of its bytes until its last one is there.
    The texts between two items, put together, are the text that `decode` makes of the whole run.
    """

    def __init__(self, layout: TokenLayout, runs: Sequence[CodeRun], decode: Callable[[list[int]], str]) -> None:
        self._layout, self._decode = layout, decode
        self._begins, self._open_run = {run.begin for run in runs}, OpenRun(runs)
        self._ids: list[int] = []
        self._given = 0

    def add(self, token: int) -> list[str | Codes]:
        """What the token completes, in order; mostly nothing or one text."""
        if self._layout.is_text(token):
            self._ids.append(token)
            # Never the piece alone: it would lose its leading space, or be one byte of a character.
            text = self._decode(self._ids)
            open_bytes = min(len(text) - len(text.rstrip(REPLACEMENT)), LONGEST_PART)
            new = self._new(text[: len(text) - open_bytes])
            # One piece in front that shows is context enough. Without this, a run of 4,000 pieces took 2.5 ms a piece.
            if len(self._ids) >= WINDOW and not open_bytes and (context := self._decode(self._ids[-1:])):
                self._ids, self._given = self._ids[-1:], len(context)
            return new
        if token in self._begins:
            return self.end()
        made = self._open_run.add(token)
        return [] if made is None else [made]

    def end(self) -> list[str | Codes]:
        """What was held back of the text; nothing more comes to it."""
        rest = self._new(self._decode(self._ids)) if self._ids else []
        self._ids, self._given = [], 0
        return rest

    def _new(self, text: str) -> list[str | Codes]:
        # The larger, since the last byte of a character is a U+FFFD as context, and held back with the next open byte.
        new, self._given = text[self._given :], max(self._given, len(text))
        return [new] if new else []
