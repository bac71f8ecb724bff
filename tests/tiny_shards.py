"""Tiny shards of every task, and a configuration that reads them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from megatron_gemini.config.data import DataConfig, SourceConfig
from megatron_gemini.config.encoders import AudioConfig, VisionConfig
from megatron_gemini.config.model import ImageTokenizerConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.training import TrainConfig
from megatron_gemini.contracts import RowFormat, TokenLayout
from megatron_gemini.data.sources.spec import Records
from megatron_gemini.modalities.video.encode import encode_video
from megatron_gemini.objectives.pretrain.spec import PretrainConfig

LAYOUT = TokenLayout(128, (("image", 16),))
VISION = VisionConfig(patch=4, max_side=8, max_frames=4)
AUDIO = AudioConfig(mels=8, max_seconds=2.0)
IMAGE_TOKENIZER = ImageTokenizerConfig(image_size=8, patch=4, codes=16)
Members = Mapping[str, bytes]


class Characters:
    """A text tokenizer whose ids are ASCII codes."""

    def encode(self, text: str) -> list[int]:
        return [min(ord(character), 127) for character in text]

    @staticmethod
    def decode(ids: Iterable[int]) -> str:
        """The text pieces among `ids`; all other tokens are dropped."""
        return "".join(chr(i) for i in ids if LAYOUT.is_text(int(i)))


def png(seed: int = 0, height: int = 8, width: int = 8) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def wav(seconds: float = 0.1) -> bytes:
    file = io.BytesIO()
    wave = np.sin(np.arange(round(16_000 * seconds)) / 8)
    soundfile.write(file, wave, 16_000, format="WAV", subtype="PCM_16")
    return file.getvalue()


def mp4(frames: int = 2) -> bytes:
    ramp = [np.full((8, 8, 3), 50 * (i + 1), np.uint8) for i in range(frames)]
    return encode_video(np.stack(ramp), fps=2)


def codes(seed: int = 0) -> bytes:
    chosen = np.random.default_rng(seed).integers(len(LAYOUT.code_range("image")), size=IMAGE_TOKENIZER.codes_per_image)
    return json.dumps({"codes": chosen.tolist()}).encode()


def sample(number: int) -> dict[str, bytes]:
    """A sample that every task but interleave can use; its text says its number."""
    text = f"number {number}".encode()
    return {"png": png(number), "txt": text, "wav": wav(), "mp4": mp4(), "codes.json": codes(number)}


def document(number: int) -> dict[str, bytes]:
    items = [{"image": "0.png"}, {"text": f"one {number}"}, {"codes": "1.codes.json"}]
    return {"json": json.dumps({"items": items}).encode(), "0.png": png(number), "1.codes.json": codes(number)}


def chat(number: int) -> dict[str, bytes]:
    """A conversation of two questions, about a picture and a sound."""
    picture = [{"type": "image", "image": "0.png"}, {"type": "text", "text": "this?"}]
    sound = [{"type": "audio", "audio": "1.wav"}]
    said = (("user", picture), ("assistant", f"one {number}"), ("user", sound), ("assistant", "two"))
    messages = [{"role": role, "content": content} for role, content in said]
    return {"json": json.dumps({"messages": messages}).encode(), "0.png": png(number), "1.wav": wav()}


def write_tar(path: Path, samples: Iterable[tuple[str, Members]]) -> str:
    """A plain tar, written by the standard library; returns its path."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for ending, data in members.items():
                add(tar, f"{key}.{ending}", data)
    return str(path)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))


def keys_of(records: Records) -> list[str]:
    """Of all samples, in their order."""
    return [records.key(number) for number in range(len(records))]


def texts(path: Path, count: int, length: int = 5) -> str:
    """A shard of `count` text samples s0000, s0001, ... of about `length` characters each."""
    return write_tar(path, ((f"s{i:04d}", {"txt": f"{i:04d}".ljust(length, "x").encode()}) for i in range(count)))


FORM = RowFormat(target_weights={"text": 1.0, "image": 0.5})
"""What the objective of `run_config` wants of rows."""


def run_config(sources: Sequence[SourceConfig], rows_per_step: int = 2, **data: object) -> RunConfig:
    data = {"row_tokens": 64, "lanes": 4, "look_ahead": 4, "prefetch": 0, **data}
    return RunConfig(
        encoders={"vision": VISION, "audio": AUDIO},
        image_tokenizer=IMAGE_TOKENIZER,
        data=DataConfig(sources=tuple(sources), **data),  # type: ignore[arg-type]
        objective=PretrainConfig(weights={"text": 1.0, "image": 0.5}),
        train=TrainConfig(rows_per_step=rows_per_step),
    )
