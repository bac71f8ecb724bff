"""JSON from strangers."""

from __future__ import annotations

import json
from typing import Any

from megatron_gemini.modalities.bad_sample import BadSample, one_line


def decode_json(data: bytes) -> Any:
    """Any JSON value. Raises BadSample: bad_json."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", f"not JSON: {one_line(error)}") from None
