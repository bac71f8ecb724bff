"""JSON from strangers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, cast

from megatron_gemini.modalities.bad_sample import BadSample, one_line

if TYPE_CHECKING:
    from megatron_gemini.config.schema import Plain


def decode_json(data: bytes) -> Plain:
    """Any JSON value. Raises BadSample: bad_json."""
    try:
        return cast("Plain", json.loads(data))
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", f"not JSON: {one_line(error)}") from None
