"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gemini.planning.sizes import parse_size, show_size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("80GB", 80 * 10**9),
        ("1TB", 10**12),
        ("79GiB", 79 << 30),
        ("1.5 tb", 1_500_000_000_000),
        ("512 MiB", 512 << 20),
        ("123", 123),
        ("7B", 7),
    ],
)
def test_a_size_is_read(text, count):
    assert parse_size(text, "--gpu_memory") == count


@pytest.mark.parametrize("text", ["", "GB", "80 GX", "-1GB", "0GB", "1,5TB", "80GB80", "1e3GB", "nan", "0.1B"])
def test_what_is_no_size_is_refused_with_the_options_name(text):
    with pytest.raises(ValueError, match=r"--host_memory is .*write a size such as 80GB, 79GiB or 1TB"):
        parse_size(text, "--host_memory")


@given(st.integers(1, 10**15))
def test_what_is_shown_is_what_was_read_but_for_rounding(count):
    assert parse_size(show_size(count), "x") == pytest.approx(count, rel=0.051)
