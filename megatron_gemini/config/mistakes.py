"""All mistakes of a configuration at once, so that nobody mends one only to meet the next."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class MistakesError(ValueError):
    """Several mistakes, each as its own check tells it."""

    def __init__(self, found: list[str]) -> None:
        self.found = found
        numbered = (f"({number}) {text}" for number, text in enumerate(found, 1))
        super().__init__(f"{len(found)} mistakes: {'; '.join(numbered)}")


class Mistakes:
    """Collects the `ValueError` of each check."""

    def __init__(self) -> None:
        self.found: list[ValueError] = []

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """Keep a `ValueError` that is raised inside, and go on behind it."""
        try:
            yield
        except ValueError as error:
            self.found.append(error)

    def tell(self) -> None:
        """Raise what was found: one mistake as it is, several as a `MistakesError`, each once."""
        if len(self.found) == 1:
            raise self.found[0]
        texts = [
            text for error in self.found for text in (error.found if isinstance(error, MistakesError) else [str(error)])
        ]
        texts = list(dict.fromkeys(texts))
        if texts:
            raise MistakesError(texts)
