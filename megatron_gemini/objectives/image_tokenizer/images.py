"""Batches of images alone, for training the image code tokenizer.

Shape suffixes: B images of this rank, S pixels of a side.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch

from megatron_gemini.config.check import divides
from megatron_gemini.config.data import SourceConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import Plain
from megatron_gemini.data.loading.lane import RESTORE
from megatron_gemini.data.random_stream import random_stream
from megatron_gemini.data.sources.identity import files_identity
from megatron_gemini.data.sources.paths import expand_shards
from megatron_gemini.data.sources.shards import Shards
from megatron_gemini.modalities.bad_sample import BadSample, guarded
from megatron_gemini.modalities.image.preprocess import decode_image, signed_pixels, square_image
from megatron_gemini.modalities.image.spec import IMAGE

logger = logging.getLogger(__name__)
ENDINGS = IMAGE.members  # what this objective trains on is images, whatever else the samples hold


class ImageLoader:
    """Every image of all sources once an epoch, in an order that depends on (seed, epoch) alone.

    The batch of step s is the images at positions s * images_per_step onwards, and each rank takes its equal share,
    so neither batches nor their order depend on the ranks. An image that cannot be read is skipped, counted each time
    in `skipped` by reason, and the next one of the epoch's order that can be read takes its place, on any rank.

    Raises ValueError for sizes that do not divide, shards without images, and more than data.max_bad_share bad ones.
    """

    def __init__(self, config: RunConfig, images_per_step: int, data_rank: int, data_size: int) -> None:
        if not config.data.sources:
            raise ValueError("data.sources is empty; name at least one set of shards with images")
        divides(data_size, images_per_step, f"{data_size} data-parallel ranks", "objective.images_per_step")
        self.config, self.share = config, images_per_step // data_size
        self.images_per_step, self.rank, self.size, self.step = images_per_step, data_rank, data_size, 0
        self.shards = [Shards(expand_shards(path)) for path in _paths(config.data.sources)]
        self.samples = [
            (number, sample)
            for number, shards in enumerate(self.shards)
            for sample in range(len(shards))
            if any(ending in shards.endings(sample) for ending in ENDINGS)
        ]
        if not self.samples:
            endings = ", ".join(ENDINGS)
            raise ValueError(f"data.sources ({', '.join(_paths(config.data.sources))}) hold no image ({endings})")
        self.skipped: Counter[str] = Counter()
        self._bad: dict[int, BadSample] = {}
        self._images: dict[int, np.ndarray] = {}
        self._room = config.data.cache_bytes
        self._order: tuple[int, np.ndarray] = (-1, np.arange(0))

    def next(self) -> torch.Tensor:
        """float32[B, S, S, 3] in [-1, 1], B = images_per_step / data_size."""
        first = self.step * self.images_per_step + self.rank * self.share
        found = [self._readable(place) for place in range(first, first + self.share)]
        self.step += 1
        return signed_pixels(np.stack(found))

    def validation(self) -> torch.Tensor:
        """This rank's share of the first images of data.validation, as `next`, the same in every run."""
        data = dataclasses.replace(self.config.data, sources=self.config.data.validation)
        config = dataclasses.replace(self.config, data=data)
        return ImageLoader(config, self.images_per_step, self.rank, self.size).next()

    def seen(self) -> list[tuple[str, int, list[str]]]:
        """(label, samples, paths) of every set of shards, which ranks compare."""
        labels = _paths(self.config.data.sources)
        pairs = zip(labels, self.shards, strict=True)
        return [(label.rsplit("/", 1)[-1], len(shards), list(shards.paths)) for label, shards in pairs]

    def state(self) -> dict[str, Plain]:
        """By names, as of lanes; one rank says which files there are."""
        files: dict[str, Plain] = {"files": {"identity": self._identity}} if self.rank == 0 else {}
        return {"images": {"step": self.step}, **files}

    @functools.cached_property
    def _identity(self) -> str:
        return files_identity([path for shards in self.shards for path in shards.paths])

    def load_state(self, state: Mapping[str, Plain]) -> None:
        """Raises ValueError for a state that is damaged, or of other files."""
        images, files = state.get("images"), state.get("files")
        step = images.get("step") if isinstance(images, dict) else None
        if type(step) is not int or step < 0 or not isinstance(files, dict):
            raise ValueError("the state of the images is not what this version writes; the checkpoint is damaged")
        # With other images every position of the order would be another one.
        if self.rank == 0 and files.get("identity") != self._identity:
            raise ValueError(f"the images of data.sources have changed (names, sizes or content); {RESTORE}")
        self.step = step

    def _readable(self, place: int) -> np.ndarray:
        """uint8[S, S, 3]: the image at a place of the endless sequence of epochs, or the next that can be read."""
        # By the place alone, so that the images of a step are the same on any number of ranks.
        for behind in range(len(self.samples)):
            image = self._image(place + behind, counted=not behind)
            if image is not None:
                return image
        raise ValueError(f"none of the {len(self.samples)} images can be read: {dict(self._reasons())}")

    def _image(self, place: int, counted: bool) -> np.ndarray | None:
        """uint8[S, S, 3] at a place; None if it cannot be read, which `counted` says to count."""
        epoch, index = divmod(place, len(self.samples))
        # By key and not by a generator's state: a resume needs the number of the step alone.
        if self._order[0] != epoch:
            self._order = (epoch, random_stream(self.config.train.seed, "images", epoch).permutation(len(self.samples)))
        chosen = int(self._order[1][index])
        # Counted again in every epoch, but decoded once: a bad image stays bad.
        if chosen in self._bad:
            self.skipped[self._bad[chosen].reason] += counted
            return None
        if chosen not in self._images:
            try:
                number, sample = self.samples[chosen]
                with guarded("decode", self.shards[number].key(sample)):
                    # One image of a sample, in the first of the known formats that it has.
                    ending = [ending for ending in ENDINGS if ending in self.shards[number].endings(sample)][:1]
                    (data,) = list(self.shards[number].read(sample, ending).values())[:1]
                    image = square_image(decode_image(data), self.config.image_tokenizer.image_size)
            except BadSample as error:
                self._skip(chosen, error)
                self.skipped[error.reason] += counted
                return None
            # Every epoch needs every image alike, so what is kept stays, and the rest is decoded again each time.
            if image.nbytes > self._room:
                return image
            self._room -= image.nbytes
            self._images[chosen] = image
        return self._images[chosen]

    def _reasons(self) -> Counter[str]:
        return Counter(error.reason for error in self._bad.values())

    def _skip(self, chosen: int, error: BadSample) -> None:
        """Remember a bad image, and judge the share of distinct bad ones: every epoch meets the same ones again."""
        if error.reason not in {known.reason for known in self._bad.values()}:
            logger.warning("skipped an image (%s); more of this kind are only counted: %s", error.reason, error)
        self._bad[chosen] = error
        # One bad image alone never ends a run, however few there are.
        bad = len(self._bad)
        if bad > max(1, self.config.data.max_bad_share * len(self.samples)):
            raise ValueError(
                f"{bad} images cannot be read ({dict(self._reasons())}), more than data.max_bad_share "
                f"({self.config.data.max_bad_share:g}) of {len(self.samples)}; the last one: {error}"
            )


def _paths(sources: tuple[SourceConfig, ...]) -> list[str]:
    """The sources' shards, each set once."""
    return list(dict.fromkeys(source.shards for source in sources))
