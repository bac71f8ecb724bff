"""Kinds of item: text, every modality, and every modality's codes. Each may be a field of a sample, or stand in a
document."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_gemini.contracts import TEXT
from megatron_gemini.data.samples.decode_json import decode_json
from megatron_gemini.data.samples.items import Codes, Item, Text
from megatron_gemini.data.samples.prepare import check_enabled
from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.modalities.spec import CodesSpec, ModalitySpec
from megatron_gemini.modalities.text.preprocess import decode_text
from megatron_gemini.registry import MODALITIES

if TYPE_CHECKING:
    from megatron_gemini.config.run import RunConfig

MAKER = 64  # most characters of a tokenizer's name


def item_kinds() -> dict[str, tuple[str, ...]]:
    """The kinds by name, with the members or columns that usually hold such an item."""
    specs = MODALITIES.entries()
    codes = [spec.codes for spec in specs if spec.codes is not None]
    return {spec.name: spec.members for spec in specs} | {each.field: each.members for each in codes}


def made_as(kind: str) -> tuple[ModalitySpec, CodesSpec] | None:
    """The modality whose codes a kind is; None for one that is read as it is."""
    found = ((spec, spec.codes) for spec in MODALITIES.entries())
    return next(((spec, codes) for spec, codes in found if codes is not None and codes.field == kind), None)


def decode_item(kind: str, data: bytes, config: RunConfig) -> Item:
    """A member or file as an item, not yet prepared. Raises BadSample."""
    if kind == TEXT:  # has no settings: the decoder reads it itself
        return Text(decode_text(data))
    made = made_as(kind)
    if made is not None:
        return decode_codes(data, *made, config)
    spec = MODALITIES.get(kind)
    assert spec.decode is not None, kind
    section = config.encoders[spec.encoder]
    check_enabled(spec, section)
    return spec.decode(data, section)


def decode_codes(data: bytes, spec: ModalitySpec, codes: CodesSpec, config: RunConfig) -> Codes:
    """`{"codes": [...], "tokenizer": ...}`: the codes of one item, as many as it has, and who made them if it is told.

    Raises BadSample: bad_codes, bad_json.
    """
    value = decode_json(data)
    table = value if isinstance(value, dict) else {}
    given, maker = table.get("codes"), table.get("tokenizer")
    expected, size = codes.length(config), codes.size(config)
    if not isinstance(given, list) or len(given) != expected:
        found = f"{len(given)} codes" if isinstance(given, list) else "no list of codes"
        raise BadSample("bad_codes", f"it holds {found}; an item of the modality {spec.name} has {expected}")
    numbers = []
    for code in given:
        if type(code) is not int or not 0 <= code < size:  # of bool, which is an int to isinstance, none is a code
            raise BadSample("bad_codes", f"{spec.name} code {str(code)[:20]}; the codebook has 0..{size - 1}")
        numbers.append(code)
    return Codes(spec.name, tuple(numbers), maker[:MAKER] if isinstance(maker, str) else "")
