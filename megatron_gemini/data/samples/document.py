"""One document: prompt and answer items become tokens, spans, loss marks and encoder inputs.

Shape suffixes: L tokens of the document, P encoder input rows, C values an input row, H/W pixels, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch

from megatron_gemini.config.model import AudioConfig, VisionConfig
from megatron_gemini.contracts import AUDIO, ENCODERS, IMAGE, TEXT, VISION, TokenLayout
from megatron_gemini.modalities.audio.preprocess import audio_output_length, log_mel
from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.modalities.image.preprocess import fit_image, patchify, vision_grid


class Encodes(Protocol):
    """What is needed of a text tokenizer."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Text:
    """A piece of text."""

    text: str


@dataclass(frozen=True, eq=False)
class Image:
    """An input image, uint8[H, W, 3]."""

    pixels_HW3: np.ndarray


@dataclass(frozen=True)
class ImageCodes:
    """An output image as codes of the image tokenizer, each in [0, layout.image_codes)."""

    codes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Video:
    """An input clip, uint8[F, H, W, 3], and the seconds between two of its frames."""

    frames_FHW3: np.ndarray
    seconds_between_frames: float


@dataclass(frozen=True, eq=False)
class Audio:
    """Input sound: float32[samples], mono, 16 kHz."""

    wave: np.ndarray


@dataclass(frozen=True, eq=False)
class EncoderInput:
    """An image, clip or sound as its encoder takes it. It may stand in a document in the place of the raw item.

    values_PC: float32, as in `contracts.Media`; grid: (frames, rows, columns); seconds: between two frames.
    spans: lengths of the bidirectional spans that its placeholders (of the control token `placeholder`) form.
    """

    encoder: str
    placeholder: str
    values_PC: torch.Tensor
    grid: tuple[int, int, int]
    seconds: float
    spans: tuple[int, ...]


Item = Text | Image | ImageCodes | Video | Audio | EncoderInput


@dataclass(frozen=True, eq=False)
class Turn:
    """What one side of a conversation says; `answer`: the model does."""

    answer: bool
    items: Sequence[Item]


class Size(NamedTuple):
    """What a document takes of a row: tokens, image and video patches, log-mel frames."""

    tokens: int
    patches: int = 0
    audio_frames: int = 0


@dataclass(eq=False)
class Document:
    """One document, not yet placed in a row.

    token_L: int64. loss_L: bool, whether the token is a target that counts. modality_L: int8, of the token itself.
    span_L: int32, 0 or the document's own span number from 1.
    media: encoder inputs in the order of their placeholders; media_begin: where each one's placeholders begin.
    """

    key: str
    layout: TokenLayout
    token_L: np.ndarray
    loss_L: np.ndarray
    modality_L: np.ndarray
    span_L: np.ndarray
    media: list[EncoderInput] = field(default_factory=list)
    media_begin: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.token_L)

    @property
    def size(self) -> Size:
        inputs = {encoder: sum(len(i.values_PC) for i in self.media if i.encoder == encoder) for encoder in ENCODERS}
        return Size(len(self), inputs[VISION], inputs[AUDIO])


def prepare_image(image: Image, vision: VisionConfig) -> EncoderInput:
    """Fit the image to the patch grid and cut it into patches."""
    return _vision_input(image.pixels_HW3[None], 0.0, "image", vision)


def prepare_video(video: Video, vision: VisionConfig) -> EncoderInput:
    """Fit every frame to the patch grid; the frames share one grid and each is a span of its own."""
    if not len(video.frames_FHW3):
        raise ValueError("a clip has no frames")
    return _vision_input(video.frames_FHW3, video.seconds_between_frames, "video", vision)


def prepare_audio(audio: Audio, config: AudioConfig) -> EncoderInput:
    """Log-mel frames of the sound, at 100 Hz."""
    if not config.enabled:
        raise ValueError("sound needs an audio encoder, and audio.enabled is false")
    values_PC = log_mel(audio.wave, config.mels)
    frames = len(values_PC)
    return EncoderInput(AUDIO, "audio", values_PC, (frames, 1, 1), 0.0, (audio_output_length(frames),))


def _vision_input(frames_FHW3: np.ndarray, seconds: float, placeholder: str, vision: VisionConfig) -> EncoderInput:
    if not vision.enabled:
        raise ValueError("images and clips need a vision encoder, and vision.enabled is false")
    fitted_FHW3 = np.stack([fit_image(frame_HW3, vision.patch, vision.max_side) for frame_HW3 in frames_FHW3])
    frames, rows, columns = grid = vision_grid(fitted_FHW3, vision.patch)
    values_PC = patchify(fitted_FHW3, vision.patch)
    return EncoderInput(VISION, placeholder, values_PC, grid, float(seconds), (rows * columns,) * frames)


def prepare(item: Item, vision: VisionConfig, audio: AudioConfig) -> Text | ImageCodes | EncoderInput:
    """Turn a raw image, clip or sound into its encoder's input; text, codes and prepared inputs pass unchanged."""
    if isinstance(item, Image):
        return prepare_image(item, vision)
    if isinstance(item, Video):
        return prepare_video(item, vision)
    if isinstance(item, Audio):
        return prepare_audio(item, audio)
    return item


def build_document(
    prompt: Sequence[Item],
    answer: Sequence[Item] | None,
    *,
    layout: TokenLayout,
    text_tokenizer: Encodes,
    vision: VisionConfig,
    audio: AudioConfig,
    key: str,
    loss_on_prompt: bool = False,
) -> Document:
    """Lay the items out as one document.

    With an answer: `bos user <prompt> model <answer> eos`, loss on the answer and eos. An empty answer leaves the
    document open after `model`, ready to be continued. Without one (`answer=None`): `bos <prompt> eos`, and
    `loss_on_prompt` puts loss on its text and codes. Placeholders of inputs never carry loss.

    Raises BadSample("bad_codes") for a code out of range, ValueError for an input whose encoder is off.
    """
    writer = _Writer(layout, text_tokenizer)
    writer.control("bos", loss=False)
    if answer is not None:
        writer.control("user", loss=False)
    for item in prompt:
        writer.item(prepare(item, vision, audio), loss=loss_on_prompt, key=key)
    if answer is not None:
        writer.control("model", loss=False)
        for item in answer:
            writer.item(prepare(item, vision, audio), loss=True, key=key)
    if answer is None or answer:
        writer.control("eos", loss=answer is not None or loss_on_prompt)
    return writer.document(key)


def build_conversation(
    turns: Sequence[Turn],
    *,
    layout: TokenLayout,
    text_tokenizer: Encodes,
    vision: VisionConfig,
    audio: AudioConfig,
    key: str,
) -> Document:
    """Lay the turns out as one document: `bos user <items> model <items> eos user <items> model <items> eos`.

    Loss is on the model's turns and the eos that ends each of them. With one question and one answer the document is
    that of `build_document`. Raises as `build_document` does.
    """
    writer = _Writer(layout, text_tokenizer)
    writer.control("bos", loss=False)
    for turn in turns:
        writer.control("model" if turn.answer else "user", loss=False)
        for item in turn.items:
            writer.item(prepare(item, vision, audio), loss=turn.answer, key=key)
        if turn.answer:
            writer.control("eos", loss=True)
    return writer.document(key)


class _Writer:
    """Appends items to the growing columns of a document."""

    def __init__(self, layout: TokenLayout, text_tokenizer: Encodes) -> None:
        self.layout, self.text_tokenizer = layout, text_tokenizer
        self.tokens: list[int] = []
        self.losses: list[bool] = []
        self.modalities: list[int] = []
        self.spans: list[int] = []
        self.last_span = 0
        self.media: list[EncoderInput] = []
        self.media_begin: list[int] = []

    def run(self, tokens: Sequence[int], loss: bool, modality: int = TEXT, span: int = 0) -> None:
        self.tokens += tokens
        self.losses += [loss] * len(tokens)
        self.modalities += [modality] * len(tokens)
        self.spans += [span] * len(tokens)

    def control(self, name: str, loss: bool) -> None:
        self.run([self.layout.control(name)], loss)

    def item(self, item: Text | ImageCodes | EncoderInput, loss: bool, key: str) -> None:
        if isinstance(item, Text):
            self.run(self.text_tokenizer.encode(item.text), loss)
        elif isinstance(item, ImageCodes):
            self.codes(item, loss, key)
        else:
            self.input(item)

    def codes(self, item: ImageCodes, loss: bool, key: str) -> None:
        outside = [code for code in item.codes if not 0 <= code < self.layout.image_codes]
        if outside or not item.codes:
            what = f"image code {outside[0]}" if outside else "no image codes"
            raise BadSample("bad_codes", f"{key}: {what}; the codebook has 0..{self.layout.image_codes - 1}")
        self.control("image_begin", loss)
        self.run([self.layout.first_image_code + code for code in item.codes], loss, IMAGE)
        self.control("image_end", loss)

    def input(self, item: EncoderInput) -> None:
        self.media.append(item)
        self.media_begin.append(len(self.tokens))
        placeholder = self.layout.control(item.placeholder)
        for length in item.spans:
            self.last_span += 1
            self.run([placeholder] * length, loss=False, span=self.last_span)

    def document(self, key: str) -> Document:
        return Document(
            key=key,
            layout=self.layout,
            token_L=np.array(self.tokens, np.int64),
            loss_L=np.array(self.losses, np.bool_),
            modality_L=np.array(self.modalities, np.int8),
            span_L=np.array(self.spans, np.int32),
            media=self.media,
            media_begin=self.media_begin,
        )
