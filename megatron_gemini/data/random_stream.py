"""Random numbers by key, in place of a generator's state."""

from __future__ import annotations

import hashlib

import numpy as np


def random_stream(*key: int | str) -> np.random.Generator:
    """Random numbers that depend on the key alone, the same on every rank and after every resume.

    Philox, keyed by a hash (Salmon et al. 2011): it has no state to save, and its streams are independent.
    """
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
