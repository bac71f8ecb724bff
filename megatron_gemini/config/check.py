"""Checks that the sections share. Each raises a `ValueError` that names the field, its value and the way out."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_gemini.config.schema import SectionValue


def positive(section: SectionValue, prefix: str, *names: str) -> None:
    """Every named field is greater than zero."""
    for name in names:
        value = getattr(section, name)
        if not value > 0:  # and not `value <= 0`, which nan would pass
            raise ValueError(f"{prefix}.{name} is {value}; it must be greater than 0")


def at_least(section: SectionValue, prefix: str, bound: float, *names: str) -> None:
    """Every named field is `bound` or more."""
    for name in names:
        value = getattr(section, name)
        if not value >= bound:
            raise ValueError(f"{prefix}.{name} is {value}; it must be {bound} or more")


def divides(divisor: int, value: int, divisor_name: str, name: str) -> None:
    """`value` is a multiple of `divisor`."""
    if value % divisor:
        below, above = value - value % divisor, value - value % divisor + divisor
        nearest = f"{below} or {above}" if below else f"{above}"
        what = divisor_name if divisor_name.startswith(str(divisor)) else f"{divisor_name} ({divisor})"
        raise ValueError(f"{name} is {value}, which {what} does not divide; the nearest that fit: {nearest}")


def one_of(section: SectionValue, prefix: str, name: str, choices: Sequence[str]) -> None:
    """The named field is one of `choices`."""
    value = getattr(section, name)
    if value not in choices:
        raise ValueError(f"{prefix}.{name} is {value!r}; choose one of {', '.join(map(str, choices))}")
