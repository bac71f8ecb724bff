"""Asking a trained model: prompts of text, images, clips and sound in; text and images out.

Shape suffixes: B images, S pixels of a side, H rows and W columns of pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_gemini.checkpoint.inference import Loaded
from megatron_gemini.contracts import TokenLayout
from megatron_gemini.data.samples.document import Document, build_document
from megatron_gemini.data.samples.items import Item
from megatron_gemini.generation.sample import generate
from megatron_gemini.generation.settings import SampleSettings


@dataclass(frozen=True, eq=False)
class Drawing:
    """An image that the model drew: its codes, and uint8[H, W, 3] made of them."""

    codes: tuple[int, ...]
    pixels_HW3: np.ndarray


Answer = list[str | Drawing]


class Generator:
    """A loaded model that answers, on the GPU where there is one."""

    def __init__(self, loaded: Loaded) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config, self.layout, self.text_tokenizer = loaded.config, loaded.layout, loaded.text_tokenizer
        self.model = loaded.model.to(self.device)
        self.image_tokenizer = None if loaded.image_tokenizer is None else loaded.image_tokenizer.to(self.device)

    @property
    def codes_per_image(self) -> int:
        """0 for a model that cannot draw."""
        return 0 if self.image_tokenizer is None else self.config.image_tokenizer.codes_per_image

    def respond(self, items: Sequence[Item], settings: SampleSettings) -> Answer:
        """The answer to one prompt, its pieces of text and its images in order.

        Raises ValueError for input that the model has no encoder for, or an image asked of a model that cannot draw.
        """
        return self.respond_all([items], settings)[0]

    def respond_all(
        self, prompts: Sequence[Sequence[Item]], settings: SampleSettings, batch_size: int = 128
    ) -> list[Answer]:
        """The answer to each prompt, as `respond`; prompt i is sampled with seed settings.seed + i."""
        documents = [self.open_document(items, f"prompt {i}") for i, items in enumerate(prompts)]
        return self.continue_all(documents, settings, batch_size)

    def open_document(self, items: Sequence[Item], key: str) -> Document:
        """A document that is open for the model's answer."""
        return build_document(
            items,
            [],
            layout=self.layout,
            text_tokenizer=self.text_tokenizer,
            encoders=self.config.encoders,
            key=key,
        )

    def open_stream(self, items: Sequence[Item], key: str) -> Document:
        """An interleaved document that is open behind its items, without the roles of user and model."""
        closed = build_document(
            items,
            None,
            layout=self.layout,
            text_tokenizer=self.text_tokenizer,
            encoders=self.config.encoders,
            key=key,
        )
        columns = {name: getattr(closed, name)[:-1] for name in ("token_L", "loss_L", "modality_L", "span_L")}
        return dataclasses.replace(closed, **columns)

    def continue_all(
        self, documents: Sequence[Document], settings: SampleSettings, batch_size: int = 128
    ) -> list[Answer]:
        """What follows each document, at most `batch_size` of them in memory; document i has seed settings.seed + i."""
        answers: list[list[int]] = []
        for first in range(0, len(documents), batch_size):
            part = list(documents[first : first + batch_size])
            seeds = [settings.seed + first + i for i in range(len(part))]
            answers += generate(self.model, self.layout, part, settings, self.codes_per_image, seeds)
        return self._decoded(answers)

    @torch.inference_mode()
    def pixels(self, codes: Sequence[Sequence[int]], batch_size: int = 256) -> list[np.ndarray]:
        """The image of every sequence of codes, uint8[S, S, 3]."""
        if not codes:
            return []
        assert self.image_tokenizer is not None, "codes came from a model without an image tokenizer"
        images = []
        for part in torch.tensor(codes, device=self.device).split(batch_size):
            images_BSS3 = self.image_tokenizer.decode(part)
            images.append(((images_BSS3.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
        return list(torch.cat(images).numpy())

    @torch.inference_mode()
    def codes(self, images: Sequence[np.ndarray], batch_size: int = 256) -> list[tuple[int, ...]]:
        """The codes of every image, uint8[S, S, 3] of the image tokenizer's size."""
        if not images:
            return []
        assert self.image_tokenizer is not None, "this model has no image tokenizer"
        codes: list[tuple[int, ...]] = []
        for part in torch.from_numpy(np.stack(images)).split(batch_size):
            encoded = self.image_tokenizer.encode(part.to(self.device).float() / 127.5 - 1)
            codes += [tuple(image) for image in encoded.tolist()]
        return codes

    def _decoded(self, answers: Sequence[list[int]]) -> list[Answer]:
        runs = [split_answer(self.layout, answer) for answer in answers]
        images = iter(self.pixels([run for answer in runs for run in answer if isinstance(run, tuple)]))
        return [
            [
                Drawing(run, next(images)) if isinstance(run, tuple) else self.text_tokenizer.decode(run)
                for run in answer
            ]
            for answer in runs
        ]


def split_answer(layout: TokenLayout, tokens: Sequence[int]) -> list[list[int] | tuple[int, ...]]:
    """The runs of an answer in order: text pieces as a list of ids, an image as the tuple of its codes."""
    runs: list[list[int] | tuple[int, ...]] = []
    codes: list[int] = []
    for token in tokens:
        if token in layout.code_range("image"):
            codes.append(token - layout.code_range("image").start)
        elif token == layout.control("image_end"):
            runs.append(tuple(codes))
            codes = []
        elif layout.is_text(token):
            if not runs or isinstance(runs[-1], tuple):
                runs.append([])
            runs[-1] = [*runs[-1], token]
    return runs
