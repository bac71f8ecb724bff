"""Silence what DeepSpeed, torch and megatron-core say on every run and a user can do nothing about.

Only messages that are listed here go; every other warning, and every error, is shown.
"""

from __future__ import annotations

import logging
import os
import warnings

_WARNINGS = (
    # DeepSpeed calls collectives by the names that its oldest torch has; torch warns at each call.
    (r"`torch\.distributed\.\w+` is deprecated", FutureWarning),
    # megatron-core falls back to torch's own operations, which the tensor-parallel layers never reach.
    (r"Transformer Engine and Apex are not installed", UserWarning),
)
_NO_ACCELERATOR = "Setting accelerator to CPU"


def quiet_warnings() -> None:
    """Install the filters; call it before DeepSpeed or megatron-core is imported. Calling it again changes nothing."""
    for message, category in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    logger = logging.getLogger("DeepSpeed")
    # On the logger and not on its handlers, which DeepSpeed makes when it is imported: later than this.
    if _is_news not in logger.filters:
        logger.addFilter(_is_news)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorBoard loads TensorFlow where it finds it


def _is_news(record: logging.LogRecord) -> bool:
    """False for DeepSpeed's hint on a missing accelerator where torch is built for CPU only: it cannot be otherwise."""
    if not record.getMessage().startswith(_NO_ACCELERATOR):
        return True
    import torch

    return torch.version.cuda is not None
