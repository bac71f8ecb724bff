"""Descriptions of interleaved documents, in the layouts that people have, as ordered references.

Nothing is read here: an entry is ("text", the text) or (kind, reference), see `samples.references`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

from megatron_gemini.contracts import TEXT
from megatron_gemini.data.samples.kinds import item_kinds
from megatron_gemini.data.samples.references import reference, shown
from megatron_gemini.data.sources.columns import is_missing
from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.registry import MODALITIES

if TYPE_CHECKING:
    from megatron_gemini.config.schema import Plain

MMC4_ITEMS, OBELICS_ITEMS = "image_info", "images"
"""The fields of a description that name media."""
DOCUMENT_KEYS = ("items", "texts", "text_list")
"""Of which a document's description has one, by its layout."""
Entry: TypeAlias = tuple[str, str]


def document_entries(description: Plain) -> list[Entry]:
    """What a document holds, in order.

    {"items": [{"text": "..."}, {"image": "NAME"}, ...]}; or {"text_list": [...], "image_info": [{"image_name": NAME,
    "matched_text_index": i}, ...]} (MMC4: an image stands before its sentence); or {"texts": [...], "images": [...]},
    of which at each place one is null (OBELICS). Raises BadSample: bad_json.
    """
    if isinstance(description, list):  # a column `items` of a table
        description = {"items": description}
    if not isinstance(description, Mapping):
        raise BadSample("bad_json", "an interleaved document needs {...} with its items")
    if "text_list" in description:
        entries = _mmc4(description)
    elif "texts" in description:
        entries = _obelics(description)
    else:
        entries = [read_entry(item) for item in _list(description, "items")]
    if not entries:
        raise BadSample("bad_json", 'an interleaved document needs {"items": [...]} with at least one item')
    return entries


def read_entry(item: Plain) -> Entry:
    """One item: a mapping with its kind, and its text or what names it. Raises BadSample: bad_json."""
    kinds = item_kinds()
    # A row of a parquet table has all keys that any item of the table has.
    held = [each for each in item.items() if each[1] is not None] if isinstance(item, Mapping) else []
    name, value = held[0] if len(held) == 1 else ("", "")
    if name in MODALITIES and name != TEXT and value:
        return name, reference(value)
    if name not in kinds or not isinstance(value, str) or (name != TEXT and not value):
        raise BadSample("bad_json", f"an item is one of {', '.join(kinds)}, with a string; not {shown(item)}")
    return name, value


def _mmc4(description: Mapping[str, Plain]) -> list[Entry]:
    texts, images = _list(description, "text_list"), _list(description, MMC4_ITEMS)
    others = description.get(OBELICS_ITEMS)
    if isinstance(others, list) and any(each is not None for each in others):
        raise BadSample("bad_json", f"it has both {MMC4_ITEMS} and {OBELICS_ITEMS}; keep one of them")
    before: dict[int, list[Entry]] = {}  # several images may belong to one sentence
    for image in images:
        place = image.get("matched_text_index") if isinstance(image, Mapping) else None
        if not isinstance(image, Mapping) or type(place) is not int or not 0 <= place < len(texts):
            raise BadSample("bad_json", f"an image without its place in the text: {shown(image)}")
        before.setdefault(place, []).append(read_entry({_seen(): image.get("image_name")}))
    return [entry for i, text in enumerate(texts) for entry in (*before.get(i, ()), read_entry({TEXT: text}))]


def _obelics(description: Mapping[str, Plain]) -> list[Entry]:
    texts, images = _list(description, "texts"), _list(description, OBELICS_ITEMS)
    if len(texts) != len(images):
        raise BadSample("bad_json", f"{len(texts)} texts and {len(images)} images; they stand beside each other")
    for text, image in zip(texts, images, strict=True):
        if image is not None and not is_missing(image) and text is not None and not is_missing(text):
            raise BadSample("bad_json", f"a text and an image at one place: {shown(text)}; one of them is null")
    both = [
        (TEXT, text) if text is not None and not is_missing(text) else (_seen(), image)
        for text, image in zip(texts, images, strict=True)
    ]
    return [read_entry({kind: value}) for kind, value in both]


def _seen() -> str:
    """The modality that both layouts mean."""
    return next(spec.name for spec in MODALITIES.entries() if OBELICS_ITEMS in spec.beside)


def _list(description: Mapping[str, Plain], name: str) -> list[Plain]:
    value = description.get(name)
    if not isinstance(value, list):
        raise BadSample("bad_json", f'it has no list "{name}"')
    return value
