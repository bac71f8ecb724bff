"""Descriptions of interleaved documents and conversations, in the layouts that people have, as ordered references.

Nothing is read here: an entry is ("text", the text) or (kind, name of a member or file).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from megatron_gemini.contracts import IMAGE, TEXT
from megatron_gemini.data.samples.kinds import item_kinds
from megatron_gemini.modalities.bad_sample import BadSample

if TYPE_CHECKING:
    from megatron_gemini.config.schema import Plain

DOCUMENT_KEYS = ("items", "texts", "text_list")
"""Of which a document's description has one, by its layout."""
CONVERSATION_KEYS = ("messages", "conversations")
Entry: TypeAlias = tuple[str, str]
_ASSISTANT = ("assistant", "model", "gpt")
_USER = ("user", "human", "system")
_SHOWN = 80  # characters of strangers' data in an error


class SpokenTurn(NamedTuple):
    """A turn of a conversation; `answer`: it is the model's, and learned."""

    answer: bool
    entries: list[Entry]


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
        entries = [_entry(item) for item in _list(description, "items")]
    if not entries:
        raise BadSample("bad_json", 'an interleaved document needs {"items": [...]} with at least one item')
    return entries


def conversation(description: Plain) -> list[SpokenTurn]:
    """The turns of a conversation up to the model's last, those of one side that follow each other as one.

    {"messages": [{"role": ..., "content": ...}, ...]} or {"conversations": [{"from": ..., "value": ...}, ...]}, or the
    list alone. Content is text or a list of typed parts: {"type": "text", "text": ...}, {"type": "image", "image":
    NAME}, the same with codes and every modality. A system message belongs to the user's side.
    Raises BadSample: bad_json, no_answer.
    """
    if isinstance(description, Mapping):
        description = _list(description, "messages" if "messages" in description else "conversations")
    if not isinstance(description, list):
        raise BadSample("bad_json", "a conversation needs a list of messages")
    turns: list[SpokenTurn] = []
    for message in description:
        if not isinstance(message, Mapping):
            raise BadSample("bad_json", f"a message is a mapping, not {_shown(message)}")
        role = message.get("role", message.get("from"))
        if role not in _ASSISTANT and role not in _USER:
            raise BadSample("bad_json", f"the role {_shown(role)!r} is none of {', '.join(_USER + _ASSISTANT)}")
        answer, entries = role in _ASSISTANT, _parts(message.get("content", message.get("value")))
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


def _parts(content: Plain) -> list[Entry]:
    if isinstance(content, str):
        return [(TEXT, content)]
    if not isinstance(content, list) or not content:
        raise BadSample("bad_json", "the content of a message is text or a list of parts")
    return [_part(part) for part in content]


def _part(part: Plain) -> Entry:
    if isinstance(part, Mapping) and "type" in part:
        kind = part["type"]
        if not isinstance(kind, str) or kind not in item_kinds():
            raise BadSample("bad_json", f"a part of the type {_shown(kind)!r}; there are {', '.join(item_kinds())}")
        return _entry({kind: part.get(kind)})
    return _entry(part)


def _entry(item: Plain) -> Entry:
    name, value = next(iter(item.items())) if isinstance(item, Mapping) and len(item) == 1 else ("", "")
    if name not in item_kinds() or not isinstance(value, str):
        raise BadSample("bad_json", f"an item is one of {', '.join(item_kinds())}, with a string; not {_shown(item)}")
    return name, value


def _mmc4(description: Mapping[str, Plain]) -> list[Entry]:
    texts, images = _list(description, "text_list"), _list(description, "image_info")
    before: dict[int, list[Entry]] = {}  # several images may belong to one sentence
    for image in images:
        place = image.get("matched_text_index") if isinstance(image, Mapping) else None
        if not isinstance(image, Mapping) or type(place) is not int or not 0 <= place < len(texts):
            raise BadSample("bad_json", f"an image without its place in the text: {_shown(image)}")
        before.setdefault(place, []).append(_entry({IMAGE: image.get("image_name")}))
    return [entry for i, text in enumerate(texts) for entry in (*before.get(i, ()), _entry({TEXT: text}))]


def _obelics(description: Mapping[str, Plain]) -> list[Entry]:
    texts, images = _list(description, "texts"), _list(description, "images")
    if len(texts) != len(images):
        raise BadSample("bad_json", f"{len(texts)} texts and {len(images)} images; they stand beside each other")
    both = [(TEXT, text) if text is not None else (IMAGE, image) for text, image in zip(texts, images, strict=True)]
    return [_entry({kind: value}) for kind, value in both]


def _list(description: Mapping[str, Plain], name: str) -> list[Plain]:
    value = description.get(name)
    if not isinstance(value, list):
        raise BadSample("bad_json", f'it has no list "{name}"')
    return value


def _shown(value: Plain) -> str:
    return str(value)[:_SHOWN]
