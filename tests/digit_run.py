"""A run directory of a tiny random model with small shards of every task, made of real digits."""

import dataclasses
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import soundfile
from sklearn.datasets import load_digits

from megatron_gemini.config.data import DataConfig, SourceConfig
from megatron_gemini.modalities.video.encode import encode_video
from tests.tiny_checkpoint import CONFIG, write_checkpoint

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CODES = json.dumps({"codes": [1, 2, 3, 4]}).encode()
DIGITS = load_digits()
TASKS: dict[Any, str] = {
    "caption": "digits",
    "generate": "digits",
    "transcribe": "speech",
    "speech_to_image": "speech",
    "video_caption": "clips",
    "interleave": "mixed",
}


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def image(index: int) -> np.ndarray:
    grey = np.round(DIGITS.images[index] * 255 / 16).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def png(index: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(image(index)).save(file, "png")
    return file.getvalue()


def wav(seed: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(seed).normal(size=3000) * 0.1, 16000, format="WAV")
    return file.getvalue()


def write_shards(folder: Path, indices: list[int], voice: str) -> None:
    """One tar a task, of real digits and noise for speech."""
    digits: dict[str, bytes] = {}
    speech: dict[str, bytes] = {}
    clips: dict[str, bytes] = {}
    mixed: dict[str, bytes] = {}
    for i in indices:
        name, origin = WORDS[DIGITS.target[i]].encode(), json.dumps({"index": i}).encode()
        digits |= {f"{i}.png": png(i), f"{i}.txt": name, f"{i}.json": origin, f"{i}.codes.json": CODES}
    for i in indices[:12]:
        word, told = WORDS[DIGITS.target[i]], json.dumps({"voice": voice}).encode()
        speech |= {f"{i}.wav": wav(i), f"{i}.txt": word.encode(), f"{i}.codes.json": CODES, f"{i}.json": told}
        clip = np.stack([image(i), image(i + 1)])
        clips |= {f"{i}.mp4": encode_video(clip, 2.0), f"{i}.txt": word.encode()}
        items: list[dict[str, str]] = [{"text": word}, {"image": "0.png"}, {"codes": "0.codes.json"}]
        items += [{"text": "one"}] if i % 2 else []
        mixed |= {f"{i}.json": json.dumps({"items": items}).encode(), f"{i}.0.png": png(i), f"{i}.0.codes.json": CODES}
    for shard, members in (("digits", digits), ("speech", speech), ("clips", clips), ("mixed", mixed)):
        write_tar(folder / f"{shard}.tar", members)


def sources(folder: Path) -> tuple[SourceConfig, ...]:
    return tuple(SourceConfig(shards=f"{folder}/{name}.tar", task=task) for task, name in TASKS.items())


def write_run(run: Path) -> Path:
    """Returns the run's directory, whose shards its checkpoint's configuration names."""
    write_shards(run / "train", list(range(200)), "anna")
    write_shards(run / "validation", list(range(200, 250)), "bert")
    data = DataConfig(sources=sources(run / "train"), validation=sources(run / "validation"))
    write_checkpoint(run, 1, seed=1, config=dataclasses.replace(CONFIG, data=data))
    (run / "summary.json").write_text(json.dumps({"train_seconds": 65.0, "tokens_per_second": 9.0}))
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {i + 1}, "loss": {5 - i}}}\n' for i in range(3)))
    return run
