"""Every kind of thing that can be added, and the names of those that are here: the place to register a built-in one.

A name leads to `module:ATTRIBUTE`, which is imported when somebody first asks for it. So the table lies below all
packages and imports none of them, and `--help` pays for nothing. What is there must be importable without torch.
Plugins (`plugins.py`) register the object itself.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from megatron_gemini.contracts import CONTROL_TOKENS

if TYPE_CHECKING:  # types only: this file is below the packages that it names
    from megatron_gemini.connectors.spec import ConnectorSpec
    from megatron_gemini.data.operations.spec import OperationSpec
    from megatron_gemini.data.samples.spec import TaskSpec
    from megatron_gemini.data.sources.spec import FormatSpec
    from megatron_gemini.modalities.spec import EncoderSpec, ModalitySpec
    from megatron_gemini.objectives.spec import ObjectiveSpec

Entry = TypeVar("Entry")


def nearest(name: str, known: Sequence[str], others: str = "") -> str:
    """The way out for an unknown name, as the end of a message. others: how there can be more than those known."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"there are {', '.join(known)}{others and f', {others}'}"


class Registry(Generic[Entry]):
    """Entries of one kind by name, in a fixed order: the built-in ones as listed, then plugins' as registered.

    what: the kind in words, for messages. built_in: `module:ATTRIBUTE` by name.
    """

    def __init__(self, what: str, built_in: Mapping[str, str]) -> None:
        self.what = what
        self._places = dict(built_in)
        self._entries: dict[str, Entry] = {}
        self._order = list(built_in)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._order)

    def __contains__(self, name: str) -> bool:
        return name in self._order

    def check(self, name: str) -> None:
        """Raise a ValueError for a name that is not registered, with the nearest that is."""
        if name not in self:
            raise ValueError(f"{name!r} is no {self.what}; {self.nearest(name)}")

    def nearest(self, name: str) -> str:
        """The way out for an unknown name, as the end of a message."""
        return nearest(name, self._order, "and --plugin MODULE adds others")

    def get(self, name: str) -> Entry:
        """The entry of a name. Raises a ValueError as `check`."""
        self.check(name)
        if name not in self._entries:
            module, _, attribute = self._places[name].partition(":")
            self._entries[name] = getattr(importlib.import_module(module), attribute)
        return self._entries[name]

    def entries(self) -> list[Entry]:
        """All of them, in order; imports those that nobody has asked for yet."""
        return [self.get(name) for name in self._order]

    def register(self, name: str, entry: Entry) -> None:
        """Add an entry, as a plugin does when it is imported. Raises a ValueError for a name that is taken."""
        if name in self:
            raise ValueError(f"there is a {self.what} {name!r} already; choose another name")
        self._entries[name] = entry
        self._order.append(name)

    def unregister(self, name: str) -> None:
        """Take back `register`, for tests that leave no trace. A built-in entry stays: it is a programmer's mistake."""
        assert name not in self._places, f"{name} is built in"
        self._order.remove(name)
        del self._entries[name]


class ModalityRegistry(Registry["ModalitySpec"]):
    """Modalities, of which those of plugins get control tokens that are still free."""

    def register(self, name: str, entry: ModalitySpec) -> None:
        """As `Registry.register`. A control token that the entry leaves open becomes the next `reserved_n`.

        The order of registration decides, which is that of the plugins: every process loads them in the same one.
        Raises a ValueError for a token that another modality has, and when no `reserved_n` is left.
        """
        taken = set(self.control_tokens().values())
        if entry.encoder:
            entry = dataclasses.replace(entry, control=self._take_token(name, entry.control, taken))
        if entry.codes is not None:
            begin, end = (self._take_token(name, token, taken) for token in (entry.codes.begin, entry.codes.end))
            entry = dataclasses.replace(entry, codes=dataclasses.replace(entry.codes, begin=begin, end=end))
        super().register(name, entry)

    def _take_token(self, name: str, wanted: str, taken: set[str]) -> str:
        # Codes begin behind the control tokens, so that a new one would change the ids of a trained model's codes.
        free = [token for token in CONTROL_TOKENS if token.startswith("reserved_") and token not in taken]
        token = wanted or (free[0] if free else "")
        if not token:
            raise ValueError(f"no control token is left for the {self.what} {name!r}; load fewer plugins that add one")
        if token in taken or token not in CONTROL_TOKENS:
            why = "another modality's" if token in taken else "none of `contracts.CONTROL_TOKENS`"
            raise ValueError(f"the control token {token!r} of the {self.what} {name!r} is {why}; leave it open")
        taken.add(token)
        return token

    def control_tokens(self) -> dict[str, str]:
        """Names of the control tokens in force, by what they stand for.

        A modality's own name is that of its placeholder; NAME_begin and NAME_end are around its codes.
        """
        found: dict[str, str] = {}
        for spec in self.entries():
            if spec.control:
                found[spec.name] = spec.control
            if spec.codes is not None:
                found |= {f"{spec.name}_begin": spec.codes.begin, f"{spec.name}_end": spec.codes.end}
        return found


_D = "megatron_gemini.data"
_M = "megatron_gemini.modalities"
_O = "megatron_gemini.objectives"

# The order of encoders is the order in which every rank runs them, and that of a checkpoint's random streams: append.
ENCODERS: Registry[EncoderSpec] = Registry(
    "encoder", {"vision": f"{_M}.image.spec:VISION", "audio": f"{_M}.audio.spec:AUDIO_ENCODER"}
)
MODALITIES = ModalityRegistry(
    "modality",
    {
        "text": f"{_M}.text.spec:TEXT",
        "image": f"{_M}.image.spec:IMAGE",
        "video": f"{_M}.video.spec:VIDEO",
        "audio": f"{_M}.audio.spec:AUDIO",
    },
)
CONNECTORS: Registry[ConnectorSpec] = Registry("connector", {"linear": "megatron_gemini.connectors.linear.spec:LINEAR"})
OBJECTIVES: Registry[ObjectiveSpec] = Registry(
    "objective",
    {"pretrain": f"{_O}.pretrain.spec:PRETRAIN", "image_tokenizer": f"{_O}.image_tokenizer.spec:IMAGE_TOKENIZER"},
)
TASKS: Registry[TaskSpec] = Registry(
    "task",
    {
        "caption": f"{_D}.tasks.questions:CAPTION",
        "generate": f"{_D}.tasks.drawings:GENERATE",
        "transcribe": f"{_D}.tasks.questions:TRANSCRIBE",
        "speech_to_image": f"{_D}.tasks.drawings:SPEECH_TO_IMAGE",
        "video_caption": f"{_D}.tasks.questions:VIDEO_CAPTION",
        "interleave": f"{_D}.tasks.documents:INTERLEAVE",
        "text": f"{_D}.tasks.documents:TEXT_TASK",
        "chat": f"{_D}.tasks.chat:CHAT",
    },
)
# The first one is taken for files whose ending belongs to none.
FORMATS: Registry[FormatSpec] = Registry(
    "file format",
    {
        "webdataset": f"{_D}.sources.webdataset:WEBDATASET",
        "jsonl": f"{_D}.sources.jsonl:JSONL",
        "parquet": f"{_D}.sources.parquet:PARQUET",
    },
)
# Of whole samples. Those of single images, clips, sounds and the like are in the modality's own spec.
OPERATIONS: Registry[OperationSpec] = Registry(
    "operation",
    {
        "decode": f"{_D}.operations.standard:DECODE",
        "prepare": f"{_D}.operations.standard:PREPARE",
        "choose_caption": f"{_D}.operations.standard:CHOOSE_CAPTION",
        "format": f"{_D}.operations.standard:FORMAT",
        "tokenize": f"{_D}.operations.standard:TOKENIZE",
    },
)
