"""Members of one sample (dict of bytes) to what a task needs of it (dict of fields), ready for its encoder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_gemini.config.model import AudioConfig, ImageTokenizerConfig, VisionConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.data.document import (
    Audio,
    EncoderInput,
    Image,
    ImageCodes,
    Item,
    Text,
    Video,
    prepare_audio,
    prepare_image,
    prepare_video,
)
from megatron_gemini.modalities.audio.preprocess import decode_audio
from megatron_gemini.modalities.bad_sample import BadSample, one_line
from megatron_gemini.modalities.image.preprocess import decode_image
from megatron_gemini.modalities.video.preprocess import decode_video

IMAGE_ENDINGS = ("png", "jpg", "jpeg", "webp")
ENDINGS = {
    "text": ("txt",),
    "image": IMAGE_ENDINGS,
    "codes": ("codes.json",),
    "audio": ("wav", "flac"),
    "video": ("mp4",),
    "items": ("json",),
}
TASK_FIELDS = {
    "caption": ("image", "text"),
    "generate": ("text", "codes"),
    "transcribe": ("audio", "text"),
    "speech_to_image": ("audio", "codes"),
    "video_caption": ("video", "text"),
    "interleave": ("items",),
    "text": ("text",),
}


@dataclass(frozen=True)
class Decoder:
    """The settings that decoding depends on."""

    vision: VisionConfig
    audio: AudioConfig
    image_tokenizer: ImageTokenizerConfig

    @classmethod
    def from_config(cls, config: RunConfig) -> Decoder:
        return cls(config.vision, config.audio, config.image_tokenizer)

    def decode(self, members: dict[str, bytes], task: str, key: str) -> dict[str, Any]:
        """The fields of `TASK_FIELDS[task]`, decoded.

        text: str, stripped; codes: ImageCodes; image, audio, video: EncoderInput; items: list of items.
        Raises BadSample with the decoder's own reason, or missing_<field>, bad_json, bad_codes, empty_text.
        """
        fields: dict[str, Any] = {}
        for name in TASK_FIELDS[task]:
            ending = next((ending for ending in ENDINGS[name] if ending in members), None)
            if ending is None:
                hint = "; tools/encode_images.py adds it" if name == "codes" else ""
                raise BadSample(f"missing_{name}", f"{key} has no member .{' or .'.join(ENDINGS[name])}{hint}")
            try:
                fields[name] = self.items(members) if name == "items" else self.field(name, members[ending])
            except BadSample as error:
                raise BadSample(error.reason, f"{key}.{ending}: {error}") from None
        return fields

    def field(self, name: str, data: bytes) -> Any:
        """One member's content."""
        if name == "text":
            return decode_text(data)
        if name == "codes":
            return decode_codes(data, self.image_tokenizer)
        if name == "image":
            return prepare_image(Image(decode_image(data, shrink_to=self.vision.max_side)), self.vision)
        if name == "video":
            return prepare_video(Video(*decode_video(data, self.vision.max_frames)), self.vision)
        return prepare_audio(Audio(decode_audio(data, self.audio.max_seconds)), self.audio)

    def items(self, members: dict[str, bytes]) -> list[Item]:
        """An interleaved document: `{"items": [{"text": ...}, {"image": "0.png"}, {"codes": "1.codes.json"}, ...]}`."""
        description = decode_json(members["json"])
        entries = description.get("items") if isinstance(description, dict) else None
        if not isinstance(entries, list) or not entries:
            raise BadSample("bad_json", 'an interleaved document needs {"items": [...]} with at least one item')
        decoded: dict[str, Any] = {}  # an image that is named twice is decoded once
        return [self._item(entry, members, decoded) for entry in entries]

    def _item(self, entry: object, members: dict[str, bytes], decoded: dict[str, Any]) -> Item:
        name, value = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else ("", "")
        if name not in ("text", "image", "codes") or not isinstance(value, str):
            raise BadSample(
                "bad_json", f"an item is one of text, image and codes, with a string; not {str(entry)[:80]}"
            )
        if name == "text":
            return Text(value)
        if value not in members:
            raise BadSample(f"missing_{name}", f"the document names {value[:80]!r}, which the shard does not hold")
        if value not in decoded:
            decoded[value] = self.field(name, members[value])
        return decoded[value]


def wanted_endings(task: str, present: Iterable[str]) -> Sequence[str]:
    """Which members of a sample the task reads, of those that are present."""
    if task == "interleave":
        return list(present)
    return [ending for name in TASK_FIELDS[task] for ending in ENDINGS[name]]


def decode_text(data: bytes) -> str:
    """UTF-8 text without the white space around it. Raises BadSample: bad_text, empty_text."""
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise BadSample("bad_text", "the text is not UTF-8") from None
    if not text:
        raise BadSample("empty_text", "the text is empty")
    return text


def decode_json(data: bytes) -> Any:
    """Any JSON value. Raises BadSample: bad_json."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", f"not JSON: {one_line(error)}") from None


def decode_codes(data: bytes, image_tokenizer: ImageTokenizerConfig) -> ImageCodes:
    """`{"codes": [...]}`: the codes of one image, as many as the image tokenizer makes. Raises BadSample: bad_codes."""
    value = decode_json(data)
    codes = value.get("codes") if isinstance(value, dict) else None
    expected = image_tokenizer.codes_per_image
    if not isinstance(codes, list) or len(codes) != expected:
        found = f"{len(codes)} codes" if isinstance(codes, list) else "no list of codes"
        raise BadSample("bad_codes", f"it holds {found}; the image tokenizer makes {expected}")
    for code in codes:
        if type(code) is not int or not 0 <= code < image_tokenizer.codes:
            raise BadSample(
                "bad_codes", f"image code {str(code)[:20]}; the codebook has 0..{image_tokenizer.codes - 1}"
            )
    return ImageCodes(tuple(codes))


def field_bytes(value: Any) -> int:
    """About how much memory a decoded field takes."""
    if isinstance(value, EncoderInput):
        return value.values_PC.nbytes + 512
    if isinstance(value, list):
        return sum(map(field_bytes, value))
    text = value.text if isinstance(value, Text) else value if isinstance(value, str) else ""
    return 2 * len(text) + 8 * len(getattr(value, "codes", ())) + 128
