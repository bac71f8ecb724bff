"""Text to SentencePiece ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import sentencepiece


class TextTokenizer:
    """A trained SentencePiece model; its ids are the text range of `TokenLayout` as they are.

    Raises ValueError when the file is missing or is no SentencePiece model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"the text model {str(path)!r} does not exist; train one or name another file")
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.Load(str(self.path))
        except (RuntimeError, OSError):
            raise ValueError(f"{str(path)!r} is not a SentencePiece model") from None

    @property
    def size(self) -> int:
        """Number of ids."""
        return self._model.GetPieceSize()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any control token."""
        return self._model.EncodeAsIds(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. Raises ValueError for an id outside the model."""
        wrong = next((i for i in ids if not 0 <= i < self.size), None)
        if wrong is not None:
            raise ValueError(f"token {wrong} is no text piece; the text model has ids 0 to {self.size - 1}")
        return self._model.DecodeIds([int(i) for i in ids])
