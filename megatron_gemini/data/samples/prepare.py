"""Raw items of modalities to their encoders' inputs, with the placeholders that the stream has for them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from megatron_gemini.config.encoders import EncoderConfig
from megatron_gemini.data.samples.items import Codes, EncoderInput, Item, Text
from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.modalities.spec import ModalitySpec, Prepared
from megatron_gemini.registry import CONNECTORS, ENCODERS, MODALITIES


def prepare(item: Item, encoders: Mapping[str, EncoderConfig]) -> Text | Codes | EncoderInput:
    """Turn a raw item into its encoder's input; text, codes and prepared inputs pass unchanged.

    encoders: settings by name. Raises BadSample as `check_enabled` does.
    """
    if isinstance(item, (Text, Codes, EncoderInput)):
        return item
    spec = MODALITIES.get(item.modality)
    section = encoders[spec.encoder]
    check_enabled(spec, section)
    assert spec.prepare is not None, spec.name
    return encoder_input(spec, spec.prepare(item, section), section)


def check_enabled(spec: ModalitySpec, section: EncoderConfig) -> None:
    """Raise BadSample, <modality>_disabled, for an item whose encoder is off: a document may name any kind of item."""
    if not section.enabled:
        name = f"encoders.{spec.encoder}.enabled"
        message = f"{spec.name} input needs the {spec.encoder} encoder, and {name} is false"
        raise BadSample(f"{spec.name}_disabled", message)


def encoder_input(spec: ModalitySpec, prepared: Prepared, section: EncoderConfig) -> EncoderInput:
    """A prepared item with its placeholders: as many as its encoder and connector make embeddings of it."""
    # Told of the one sample here; a row in which items do not fit together would end the run.
    width = ENCODERS.get(spec.encoder).input_width(section)
    expected, found = (math.prod(prepared.grid), width), tuple(prepared.values_PC.shape)
    assert found == expected, f"{spec.name} is prepared as {found}; its grid and encoder want {expected}"
    # A run of the encoder's embeddings stays one span in the stream, whose tokens see each other as they did there.
    connector = CONNECTORS.get(section.connector.kind)
    spans_I, length_I = ENCODERS.get(spec.encoder).spans(np.array([prepared.grid], np.int64))
    spans = (int(connector.length(length_I)[0]),) * int(spans_I[0])
    memory = connector.reads is not None
    return EncoderInput(
        modality=spec.name,
        encoder=spec.encoder,
        placeholder=spec.control,
        values_PC=prepared.values_PC,
        grid=prepared.grid,
        seconds=prepared.seconds,
        spans=() if memory else spans,
        memory=sum(spans) if memory else 0,
    )
