"""A tiny data set of every kind of sample, and a configuration that trains on it in milliseconds a step."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import yaml
from PIL import Image

from megatron_gemini.modalities.video.encode import encode_video
from tests.tiny_checkpoint import train_text_model

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CODES, CODES_PER_IMAGE = 12, 4
Members = dict[str, bytes]


def write_tar(path: Path, samples: dict[str, Members]) -> Path:
    """A shard of `samples`, {key: {ending: content}}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for ending, content in members.items():
                header = tarfile.TarInfo(f"{key}.{ending}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    return path


def write_data(root: Path) -> Path:
    """Shards digits (image, text, codes), speech, clip and text, and text.model, in a folder of `root`."""
    folder, random = root / "data", np.random.default_rng(0)
    folder.mkdir(parents=True)
    train_text_model(folder / "text.model")
    write_tar(folder / "digits.tar", {f"{number:03}": _digit(number, random) for number in range(24)})
    write_tar(folder / "validation.tar", {f"h{number}": _digit(number, random) for number in range(6)})
    write_tar(folder / "speech.tar", {f"s{number}": _speech(number) for number in range(4)})
    write_tar(folder / "clip.tar", {"v0": {"mp4": encode_video(_frames(random), 4.0), "txt": b"one two three"}})
    write_tar(folder / "text.tar", {f"t{number}": {"txt": NAMES[number].encode()} for number in range(8)})
    return folder


def settings(data: Path, output: Path) -> dict[str, Any]:
    """The sections of a run over all shards of `write_data`."""
    small = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 24}
    return {
        "model": {"width": 32, "layers": 2, "heads": 4, "head_width": 8, "mlp_width": 48},
        "encoders": {
            "vision": {**small, "patch": 4, "max_side": 16, "max_frames": 3},
            "audio": {**small, "mels": 16, "max_seconds": 1.0},
        },
        "image_tokenizer": {**small, "image_size": 8, "codes": CODES},
        "data": {
            "sources": [
                {"shards": str(data / "digits.tar"), "task": "caption"},
                {"shards": str(data / "digits.tar"), "task": "generate"},
                {"shards": str(data / "speech.tar"), "task": "transcribe", "weight": 0.5},
                {"shards": str(data / "clip.tar"), "task": "video_caption", "weight": 0.2},
                {"shards": str(data / "text.tar"), "task": "text", "weight": 0.5},
            ],
            "validation": [{"shards": str(data / "validation.tar"), "task": "caption"}],
            "text_model": str(data / "text.model"),
            "row_tokens": 256,
            "lanes": 4,
        },
        "schedule": {"warmup_steps": 2},
        "train": {"output_dir": str(output), "steps": 3, "rows_per_step": 2},
        "logging": {"tensorboard": False},
    }


def write_config(path: Path, sections: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(sections))
    return path


def _digit(number: int, random: np.random.Generator) -> Members:
    """Strokes on black, where the number decides which."""
    pixels_HW = random.integers(0, 40, (8, 8), dtype=np.uint8)
    pixels_HW[number % 8, 1:7] = 220
    pixels_HW[1:7, (number * 3) % 8] = 220
    file = io.BytesIO()
    Image.fromarray(pixels_HW).save(file, "PNG")
    codes = json.dumps({"codes": [(number * 5 + place) % CODES for place in range(CODES_PER_IMAGE)]})
    return {"png": file.getvalue(), "txt": NAMES[number % 10].encode(), "codes.json": codes.encode()}


def _speech(number: int) -> Members:
    time = np.arange(8000) / 16000
    file = io.BytesIO()
    soundfile.write(file, 0.3 * np.sin(2 * np.pi * (200 + 90 * number) * time), 16000, format="WAV")
    return {"wav": file.getvalue(), "txt": NAMES[number].encode()}


def _frames(random: np.random.Generator) -> np.ndarray:
    return random.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
