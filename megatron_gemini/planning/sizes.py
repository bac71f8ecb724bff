"""Amounts of memory as people write them, and as they read them."""

from __future__ import annotations

import re

_UNITS = {"": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGTP", 1)}}
_UNITS |= {"B": 1, **{f"{p}IB": 1024**i for i, p in enumerate("KMGTP", 1)}}


def parse_size(text: str, option: str) -> int:
    """Bytes of a size such as 80GB (10^9), 79GiB (2^30), 1.5 TB or a plain number of bytes.

    Raises a `ValueError` that names `option`.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = found[2].upper() if found else ""
    if found is None or unit not in _UNITS or float(found[1]) * _UNITS[unit] < 1:
        raise ValueError(f"{option} is {text!r}; write a size such as 80GB, 79GiB or 1TB")
    return int(float(found[1]) * _UNITS[unit])


def show_size(count: float) -> str:
    """Bytes in the largest decimal unit that leaves a figure before the point: `12.3 GB`."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if abs(count) >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"
