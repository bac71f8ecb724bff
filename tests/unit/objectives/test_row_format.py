"""What an objective wants of rows fits the vocabulary that they are made of."""

from __future__ import annotations

import pytest

from megatron_gemini.contracts import RowFormat, TokenLayout

LAYOUT = TokenLayout(10, (("image", 4),))


def test_weights_of_the_kinds_of_target_that_there_are_pass():
    RowFormat().check(LAYOUT)
    RowFormat(target_weights={"text": 0.5, "image": 0.3}).check(LAYOUT)


def test_the_weight_of_a_mistyped_kind_of_target_is_refused():
    with pytest.raises(ValueError, match=r"^the loss weight of imgae is of no kind of target; there are text, image$"):
        RowFormat(target_weights={"imgae": 0.3}).check(LAYOUT)
