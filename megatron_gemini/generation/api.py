"""Asking a trained model: prompts of text, images, clips and sound in; text and images out.

Shape suffixes: B images, S pixels of a side, H rows and W columns of pixels.
"""

from __future__ import annotations

import dataclasses
from collections import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import torch

from megatron_gemini.checkpoint.inference import Loaded
from megatron_gemini.data.samples.document import Document, build_document
from megatron_gemini.data.samples.items import Codes, Item
from megatron_gemini.generation.code_runs import code_runs, drawn_modalities
from megatron_gemini.generation.pieces import GrowingAnswer, split_answer
from megatron_gemini.generation.sample import generate
from megatron_gemini.generation.settings import SampleSettings
from megatron_gemini.generation.steps import Decoding
from megatron_gemini.registry import MODALITIES


@dataclass(frozen=True, eq=False)
class Drawing:
    """An image that the model drew: its codes, and uint8[H, W, 3] made of them."""

    codes: tuple[int, ...]
    pixels_HW3: np.ndarray


Piece = str | Drawing | Codes
"""Codes that no tokenizer of the checkpoint turns into an item are given as they are."""
Answer = list[Piece]


class Generator:
    """A loaded model that answers, on the GPU where there is one."""

    def __init__(self, loaded: Loaded) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config, self.layout, self.text_tokenizer = loaded.config, loaded.layout, loaded.text_tokenizer
        self.model = loaded.model.to(self.device)
        self.image_tokenizer = None if loaded.image_tokenizer is None else loaded.image_tokenizer.to(self.device)
        made = {spec.name: spec.codes for spec in MODALITIES.entries() if spec.codes is not None}
        self._drawn = set(drawn_modalities())
        able = made.keys() if self.image_tokenizer is not None else made.keys() - self._drawn
        self.runs = code_runs(self.layout, {name: made[name].length(self.config) for name in able})
        """Of codes that answers may hold."""
        self.codebook = sum(len(run.codes) for run in self.runs if run.modality in self._drawn)
        """Codes that an image is made of; 0 for a model that cannot draw."""

    def respond(self, items: Sequence[Item], settings: SampleSettings) -> Answer:
        """The answer to one prompt, its pieces of text and its images in order.

        Raises ValueError for input that the model has no encoder for, or an item asked of a model that makes none.
        """
        return self.respond_all([items], settings)[0]

    def respond_all(
        self, prompts: Sequence[Sequence[Item]], settings: SampleSettings, batch_size: int = 128
    ) -> list[Answer]:
        """The answer to each prompt, as `respond`; prompt i is sampled with seed settings.seed + i."""
        documents = [self.open_document(items, f"prompt {i}") for i, items in enumerate(prompts)]
        return self.continue_all(documents, settings, batch_size)

    def stream(self, items: Sequence[Item], settings: SampleSettings) -> abc.Generator[Piece, None, None]:
        """The answer of `respond`, piece by piece as it is decoded: a text in parts, an image when it is whole.

        Parts of one text join to what `respond` gives. Closing or dropping the iterator ends the decoding and frees
        its cache. Raises ValueError as `respond`, at the call.
        """
        return self._pieces(self.decode([self.open_document(items, "prompt")], settings))

    def decode(self, documents: Sequence[Document], settings: SampleSettings, samples: int = 1) -> Decoding:
        """Steps of `samples` answers to each open document, all in one batch; see `Decoding`."""
        return Decoding(self.model, self.layout, list(documents), settings, self.runs, samples=samples)

    def open_document(self, items: Sequence[Item], key: str, roles: bool = True) -> Document:
        """A document that is open for the model's answer.

        roles: False for an interleaved document, which is open behind its items and names neither user nor model.
        """
        document = build_document(
            items,
            [] if roles else None,
            layout=self.layout,
            text_tokenizer=self.text_tokenizer,
            encoders=self.config.encoders,
            key=key,
        )
        if roles:
            return document
        # Without an answer a document is built whole: its closing eos is what the model is to go on in place of.
        columns = {name: getattr(document, name)[:-1] for name in ("token_L", "loss_L", "modality_L", "span_L")}
        return dataclasses.replace(document, **columns)

    def continue_all(
        self, documents: Sequence[Document], settings: SampleSettings, batch_size: int = 128
    ) -> list[Answer]:
        """What follows each document, at most `batch_size` of them in memory; document i has seed settings.seed + i."""
        answers: list[list[int]] = []
        for first in range(0, len(documents), batch_size):
            # The cache grows with the longest prompt of a part times the number of its sequences.
            part = list(documents[first : first + batch_size])
            seeds = [settings.seed + first + i for i in range(len(part))]
            answers += generate(self.model, self.layout, part, settings, self.runs, seeds)
        # The images of all answers together, since the image tokenizer decodes them in batches.
        parts = [split_answer(self.layout, self.runs, answer) for answer in answers]
        images = iter(self.pixels([part.codes for answer in parts for part in answer if self._is_drawing(part)]))
        return [
            [
                self.text_tokenizer.decode(part)
                if isinstance(part, list)
                else Drawing(part.codes, next(images))
                if self._is_drawing(part)
                else part
                for part in answer
            ]
            for answer in parts
        ]

    def _is_drawing(self, part: str | list[int] | Codes) -> TypeGuard[Codes]:
        return isinstance(part, Codes) and part.target in self._drawn

    @torch.inference_mode()
    def pixels(self, codes: Sequence[Sequence[int]], batch_size: int = 256) -> list[np.ndarray]:
        """The image of every sequence of codes, uint8[S, S, 3]."""
        if not codes:
            return []
        assert self.image_tokenizer is not None, "codes came from a model without an image tokenizer"
        images = []
        for part in torch.tensor(codes, device=self.device).split(batch_size):
            images_BSS3 = self.image_tokenizer.decode(part)
            # [-1, 1], as the tokenizer was trained, to bytes; what it draws beyond that range has no color.
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

    def _pieces(self, decoding: Decoding) -> abc.Generator[Piece, None, None]:
        answer = GrowingAnswer(self.layout, self.runs, self.text_tokenizer.decode)
        with decoding:
            for step in decoding:
                sampled = step.tokens[0]
                for piece in answer.add(sampled.token) + (answer.end() if sampled.finish else []):
                    yield Drawing(piece.codes, self.pixels([piece.codes])[0]) if self._is_drawing(piece) else piece
