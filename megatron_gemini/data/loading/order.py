"""The order of a source's samples: a pure function of (seed, source, epoch), in memory that does not grow with them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from megatron_gemini.data.random_stream import random_stream

WINDOW = 1 << 17  # samples: a permutation of one megabyte, over a hundred shards of a thousand samples
_KEPT = 4  # windows: some lanes begin one, or an epoch, while others finish the one before


class Order:
    """Every epoch has all samples once. Up to `WINDOW` samples are permuted as a whole.

    Of more samples, the shards are permuted and put into windows of whole shards, and the samples of each window are
    permuted. A window has at most `WINDOW` samples unless one shard has more. At any time only the shards of a window
    are read, and only its permutation is in memory.
    """

    def __init__(self, bounds: Sequence[int], seed: int, label: str, window: int = 0) -> None:
        """bounds: number of the first sample of every shard, and that of all samples. window: in place of `WINDOW`,
        if it is not 0.
        """
        self.window = window or WINDOW
        self.bounds, self.key = np.asarray(bounds, np.int64), (seed, "order", label)
        self._epochs: dict[int, tuple[list[np.ndarray], np.ndarray]] = {}
        self._samples: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, sample) of a position in the endless sequence of epochs."""
        epoch, place = divmod(position, len(self))
        _, ends = self._windows(epoch)
        window = int(np.searchsorted(ends, place, side="right"))
        begin = int(ends[window - 1]) if window else 0
        return epoch, int(self._order(epoch, window)[place - begin])

    def _windows(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """(shards of every window, where each window ends in the epoch)."""
        if epoch not in self._epochs:
            shards = np.arange(len(self.bounds) - 1)
            # Few samples are one window, whatever the shards: how they are divided into shards changes nothing then.
            if len(self) > self.window:
                shards = random_stream(*self.key, epoch, "shards").permutation(shards)
            begins, filled = [0], 0
            for place, count in enumerate(np.diff(self.bounds)[shards].tolist()):
                if filled and filled + count > self.window:
                    begins.append(place)
                    filled = 0
                filled += count
            windows = np.split(shards, begins[1:])
            while len(self._epochs) > 1:  # this one and the one before, which some lanes have not finished
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = windows, np.cumsum([np.diff(self.bounds)[window].sum() for window in windows])
        return self._epochs[epoch]

    def _order(self, epoch: int, window: int) -> np.ndarray:
        """The samples of a window in their order, int64."""
        key = (epoch, window)
        if key not in self._samples:
            shards = np.sort(self._windows(epoch)[0][window])  # so that the window's permutation alone decides
            samples = np.concatenate([np.arange(self.bounds[shard], self.bounds[shard + 1]) for shard in shards])
            random = random_stream(*self.key, epoch, *([window] if window else []))
            self._samples[key] = samples[random.permutation(len(samples))]
            while len(self._samples) > _KEPT:
                self._samples.popitem(last=False)
        self._samples.move_to_end(key)
        return self._samples[key]
