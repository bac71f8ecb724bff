"""Tasks in which the whole of a document is learned: plain text, and text with images and codes in between."""

from __future__ import annotations

from megatron_gemini.contracts import TEXT
from megatron_gemini.data.samples.decode_json import decode_json
from megatron_gemini.data.samples.items import Example, Item, Text
from megatron_gemini.data.samples.spec import FieldSpec, ReadItem, TaskSpec
from megatron_gemini.data.sources.columns import RECORD
from megatron_gemini.data.tasks.descriptions import DOCUMENT_KEYS, MMC4_ITEMS, OBELICS_ITEMS, document_entries


def read_items(data: bytes, read_item: ReadItem) -> list[Item]:
    return [read_item(*entry) for entry in document_entries(decode_json(data))]


def texts(data: bytes) -> list[str]:
    return [value for kind, value in document_entries(decode_json(data)) if kind == TEXT]


ITEMS = FieldSpec(
    "items",
    members=(RECORD,),
    decode=read_items,
    texts=texts,
    keys=DOCUMENT_KEYS,
    reads=lambda: (OBELICS_ITEMS, MMC4_ITEMS),
)
INTERLEAVE = TaskSpec(
    "interleave",
    fields=(ITEMS,),
    form=lambda fields, words: Example(fields.of(ITEMS.name, list), None),
)
TEXT_TASK = TaskSpec(
    "text",
    fields=(TEXT,),
    form=lambda fields, words: Example([Text(fields.text())], None),
)
