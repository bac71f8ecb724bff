"""A plugin that writes through which functions of the package a training step reaches the model.

    FRAMES=out.json python -m megatron_gemini.train --plugin tests.end_to_end.frames ...

The file has a list of [module, function] from the command to the model's forward, of the first step alone.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

PACKAGE = "megatron_gemini"


def record() -> None:
    """Write the calls that led here, unless they are written already."""
    out = Path(os.environ["FRAMES"])
    if out.exists():
        return
    calls, frame = [], sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        # An import is no call of ours, and neither is a module's own code below `python -m`.
        if module.split(".")[0] == PACKAGE and frame.f_code.co_name != "<module>":
            calls.append([module, frame.f_code.co_name])
        frame = frame.f_back
    out.write_text(json.dumps(calls[::-1]))


def watch() -> None:
    from megatron_gemini.models.stage import DecoderStage

    forward = DecoderStage.forward

    def watched(*arguments, **named):
        record()
        return forward(*arguments, **named)

    DecoderStage.forward = watched  # type: ignore[method-assign]


if "FRAMES" in os.environ:
    watch()
