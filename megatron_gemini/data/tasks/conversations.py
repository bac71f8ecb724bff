"""Descriptions of conversations, in the layouts that people have, as turns of ordered references.

Nothing is read here: an entry is ("text", the text) or (kind, reference), see `samples.references`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from megatron_gemini.contracts import TEXT
from megatron_gemini.data.samples.references import reference, shown
from megatron_gemini.data.sources.columns import is_missing
from megatron_gemini.data.tasks.descriptions import Entry, read_entry
from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.registry import MODALITIES

if TYPE_CHECKING:
    from megatron_gemini.config.schema import Plain

CONVERSATION_KEYS = ("messages", "conversations")
_ASSISTANT = ("assistant", "model", "gpt")
_USER = ("user", "human", "system")
_ASKING = ("user", "human")
_MARK = ""
"""In an entry, in place of a reference: here belongs the next item that the record names beside the conversation."""


class SpokenTurn(NamedTuple):
    """A turn of a conversation; `answer`: it is the model's, and learned."""

    answer: bool
    entries: list[Entry]


def conversation(description: Plain) -> list[SpokenTurn]:
    """The turns of a conversation up to the model's last, those of one side that follow each other as one.

    {"messages": [{"role": ..., "content": ...}, ...]} or {"conversations": [{"from": ..., "value": ...}, ...]}, or the
    list alone. Content is text or a list of typed parts: {"type": "text", "text": ...}, {"type": "image", "image":
    NAME}, the same with codes and every modality. A system message belongs to the user's side.

    Items may also stand beside the conversation, in fields such as `image` or `images`. They take the places of marks
    such as <image> in texts, or of parts without a name, in their order. Without a mark they stand before the first
    question. Raises BadSample: bad_json, no_answer, mark_without_item, item_without_mark.
    """
    beside = media_beside(description) if isinstance(description, Mapping) else {}
    if isinstance(description, Mapping):
        key = CONVERSATION_KEYS[0] if description.get(CONVERSATION_KEYS[0]) is not None else CONVERSATION_KEYS[1]
        description = description.get(key)
    if not isinstance(description, list):
        raise BadSample("bad_json", f"a conversation needs a list of {' or '.join(CONVERSATION_KEYS)}")
    said = [_message(message) for message in description]
    named = {kind for _, entries in said for kind, value in entries if value != _MARK}
    # Where marks say which of them is which, both may name some.
    if twice := [kind for kind in beside if kind in named and kind not in _marks(said)]:
        fields = ", ".join(MODALITIES.get(twice[0]).beside)
        raise BadSample("bad_json", f"the messages name items of {twice[0]}, and so do {fields} beside them; keep one")
    _place(beside, said)
    turns: list[SpokenTurn] = []
    for role, entries in said:
        answer = role in _ASSISTANT
        # In generation the user's turns and the model's alternate, and so they do here.
        if turns and turns[-1].answer == answer:
            turns[-1].entries.extend([(TEXT, "\n"), *entries])
        else:
            turns.append(SpokenTurn(answer, entries))
    while turns and not turns[-1].answer:  # what is said after the last answer has none to learn
        turns.pop()
    if not turns:
        raise BadSample("no_answer", "the conversation has no message of the assistant to learn from")
    return turns


def media_fields() -> tuple[str, ...]:
    """Names of all fields of a record that may name items beside a conversation."""
    return tuple(name for spec in MODALITIES.entries() for name in spec.beside)


def media_beside(record: Mapping[str, Plain]) -> dict[str, list[str]]:
    """References to the items that a record names beside its conversation, by modality. Raises BadSample: bad_json."""
    found: dict[str, list[str]] = {}
    for spec in MODALITIES.entries():
        for name in spec.beside:
            value = record.get(name)
            if value is None or value == "" or value == [] or is_missing(value):
                continue
            references = [reference(each) for each in (value if isinstance(value, list) else [value])]
            # Either may repeat the other or go on from it, and a guess would teach the wrong picture.
            if found.get(spec.name, references) != references:
                names = " and ".join(spec.beside)
                raise BadSample("bad_json", f"two of the fields {names} name different items; keep one of them")
            found[spec.name] = references
    return found


def _message(message: Plain) -> tuple[str, list[Entry]]:
    """(role, entries) of a message."""
    if not isinstance(message, Mapping):
        raise BadSample("bad_json", f"a message is a mapping, not {shown(message)}")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or (role not in _ASSISTANT and role not in _USER):
        raise BadSample("bad_json", f"the role {shown(role)!r} is none of {', '.join(_USER + _ASSISTANT)}")
    content = message.get("content", message.get("value"))
    beside = media_beside(message)
    if isinstance(content, str):
        entries = _marked(content)
    elif isinstance(content, list) and content:
        entries = [each for part in content for each in _part(part)]
    else:
        raise BadSample("bad_json", "the content of a message is text or a list of parts")
    if beside:  # of this message alone, and of all its marks
        _place(beside, [(_ASKING[0], entries)])
    return role, entries


def _marked(text: str) -> list[Entry]:
    """A text cut at its marks, with the line feed that sets a mark apart left out."""
    kinds = {spec.mark: spec.name for spec in MODALITIES.entries() if spec.mark}
    pieces = re.split(f"\n?({'|'.join(map(re.escape, kinds))})\n?", text)
    entries = [(kinds[piece], _MARK) if place % 2 else (TEXT, piece) for place, piece in enumerate(pieces)]
    return [each for each in entries if len(entries) == 1 or each != (TEXT, "")]


def _part(part: Plain) -> list[Entry]:
    if not isinstance(part, Mapping) or "type" not in part:
        found = read_entry(part)
        return _marked(found[1]) if found[0] == TEXT else [found]
    kind = part["type"]
    if kind == TEXT:
        return _marked(read_entry({TEXT: part.get(TEXT)})[1])
    spec = next((spec for spec in MODALITIES.entries() if kind in (spec.name, *spec.parts)), None)
    if spec is None or not isinstance(kind, str):
        return [read_entry({str(kind): part.get(str(kind))})]
    # Under the name of its type, as OpenAI writes it, of its modality, or of the mapping that `reference` reads.
    values = (part.get(name) for name in (kind, spec.name, *spec.parts, "source"))
    value: Plain = next((value for value in values if value is not None), None)
    if value is None:
        value = {name: content for name, content in part.items() if name != "type" and content is not None}
    if value == {}:
        return [(spec.name, _MARK)]  # the item stands beside the conversation
    return [(spec.name, reference(value))]


def _place(beside: Mapping[str, list[str]], said: list[tuple[str, list[Entry]]]) -> None:
    """Put the items that stand beside a conversation into its messages, in place."""
    for kind in dict.fromkeys((*_marks(said), *beside)):
        items, marks = beside.get(kind, []), _marks(said).count(kind)
        spec = MODALITIES.get(kind)
        if not marks:
            first = next((entries for role, entries in said if role in _ASKING), None)
            if first is None:
                raise BadSample("item_without_mark", f"{len(items)} of {kind}, and no question that they belong to")
            first[:0] = [(kind, item) for item in items]
        elif len(items) < marks:
            fields = ", ".join(spec.beside)
            raise BadSample(
                "mark_without_item", f"{marks} marks of {kind}, and {len(items)} items in the fields {fields} beside it"
            )
        elif len(items) > marks:
            raise BadSample(
                "item_without_mark", f"{len(items)} items of {kind}, and {marks} marks {spec.mark} for them"
            )
        else:
            rest = iter(items)
            for _, entries in said:
                entries[:] = [(kind, next(rest)) if each == (kind, _MARK) else each for each in entries]


def _marks(said: Iterable[tuple[str, list[Entry]]]) -> list[str]:
    """The kind of every mark, in order."""
    return [kind for _, entries in said for kind, value in entries if kind != TEXT and value == _MARK]
