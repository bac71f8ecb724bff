"""Duplicates: of the same bytes, or of nearly the same picture."""

from __future__ import annotations

import itertools

import numpy as np
from PIL import Image

BITS = 128
MAX_DISTANCE = 15  # above, the bands are so narrow that they sort out little


def difference_hash(image_HW3: np.ndarray) -> int:
    """128 bits: whether the grey picture, reduced to 9 x 9, gets darker to the right (64) and downward (64).

    Two sizes or JPEG qualities of one picture differ in a few bits, unrelated pictures in about half of them. All
    pictures of one color are alike. (dHash, in both directions.)
    """
    # 9 x 9 pixels, so that 8 differences stand in every row and column.
    grey = Image.fromarray(image_HW3).convert("L").resize((9, 9), Image.Resampling.LANCZOS)
    # 9 x 9 values have 9 x 8 neighbors each way; without the last row and the last column there are 64.
    values = np.asarray(grey, np.int16)
    right, down = values[:8, :-1] > values[:8, 1:], values[:-1, :8] > values[1:, :8]
    return int.from_bytes(np.packbits(np.concatenate([right.ravel(), down.ravel()])).tobytes(), "big")


class Near:
    """Hashes seen so far, and whether a new one is within `distance` bits of one of them.

    The 128 bits are cut into distance + 1 bands. Two hashes that differ in at most `distance` bits are equal in one
    band at least, so looking up the bands finds every one of them, and only those that share a band are compared.
    """

    def __init__(self, distance: int) -> None:
        if not 0 <= distance <= MAX_DISTANCE:
            raise ValueError(f"--dedup-bits is {distance}; choose 0 to {MAX_DISTANCE} of the {BITS} bits")
        self.distance = distance
        edges = [BITS * band // (distance + 1) for band in range(distance + 2)]
        self._bands = [(low, (1 << (high - low)) - 1) for low, high in itertools.pairwise(edges)]
        self._seen: list[dict[int, list[int]]] = [{} for _ in self._bands]

    def __contains__(self, value: int) -> bool:
        for (low, mask), seen in zip(self._bands, self._seen, strict=True):
            for other in seen.get(value >> low & mask, ()):
                if (value ^ other).bit_count() <= self.distance:
                    return True
        return False

    def add(self, value: int) -> None:
        for (low, mask), seen in zip(self._bands, self._seen, strict=True):
            seen.setdefault(value >> low & mask, []).append(value)


class Duplicates:
    """Which samples are left out because one before them is the same. kind: none, exact, perceptual (which is both)."""

    def __init__(self, kind: str, distance: int) -> None:
        self.kind = kind
        self._files: set[bytes] = set()  # bytes and not hexadecimal text: half the memory, for millions of samples
        self._near = Near(distance)

    def reason(self, sha256: str, picture: int) -> str:
        """'duplicate_file', 'duplicate_picture' or ''. Changes nothing."""
        if self.kind != "none" and bytes.fromhex(sha256) in self._files:
            return "duplicate_file"
        return "duplicate_picture" if self.kind == "perceptual" and picture in self._near else ""

    def keep(self, sha256: str, picture: int) -> None:
        """A sample that is in the build."""
        if self.kind != "none":
            # As bytes, half of what the digits take: the hashes of all kept samples stay in memory.
            self._files.add(bytes.fromhex(sha256))
        if self.kind == "perceptual":
            self._near.add(picture)
