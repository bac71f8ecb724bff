"""Which tokens may follow: text and whole images, as a small state machine over a batch.

Shape suffixes: B sequences, V vocabulary.
"""

from __future__ import annotations

import torch

from megatron_gemini.contracts import TokenLayout

TEXT, START_IMAGE, IMAGE, END_IMAGE, END = range(5)
CANNOT_DRAW = (
    "this model cannot draw: it has no image codes, or was trained without train.image_tokenizer; ask for text instead"
)
MAY_DRAW = 5  # TEXT with leave to begin an image: a row of the table, no state, since it depends on what is left


class Grammar:
    """answer = (text piece | image_begin, `codes_per_image` codes, image_end)* eos, a state per sequence.

    answer="text" leaves images out; answer="image" is exactly one image. An image begins only if all of it and
    the eos behind it fit into the `max_tokens` of the answer, so that no half image is ever returned.
    """

    def __init__(self, layout: TokenLayout, codes_per_image: int, answer: str, max_tokens: int, sequences: int) -> None:
        draws = len(layout.code_range("image")) > 0 and codes_per_image > 0
        if answer == "image" and not draws:
            raise ValueError(f"an image was asked for, but {CANNOT_DRAW}")
        self.image_tokens = codes_per_image + 3  # begin, codes, end, eos
        if answer == "image" and max_tokens < self.image_tokens:
            raise ValueError(f"max_tokens is {max_tokens}; an image of this model needs {self.image_tokens}")
        self.layout, self.codes, self.answer = layout, codes_per_image, answer
        self.draws = draws and answer != "text"
        self.state_B = [START_IMAGE if answer == "image" else TEXT] * sequences
        self.drawn_B = [0] * sequences
        self.left_B = [max_tokens] * sequences
        # bool[6, V], a row for each state. One table for all sequences: a mask for each would be made anew every step.
        table = torch.zeros(6, layout.size, dtype=torch.bool)
        table[[TEXT, MAY_DRAW], : layout.text_size] = True
        table[[TEXT, MAY_DRAW, END], layout.control("eos")] = True
        table[[START_IMAGE, MAY_DRAW], layout.control("image_begin")] = True
        codes = layout.code_range("image")
        table[IMAGE, codes.start : codes.stop] = True
        table[END_IMAGE, layout.control("image_end")] = True
        self._table = table

    def allowed(self) -> torch.Tensor:
        """What may come next, bool[B, V]; at least one token a row."""
        rows = [
            # All of the image and the eos have to fit, or max_tokens would cut an image that nothing can decode.
            MAY_DRAW if state == TEXT and self.draws and left >= self.image_tokens else state
            for state, left in zip(self.state_B, self.left_B, strict=True)
        ]
        return self._table[rows]

    def in_image(self) -> list[bool]:
        """Whether the next token is an image code, by sequence."""
        return [state == IMAGE for state in self.state_B]

    def advance(self, tokens: list[int]) -> list[bool]:
        """Takes the chosen token of every sequence; returns which sequences are finished."""
        finished = []
        for row, token in enumerate(tokens):
            state = self.state_B[row]
            self.left_B[row] -= 1
            if state in (TEXT, START_IMAGE) and token == self.layout.control("image_begin"):
                self.state_B[row], self.drawn_B[row] = IMAGE, 0
            elif state == IMAGE:
                self.drawn_B[row] += 1
                self.state_B[row] = END_IMAGE if self.drawn_B[row] == self.codes else IMAGE
            elif state == END_IMAGE:
                self.state_B[row] = END if self.answer == "image" else TEXT
            finished.append(token == self.layout.control("eos") or self.left_B[row] == 0)
        return finished

    def keep(self, rows: list[int]) -> None:
        """Keeps only these sequences, in this order."""
        self.state_B = [self.state_B[row] for row in rows]
        self.drawn_B = [self.drawn_B[row] for row in rows]
        self.left_B = [self.left_B[row] for row in rows]
