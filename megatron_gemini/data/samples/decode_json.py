"""JSON from strangers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

from megatron_gemini.modalities.bad_sample import BadSample, one_line

if TYPE_CHECKING:
    from megatron_gemini.config.schema import Plain

Json: TypeAlias = "Plain | Mapping[str, Json] | Sequence[Json]"
"""What can be written as JSON; read back, it is `Plain`."""


def decode_json(data: bytes) -> Plain:
    """Any JSON value. Raises BadSample: bad_json."""
    try:
        # Of bytes, json would guess the encoding, and read UTF-16 here that no text may be in.
        return cast("Plain", json.loads(data.decode("utf-8-sig")))
    # Deep nesting is a RecursionError, and a number of more than 4,300 digits a ValueError that JSON does not name.
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", f"not JSON: {one_line(error)}") from None
