"""The statuses that a command ends with, beside 0, and the errors that lead to them.

Below everything: what trains raises them, and the command line, which imports nothing heavy, reads them.
"""

from __future__ import annotations

FAILED = 1
"""Anything that no other status stands for, told with its traceback."""
MISTAKE = 2
"""Settings, files or data that cannot be used."""
NOT_LEARNING = 3
"""Too many steps in a row that changed no weight."""
RANK_LOST = 4
"""A rank that gave no sign of life."""
INTERRUPTED = 130


class NotLearningError(Exception):
    """Ends a run whose steps change no weight; its text is one line for the user."""
