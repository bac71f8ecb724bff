"""Build shards of spoken digits by many voices, from eSpeak NG (pip install espeakng-loader), each with a drawn digit.

    python tools/build_digits.py --out runs/quickstart/data     # first: the digits to draw come from here
    python tools/build_speech.py --out runs/quickstart/data

Writes {train,validation}/speech-NNN.tar, speech.split.json (which voices are on which side) and speech.manifest.json.
A sample has the sound (flac), its transcript (txt) and an image of the digit that was said (png), from the same side
of the digits' split. No validation voice is heard in training, in any accent. A finished build is reused.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile

from megatron_gemini.data.samples.decode_json import Json
from megatron_gemini.data.sources.paths import expand_shards
from megatron_gemini.data.sources.shard_writer import (
    Sample,
    is_built,
    json_member,
    write_json,
    write_manifest,
    write_shards,
)
from megatron_gemini.data.sources.shards import Shards

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# eSpeak's variants that sound like people (no robots, whispers or monsters). A validation voice has no near twin in
# training: variants that nearly equal one of these (Nguyen, Denis, grandpa, aunty) are left out.
VOICES = {
    "train": (
        *("f1", "f2", "f3", "f5", "Annie", "Andrea", "anika", "grandma", "linda", "steph"),
        *("m1", "m2", "m3", "m4", "m5", "m6", "m8", "Alex", "Andy", "Mario", "adam", "caleb", "edward", "iven"),
        *("max", "paul", "robert", "sandro"),
    ),
    "validation": ("f4", "belinda", "m7", "john", "victor"),
}
ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-gb-scotland")
SPLIT_RULE = "every voice (eSpeak variant) is on one side only, in all accents"
WORDS_PER_MINUTE = (120, 200)
PITCH = (30, 70)  # of eSpeak's 0 to 99, around the voice's own
PAUSE_SECONDS = (0.03, 0.15)  # silence before and after

# From espeak-ng's speak_lib.h.
_OUTPUT_SYNCHRONOUS, _DO_NOT_EXIT = 2, 0x8000
_RATE, _PITCH = 1, 3
_CHARACTERS, _UTF8 = 1, 1
_LONGEST_PATH = 140  # its buffers hold 160 characters, with the names of its files
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class Options:
    """What decides the bytes of the build."""

    accents: int = 2
    takes: tuple[int, int] = (3, 2)
    seed: int = 0
    version: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.accents <= len(ACCENTS):
            raise ValueError(f"--accents is {self.accents}; choose 1 to {len(ACCENTS)}")
        if not all(1 <= takes <= 100 for takes in self.takes):
            raise ValueError(f"--takes is {self.takes[0]} {self.takes[1]}; both must be from 1 to 100")


class Speaker:
    """eSpeak NG through ctypes: text to int16 samples in this process, without a sound device.

    The same calls in the same order after the same seed give the same samples.
    """

    def __init__(self, seed: int) -> None:
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._voices = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
        self._chunks: list[np.ndarray] = []
        self._keep = _Callback(self._receive)  # ctypes does not keep it alive
        data, self._link = self._data_path(Path(espeakng_loader.get_data_path()))
        self.rate: int = self._library.espeak_Initialize(_OUTPUT_SYNCHRONOUS, 0, str(data).encode(), _DO_NOT_EXIT)
        if self.rate <= 0:
            raise ValueError(f"eSpeak NG does not start with its data in {str(data)!r}; reinstall espeakng-loader")
        self._library.espeak_SetSynthCallback(self._keep)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed))  # it starts from the clock otherwise

    @staticmethod
    def _data_path(data: Path) -> tuple[Path, tempfile.TemporaryDirectory | None]:
        """The data's folder, through a short link where its own path is too long for eSpeak."""
        if len(str(data)) <= _LONGEST_PATH:
            return data, None
        folder = tempfile.TemporaryDirectory(prefix="espeak")
        link = Path(folder.name) / data.name
        link.symlink_to(data)
        return link, folder

    def _receive(self, samples: ctypes._Pointer, count: int, _events: int) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, accent: str, voice: str, words_per_minute: int, pitch: int) -> np.ndarray:
        """int16[samples] at `rate`. Raises ValueError for an accent or voice that this eSpeak does not have."""
        known = (self._voices / voice).is_file()  # eSpeak itself would silently take its default voice
        if not known or self._library.espeak_SetVoiceByName(f"{accent}+{voice}".encode()):
            raise ValueError(f"this eSpeak NG has no voice {accent}+{voice}; install espeakng-loader 0.2.4")
        self._library.espeak_SetParameter(_RATE, words_per_minute, 0)
        self._library.espeak_SetParameter(_PITCH, pitch, 0)
        self._chunks.clear()
        data = text.encode() + b"\0"
        size, none = ctypes.c_size_t(len(data)), ctypes.c_void_p()
        failed = self._library.espeak_Synth(data, size, 0, _CHARACTERS, 0, _UTF8, none, none)
        if failed or not self._chunks:
            raise ValueError(f"eSpeak NG could not say {text!r} as {accent}+{voice}")
        return np.concatenate(self._chunks)


def with_pauses(wave: np.ndarray, rate: int, before: float, after: float) -> np.ndarray:
    """The speech alone, without eSpeak's own silence, between pauses of the given seconds."""
    loud = np.flatnonzero(np.abs(wave.astype(np.int32)) > 64)
    speech = wave[loud[0] : loud[-1] + 1]
    return np.concatenate([np.zeros(round(before * rate), np.int16), speech, np.zeros(round(after * rate), np.int16)])


def flac(wave: np.ndarray, rate: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def digit_images(out: Path, side: str) -> dict[int, list[tuple[int, bytes]]]:
    """(place in scikit-learn's data set, png) of the side's digits, by class."""
    try:
        shards = Shards(expand_shards(str(out / side / "digits-*.tar")))
    except ValueError as error:
        raise ValueError(f"{error}; run tools/build_digits.py --out {out} first") from None
    images: dict[int, list[tuple[int, bytes]]] = {label: [] for label in range(len(WORDS))}
    for sample in range(len(shards)):
        members = shards.read(sample, ("json", "png"))
        metadata = json.loads(members["json"])
        images[metadata["label"]].append((metadata["sklearn_index"], members["png"]))
    return images


def speech_samples(speaker: Speaker, side: str, out: Path, options: Options) -> Iterator[Sample]:
    """Every digit by every voice in `accents` accents, `takes` times at another rate and pitch."""
    images = digit_images(out, side)
    number = list(VOICES).index(side)
    random = np.random.default_rng((options.seed, number))
    for place, voice in enumerate(VOICES[side]):
        for accent in (ACCENTS[(place + i) % len(ACCENTS)] for i in range(options.accents)):
            for label, word in enumerate(WORDS):
                for take in range(options.takes[number]):
                    rate, pitch = int(random.integers(*WORDS_PER_MINUTE)), int(random.integers(*PITCH))
                    wave = speaker.say(word, accent, voice, rate, pitch)
                    index, png = images[label][int(random.integers(len(images[label])))]
                    metadata: dict[str, Json] = {"label": label, "voice": voice, "accent": accent, "pitch": pitch}
                    metadata |= {"words_per_minute": rate, "sklearn_index": index}
                    members = {
                        "flac": flac(with_pauses(wave, speaker.rate, *random.uniform(*PAUSE_SECONDS, 2)), speaker.rate),
                        "txt": word.encode(),
                        "png": png,
                        "json": json_member(metadata),
                    }
                    yield f"{voice.lower()}-{accent}-{word}-{take}", members


def build(out: Path, options: Options) -> None:
    """Write everything below `out`, or find it there."""
    manifest = out / "speech.manifest.json"
    digits = out / "digits.manifest.json"
    if not digits.is_file():
        raise ValueError(f"{str(out)!r} has no digits to draw; run tools/build_digits.py --out {out} first")
    described: dict[str, Json] = {
        **asdict(options),
        "split_rule": SPLIT_RULE,
        "voices": {side: list(voices) for side, voices in VOICES.items()},
        "digits": json.loads(digits.read_text()),
    }
    if is_built(manifest, described):
        print(f"{manifest}: built before with these options")
        return
    manifest.unlink(missing_ok=True)
    speaker = Speaker(options.seed)
    shards: dict[Path, int] = {}
    for side in VOICES:
        started = time.monotonic()
        written = write_shards(out / side, "speech", speech_samples(speaker, side, out, options))
        shards |= written
        taken = time.monotonic() - started
        print(f"{side}/speech: {sum(written.values())} samples in {len(written)} shards, {taken:.1f} s")
    split: dict[str, Json] = {side: {"voices": list(voices)} for side, voices in VOICES.items()}
    write_json(out / "speech.split.json", {"rule": SPLIT_RULE, **split})
    write_manifest(manifest, described, shards)


def main(argv: Sequence[str] | None = None) -> int:
    default = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder that build_digits.py wrote")
    parser.add_argument("--accents", type=int, default=default.accents, help="of each voice (default: %(default)s)")
    parser.add_argument(
        "--takes",
        type=int,
        nargs=2,
        default=default.takes,
        metavar=("TRAIN", "VALIDATION"),
        help="of each word by a voice in an accent (default: 3 2)",
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="of rates and pitches (default: %(default)s)")
    given = parser.parse_args(argv)
    try:
        if not 0 <= given.seed < 2**32:
            raise ValueError(f"--seed is {given.seed}; it must be from 0 to {2**32 - 1}")
        build(given.out, Options(given.accents, tuple(given.takes), given.seed))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"build_speech: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
