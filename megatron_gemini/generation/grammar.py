"""Which tokens may follow: text and whole runs of codes, as a small state machine over a batch.

Shape suffixes: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_gemini.contracts import TEXT as TEXT_ANSWER
from megatron_gemini.contracts import TokenLayout
from megatron_gemini.generation.code_runs import CodeRun, cannot_make
from megatron_gemini.generation.settings import ANY

TEXT, START, END = range(3)
FIRST = 3  # of two states a kind of run: inside its codes, and behind the last of them


class Grammar:
    """answer = (text piece | begin, `length` codes, end)* eos, where a run of codes is of any kind; a state a sequence.

    answer="text" leaves runs out; the name of a modality is exactly one run of its codes. A run begins only if all of
    it and the eos behind it fit into the `max_tokens` of the answer, so that no half item is ever returned.
    """

    def __init__(
        self, layout: TokenLayout, runs: Sequence[CodeRun], answer: str, max_tokens: int, sequences: int
    ) -> None:
        self._only = answer not in (ANY, TEXT_ANSWER)
        if self._only:
            runs = [run for run in runs if run.modality == answer]
            if not runs:
                raise ValueError(f"generate.answer is {answer}, but {cannot_make(answer)}")
            if max_tokens < runs[0].answer_tokens:
                raise ValueError(f"max_tokens is {max_tokens}; one {answer} needs {runs[0].answer_tokens}")
        # The shortest first, so that those that still fit are the first few.
        self.runs = [] if answer == TEXT_ANSWER else sorted(runs, key=lambda run: run.length)
        self.layout = layout
        self._begins = {run.begin: kind for kind, run in enumerate(self.runs)}
        self.state_B = [START if self._only else TEXT] * sequences
        self.made_B = [0] * sequences
        self.left_B = [max_tokens] * sequences
        self._table = self._allowed_by_state()

    def _allowed_by_state(self) -> torch.Tensor:
        """bool[states, V]. One table for all sequences: a mask for each would be made anew every step.

        Behind the states is a row for each number of kinds of run that fit: no state, since it depends on what is left.
        """
        layout, kinds = self.layout, len(self.runs)
        self._may_begin = FIRST + 2 * kinds
        open_rows = [TEXT, *range(self._may_begin, self._may_begin + kinds + 1)]
        table = torch.zeros(self._may_begin + kinds + 1, layout.size, dtype=torch.bool)
        table[open_rows, : layout.text_size] = True
        table[[*open_rows, END], layout.control("eos")] = True
        for kind, run in enumerate(self.runs):
            table[[START, *open_rows[kind + 2 :]], run.begin] = True
            table[FIRST + 2 * kind, run.codes.start : run.codes.stop] = True
            table[FIRST + 2 * kind + 1, run.end] = True
        return table

    def allowed(self) -> torch.Tensor:
        """What may come next, bool[B, V]; at least one token a row."""
        rows = [
            # All of a run and the eos have to fit, or max_tokens would cut an item that nothing can decode.
            self._may_begin + sum(left >= run.answer_tokens for run in self.runs) if state == TEXT else state
            for state, left in zip(self.state_B, self.left_B, strict=True)
        ]
        return self._table[rows]

    def in_codes(self) -> list[bool]:
        """Whether the next token is a code, by sequence."""
        return [state >= FIRST and (state - FIRST) % 2 == 0 for state in self.state_B]

    def advance(self, tokens: list[int]) -> list[bool]:
        """Takes the chosen token of every sequence; returns which sequences are finished."""
        finished = []
        for row, (token, in_codes) in enumerate(zip(tokens, self.in_codes(), strict=True)):
            state = self.state_B[row]
            self.left_B[row] -= 1
            if state in (TEXT, START) and token in self._begins:
                self.state_B[row], self.made_B[row] = FIRST + 2 * self._begins[token], 0
            elif in_codes:
                self.made_B[row] += 1
                self.state_B[row] += self.made_B[row] == self.runs[(state - FIRST) // 2].length
            elif state >= FIRST:
                self.state_B[row] = END if self._only else TEXT
            finished.append(token == self.layout.control("eos") or self.left_B[row] == 0)
        return finished

    def keep(self, rows: list[int]) -> None:
        """Keeps only these sequences, in this order."""
        self.state_B = [self.state_B[row] for row in rows]
        self.made_B = [self.made_B[row] for row in rows]
        self.left_B = [self.left_B[row] for row in rows]
