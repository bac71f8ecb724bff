"""Build shards of real handwriting: scikit-learn's 1,797 digits as images, short clips and interleaved documents.

    python tools/build_digits.py --out runs/quickstart/data

Writes {train,validation}/{digits,clips,interleave}-NNN.tar, digits.split.json (which digits are on which side) and
digits.manifest.json. A digit is on one side only, also as a frame of a clip or as an image in a document. The training
side also gets varied-NNN.tar: the same digits a little turned, slanted, scaled and shifted, marked "augmented" in their
metadata; its clips and documents draw from both. A finished build with the same options is reused.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from megatron_gemini.data.sources.shard_writer import (
    Sample,
    is_built,
    json_member,
    write_json,
    write_manifest,
    write_shards,
)
from megatron_gemini.modalities.video.encode import encode_video

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDES = ("train", "validation")
SPLIT_RULE = "every digit image is drawn once for either side, stratified by class"
FRAMES_PER_SECOND = 2
# What a document says of its two images. None stands for the next image.
DOCUMENTS: tuple[tuple[str | None, ...], ...] = (
    (None, "this is {0}.", None, "this is {1}."),
    (None, "{0}", None, "{1}"),
    ("first comes", None, "which is {0}, then", None, "which is {1}."),
    (None, None, "{0} and {1}"),
    (None, None, "the first is {0}, the second is {1}."),
)


@dataclass(frozen=True)
class Options:
    """What decides the bytes of the build."""

    size: int = 16
    validation: int = 397
    clips: tuple[int, int] = (3000, 200)
    documents: tuple[int, int] = (1000, 100)
    variants: int = 4
    seed: int = 0
    version: int = 2

    def __post_init__(self) -> None:
        if not 8 <= self.size <= 512 or self.size % 2:
            raise ValueError(f"--size is {self.size}; choose an even number from 8 to 512 (clips need even sides)")
        if not 100 <= self.validation <= 1600:
            raise ValueError(f"--validation is {self.validation}; choose 100 to 1600 of the 1797 digits")
        if not 0 <= self.variants <= 100:
            raise ValueError(f"--variants is {self.variants}; choose 0 to 100 altered copies of every training digit")
        for option, counts in (("--clips", self.clips), ("--documents", self.documents)):
            if not all(1 <= count <= 900_000 for count in counts):
                raise ValueError(f"{option} is {counts[0]} {counts[1]}; both must be from 1 to 900000")


@dataclass(frozen=True)
class Digits:
    """The digits of one side: uint8[n, S, S, 3], their classes, and their places in scikit-learn's data set."""

    images: np.ndarray
    labels: np.ndarray
    places: np.ndarray

    def of(self, chosen: np.ndarray) -> list[int]:
        """Places of the chosen digits, for the metadata."""
        return self.places[chosen].tolist()


def phrase(label: int) -> str:
    """A short noun phrase: "a seven", "an eight"."""
    return f"{'an' if label == 8 else 'a'} {WORDS[label]}"


def load_sides(options: Options) -> dict[str, Digits]:
    """The two sides of the split."""
    data = load_digits()
    places = np.arange(len(data.target))
    train, validation = train_test_split(
        places, test_size=options.validation, stratify=data.target, random_state=options.seed
    )
    images = np.stack([enlarge(image, options.size) for image in data.images])
    sides = zip(SIDES, (np.sort(train), np.sort(validation)), strict=True)
    return {side: Digits(images[chosen], data.target[chosen], chosen) for side, chosen in sides}


def enlarge(image: np.ndarray, size: int) -> np.ndarray:
    """float[8, 8] in [0, 16], white ink, to uint8[S, S, 3] (bicubic)."""
    grey = Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8))
    return np.asarray(grey.resize((size, size), Image.Resampling.BICUBIC).convert("RGB"))


# How far an altered copy goes: degrees, slant, share of the size, share of a side.
TURN, SLANT, SCALE, SHIFT = 10.0, 0.15, 0.1, 0.06


def varied(digits: Digits, variants: int, seed: Sequence[int]) -> Digits:
    """`variants` altered copies of every digit, in the order of the digits."""
    random = np.random.default_rng(seed)
    images = [alter(image, random) for image in digits.images for _ in range(variants)]
    return Digits(np.stack(images), digits.labels.repeat(variants), digits.places.repeat(variants))


def alter(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """uint8[S, S, 3] through a small random affine map about its center; what comes in from outside is black."""
    size = image.shape[0]
    turn, slant = np.deg2rad(random.uniform(-TURN, TURN)), random.uniform(-SLANT, SLANT)
    wide, high = random.uniform(1 - SCALE, 1 + SCALE, 2)
    shift = random.uniform(-SHIFT, SHIFT, 2) * size
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    back = rotation @ np.array([[1.0, slant], [0.0, 1.0]]) @ np.diag([1 / wide, 1 / high])
    offset = size / 2 - back @ (size / 2 + shift)
    coefficients = (*back[0], offset[0], *back[1], offset[1])
    grey = Image.fromarray(image).transform(
        (size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC
    )
    return np.asarray(grey)


def together(a: Digits, b: Digits) -> Digits:
    return Digits(*(np.concatenate(pair) for pair in zip(astuple(a), astuple(b), strict=True)))


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def digit_samples(digits: Digits) -> Iterator[Sample]:
    """Every digit once: image, caption and where it comes from."""
    for image, label, place in zip(digits.images, digits.labels.tolist(), digits.places.tolist(), strict=True):
        members = {
            "png": png(image),
            "txt": phrase(label).encode(),
            "json": json_member({"label": label, "sklearn_index": place}),
        }
        yield f"digit{place:04d}", members


def varied_samples(digits: Digits) -> Iterator[Sample]:
    """Altered copies, marked as such: a judge of real images leaves them out."""
    for number, (key, members) in enumerate(digit_samples(digits)):
        metadata = {**json.loads(members["json"]), "augmented": True}
        yield f"{key}-{number:06d}", {**members, "json": json_member(metadata)}


def clip_samples(digits: Digits, count: int, seed: Sequence[int]) -> Iterator[Sample]:
    """Clips of three digits, "a three, a one and a four"."""
    random = np.random.default_rng(seed)
    for number in range(count):
        chosen = random.integers(len(digits.labels), size=3)
        labels = digits.labels[chosen].tolist()
        names = [phrase(label) for label in labels]
        members = {
            "mp4": encode_video(digits.images[chosen], FRAMES_PER_SECOND),
            "txt": f"{names[0]}, {names[1]} and {names[2]}".encode(),
            "json": json_member({"labels": labels, "sklearn_index": digits.of(chosen)}),
        }
        yield f"clip{number:06d}", members


def document_samples(digits: Digits, count: int, seed: Sequence[int]) -> Iterator[Sample]:
    """Documents of two images and what is said of them."""
    random = np.random.default_rng(seed)
    for number in range(count):
        chosen = random.integers(len(digits.labels), size=2)
        names = [phrase(int(label)) for label in digits.labels[chosen]]
        images = iter(("0.png", "1.png"))
        parts = DOCUMENTS[int(random.integers(len(DOCUMENTS)))]
        items = [{"image": next(images)} if part is None else {"text": part.format(*names)} for part in parts]
        members = {
            "json": json_member({"items": items, "sklearn_index": digits.of(chosen)}),
            "0.png": png(digits.images[chosen[0]]),
            "1.png": png(digits.images[chosen[1]]),
        }
        yield f"document{number:06d}", members


def build(out: Path, options: Options) -> None:
    """Write everything below `out`, or find it there."""
    manifest = out / "digits.manifest.json"
    described = {"split_rule": SPLIT_RULE, **asdict(options)}
    if is_built(manifest, described):
        print(f"{manifest}: built before with these options")
        return
    out.mkdir(parents=True, exist_ok=True)
    manifest.unlink(missing_ok=True)
    for earlier in out.glob("train/varied-*.tar"):  # written anew, unless there are no variants now
        earlier.unlink()
    sides = load_sides(options)
    shards: dict[Path, int] = {}
    for number, (side, digits) in enumerate(sides.items()):
        sets = {"digits": digit_samples(digits)}
        shown = digits
        if side == "train" and options.variants:
            altered = varied(digits, options.variants, (options.seed, number, 3))
            sets["varied"] = varied_samples(altered)
            shown = together(digits, altered)
        sets["clips"] = clip_samples(shown, options.clips[number], (options.seed, number, 1))
        sets["interleave"] = document_samples(shown, options.documents[number], (options.seed, number, 2))
        for name, samples in sets.items():
            started = time.monotonic()
            written = write_shards(out / side, name, samples)
            shards |= written
            taken = time.monotonic() - started
            print(f"{side}/{name}: {sum(written.values())} samples in {len(written)} shards, {taken:.1f} s")
    split = {side: {"sklearn_indices": digits.places.tolist()} for side, digits in sides.items()}
    write_json(out / "digits.split.json", {"rule": SPLIT_RULE, **split})
    write_manifest(manifest, described, shards)


def add_pair(parser: argparse.ArgumentParser, name: str, default: tuple[int, int], text: str) -> None:
    """An option that takes one number for either side of the split."""
    parser.add_argument(name, type=int, nargs=2, default=default, metavar=("TRAIN", "VALIDATION"), help=text)


def main(argv: Sequence[str] | None = None) -> int:
    default = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="folder that gets train/ and validation/"
    )
    parser.add_argument("--size", type=int, default=default.size, help="pixels of a side (default: %(default)s)")
    parser.add_argument(
        "--validation", type=int, default=default.validation, help="digits held out (default: %(default)s)"
    )
    add_pair(parser, "--clips", default.clips, "number of clips (default: 3000 200)")
    add_pair(parser, "--documents", default.documents, "number of them (default: 1000 100)")
    parser.add_argument(
        "--variants",
        type=int,
        default=default.variants,
        help="altered copies of a training digit (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="of split and clips (default: %(default)s)")
    given = parser.parse_args(argv)
    try:
        if not 0 <= given.seed < 2**32:
            raise ValueError(f"--seed is {given.seed}; it must be from 0 to {2**32 - 1}")
        counts = (tuple(given.clips), tuple(given.documents), given.variants)
        build(given.out, Options(given.size, given.validation, *counts, given.seed))
    except (ValueError, OSError) as error:
        print(f"build_digits: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
