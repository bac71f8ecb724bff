"""Conversations: every answer of the model is learned."""

from __future__ import annotations

from megatron_gemini.contracts import TEXT
from megatron_gemini.data.samples.decode_json import decode_json
from megatron_gemini.data.samples.items import Example, Turn
from megatron_gemini.data.samples.spec import Fields, FieldSpec, ReadItem, TaskSpec
from megatron_gemini.data.sources.columns import RECORD
from megatron_gemini.data.tasks.conversations import CONVERSATION_KEYS, conversation, media_fields


def read_turns(data: bytes, read_item: ReadItem) -> list[Turn]:
    return [
        Turn(answer, [read_item(*entry) for entry in entries]) for answer, entries in conversation(decode_json(data))
    ]


def texts(data: bytes) -> list[str]:
    return [value for turn in conversation(decode_json(data)) for kind, value in turn.entries if kind == TEXT]


def form(fields: Fields, words: str) -> Example:
    """All turns. The two sides are those of the first exchange, which an evaluation asks."""
    turns: list[Turn] = fields.of(MESSAGES.name, list)  # of which the last is an answer, see `conversation`
    first = next(place for place, turn in enumerate(turns) if turn.answer)
    return Example([item for turn in turns[:first] for item in turn.items], list(turns[first].items), turns=turns)


MESSAGES = FieldSpec(
    "messages", members=(RECORD,), decode=read_turns, texts=texts, keys=CONVERSATION_KEYS, reads=media_fields
)
CHAT = TaskSpec("chat", fields=(MESSAGES,), form=form)
