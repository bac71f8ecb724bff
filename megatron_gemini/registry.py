"""Every kind of thing that can be added, and the names of those that are here: the place to register a built-in one.

A name leads to `module:ATTRIBUTE`, which is imported when somebody first asks for it. So the table lies below all
packages and imports none of them, and `--help` pays for nothing. What is there must be importable without torch.
Plugins (`plugins.py`) register the object itself.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar, cast

if TYPE_CHECKING:  # types only: this file is below the packages that it names
    from megatron_gemini.connectors.spec import ConnectorSpec
    from megatron_gemini.data.operations.spec import OperationSpec
    from megatron_gemini.data.samples.spec import TaskSpec
    from megatron_gemini.data.sources.spec import FormatSpec
    from megatron_gemini.evaluation.metrics.spec import Metric
    from megatron_gemini.modalities.spec import EncoderSpec, ModalitySpec
    from megatron_gemini.objectives.spec import ObjectiveSpec

Entry = TypeVar("Entry")
LONGEST_SHOWN = 60
"""Characters of an unknown name that a message repeats: it may come from a stranger's file."""


def nearest(name: str, known: Sequence[str], others: str = "") -> str:
    """The way out for an unknown name, as the end of a message. others: how there can be more than those known."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"there are {', '.join(known)}{others and f', {others}'}"


class Registry(Generic[Entry]):
    """Entries of one kind by name, in a fixed order: the built-in ones as listed, then plugins' as registered.

    what: the kind in words, for messages. spec: the place of the class of its entries. built_in: `module:ATTRIBUTE` by
    name. completed_by: the place of a function (name, entry) -> entry, which fills in what an entry leaves open when it
    is registered; empty for none.
    """

    def __init__(self, what: str, spec: str, built_in: Mapping[str, str], completed_by: str = "") -> None:
        self.what, self._spec, self._completed_by = what, spec, completed_by
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
            shown = name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]}..."
            raise ValueError(f"{shown!r} is no {self.what}; {self.nearest(name)}")

    def nearest(self, name: str) -> str:
        """The way out for an unknown name, as the end of a message."""
        return nearest(name, self._order, "and --plugin MODULE adds others")

    def get(self, name: str) -> Entry:
        """The entry of a name. Raises a ValueError as `check`."""
        self.check(name)
        if name not in self._entries:
            # A plugin's entry is there since it was registered, so this place is a built-in one's.
            self._entries[name] = cast("Entry", _imported(self._places[name]))
        return self._entries[name]

    def entries(self) -> list[Entry]:
        """All of them, in order; imports those that nobody has asked for yet."""
        return [self.get(name) for name in self._order]

    def register(self, name: str, entry: Entry) -> None:
        """Add an entry, as a plugin does when it is imported.

        Raises a ValueError for a name that is taken, or an entry of another class than this kind's.
        """
        if name in self:
            raise ValueError(f"there is {_with_article(self.what)} {name!r} already; choose another name")
        # By place, like the entries, since this file imports nothing that is above it.
        spec = cast("type[Entry]", _imported(self._spec))
        if not isinstance(entry, spec):
            found = f"the class {entry.__name__}" if isinstance(entry, type) else f"a {type(entry).__name__}"
            raise ValueError(f"the {self.what} {name!r} is {found}; register {_with_article(spec.__name__)}")
        if self._completed_by:
            complete = cast("Callable[[str, Entry], Entry]", _imported(self._completed_by))
            entry = complete(name, entry)
        self._entries[name] = entry
        self._order.append(name)

    def unregister(self, name: str) -> None:
        """Take back `register`, for tests that leave no trace. A built-in entry stays: it is a programmer's mistake."""
        assert name not in self._places, f"{name} is built in"
        self._order.remove(name)
        del self._entries[name]


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeioAEIO' else 'a'} {noun}"


def _imported(place: str) -> object:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


_D = "megatron_gemini.data"
_E = "megatron_gemini.evaluation.metrics"
_M = "megatron_gemini.modalities"
_O = "megatron_gemini.objectives"

# The order of encoders is the order in which every rank runs them, and that of a checkpoint's random streams: append.
ENCODERS: Registry[EncoderSpec] = Registry(
    "encoder",
    f"{_M}.spec:EncoderSpec",
    {"vision": f"{_M}.image.spec:VISION", "audio": f"{_M}.audio.spec:AUDIO_ENCODER"},
)
MODALITIES: Registry[ModalitySpec] = Registry(
    "modality",
    f"{_M}.spec:ModalitySpec",
    {
        "text": f"{_M}.text.spec:TEXT",
        "image": f"{_M}.image.spec:IMAGE",
        "video": f"{_M}.video.spec:VIDEO",
        "audio": f"{_M}.audio.spec:AUDIO",
    },
    completed_by=f"{_M}.control_tokens:with_control_tokens",
)
CONNECTORS: Registry[ConnectorSpec] = Registry(
    "connector",
    "megatron_gemini.connectors.spec:ConnectorSpec",
    {"linear": "megatron_gemini.connectors.linear.spec:LINEAR"},
)
OBJECTIVES: Registry[ObjectiveSpec] = Registry(
    "objective",
    f"{_O}.spec:ObjectiveSpec",
    {"pretrain": f"{_O}.pretrain.spec:PRETRAIN", "image_tokenizer": f"{_O}.image_tokenizer.spec:IMAGE_TOKENIZER"},
)
TASKS: Registry[TaskSpec] = Registry(
    "task",
    f"{_D}.samples.spec:TaskSpec",
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
    f"{_D}.sources.spec:FormatSpec",
    {
        "webdataset": f"{_D}.sources.webdataset:WEBDATASET",
        "jsonl": f"{_D}.sources.jsonl:JSONL",
        "parquet": f"{_D}.sources.parquet:PARQUET",
    },
)
# Of whole samples. Those of single images, clips, sounds and the like are in the modality's own spec.
OPERATIONS: Registry[OperationSpec] = Registry(
    "operation",
    f"{_D}.operations.spec:OperationSpec",
    {
        "decode": f"{_D}.operations.standard:DECODE",
        "prepare": f"{_D}.operations.standard:PREPARE",
        "choose_caption": f"{_D}.operations.standard:CHOOSE_CAPTION",
        "format": f"{_D}.operations.standard:FORMAT",
        "tokenize": f"{_D}.operations.standard:TOKENIZE",
    },
)
# In the order of a report. Every evaluation computes all of them for the inputs that it has.
METRICS: Registry[Metric] = Registry(
    "metric",
    f"{_E}.spec:MetricSpec",
    {
        "exact_match": f"{_E}.exact_match:EXACT_MATCH",
        "cer": f"{_E}.error_rates:CER",
        "wer": f"{_E}.error_rates:WER",
        "psnr": f"{_E}.psnr:PSNR",
        "ssim": f"{_E}.ssim:SSIM",
        "code_usage": f"{_E}.code_usage:CODE_USAGE",
        "diversity": f"{_E}.diversity:DIVERSITY",
        "copies": f"{_E}.copies:COPIES",
    },
)
