"""Codes of the data are those of one tokenizer, and of the run's if it has one: others mean other items."""

from __future__ import annotations

from megatron_gemini.data.loading.loader import Loader
from megatron_gemini.generation.code_runs import drawn_modalities
from megatron_gemini.modalities.image.code_tokenizer import ImageTokenizer, fingerprint
from megatron_gemini.registry import MODALITIES

OWN = "the run's own tokenizer"


def check_codes(loader: Loader, image_tokenizer: ImageTokenizer | None) -> None:
    """Raise ValueError for codes of a modality that were made by several tokenizers, `image_tokenizer` included.

    Looks at the first usable sample of each shard that the loader has checked. Codes that do not say who made them are
    taken as they are.
    """
    makers: dict[str, dict[str, str]] = {}
    if image_tokenizer is not None:
        makers |= {name: {fingerprint(image_tokenizer): OWN} for name in drawn_modalities()}
    for source in loader.sources:
        for (modality, maker), path in source.makers.items():
            if maker:
                makers.setdefault(modality, {}).setdefault(maker, path)
    for modality, places in makers.items():
        if len(places) > 1:
            (first, here), (second, there), *_ = places.items()
            codes = MODALITIES.get(modality).codes
            tool = f" by {codes.made_by}" if codes is not None and codes.made_by else ""
            raise ValueError(
                f"codes of the modality {modality} are of two tokenizers, {first} ({here}) and {second} ({there}); "
                f"make all of them anew{tool}, with the tokenizer that train.image_tokenizer names"
            )
