"""That validation data is not trained on: checked on the shards themselves, not taken from their names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from megatron_gemini.evaluation.json_data import Json, parse_object

# Texts are not among them: the same short caption may rightly stand on both sides.
MEDIA = ("png", "jpg", "jpeg", "webp", "wav", "flac", "mp4")
HOW = (
    "Every image, recording and clip of the training and the validation shards was hashed (SHA-256), and the named "
    "metadata fields of their samples were collected; nothing may be on both sides."
)


@dataclass
class Fingerprint:
    """What identifies the content of a set of shards.

    media: hashes of all images, recordings and clips, with the key of a sample that holds each.
    fields: for each metadata field, the values that occur, with the key of a sample that has each.
    """

    samples: int = 0
    media: dict[str, str] = field(default_factory=dict)
    fields: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, key: str, members: Mapping[str, bytes], names: Iterable[str]) -> None:
        """Takes a sample: its key, its members by extension, and the metadata fields that identify its origin."""
        self.samples += 1
        for extension, data in members.items():
            # By content, since a copy under another name or key is a copy all the same.
            if extension.rpartition(".")[2].lower() in MEDIA:
                self.media[hashlib.sha256(data).hexdigest()] = key
        metadata = parse_object(members.get("json", b""))
        for name in names:
            value = metadata.get(name)
            # A list is several values: the frames of a clip, the images of a document.
            for one in value if isinstance(value, list) else [] if value is None else [value]:
                self.fields.setdefault(name, {})[str(one)] = key


def compare(train: Fingerprint, validation: Fingerprint, names: Iterable[str]) -> dict[str, Json]:
    """What is on both sides, as plain data for a report. `separate` is true when nothing is, and something was there.

    A field that one side lacks is not compared, and says so.
    """
    shared_media = train.media.keys() & validation.media.keys()
    # Sorted, because a set's order changes from process to process and the report's example should not.
    examples = [(train.media[x], validation.media[x]) for x in sorted(shared_media)]
    fields: dict[str, Json] = {}
    for name in names:
        ours, theirs = train.fields.get(name, {}), validation.fields.get(name, {})
        shared = sorted(ours.keys() & theirs.keys())
        values = {"training": len(ours), "validation": len(theirs)}
        # Not "0 shared": a field that is misspelled, or that one side never had, proves nothing.
        fields[name] = {**values, "shared": len(shared) if ours and theirs else "not comparable"}
        examples += [(ours[x], theirs[x]) for x in shared]
    report: dict[str, Json] = {
        "how": HOW,
        "training_samples": train.samples,
        "validation_samples": validation.samples,
        "media_hashed": {"training": len(train.media), "validation": len(validation.media)},
        "shared_media": len(shared_media),
        "fields": fields,
        "separate": not examples and train.samples > 0 and validation.samples > 0,
    }
    if examples:
        report["example"] = {"training": examples[0][0], "validation": examples[0][1]}
    return report
