"""Plain data, as JSON has it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]


def parse_object(text: str | bytes) -> dict[str, Json]:
    """The object that the text is; an empty one where it is none, since metadata is anybody's writing."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # brackets nested ten thousand deep are no ValueError
        return {}
    return value if isinstance(value, dict) else {}


def rounded(value: Json) -> Json:
    """The same with four decimals, and None where there is no number: JSON has neither NaN nor infinity."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value
