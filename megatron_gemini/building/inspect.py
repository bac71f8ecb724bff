"""What some shards hold, found by reading and decoding all of it, or an even sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from megatron_gemini.data.samples.decode_json import decode_json
from megatron_gemini.data.sources.columns import RECORD
from megatron_gemini.data.sources.shards import Shards
from megatron_gemini.data.sources.tar_index import index_tar
from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.registry import MODALITIES

if TYPE_CHECKING:
    from megatron_gemini.data.samples.decode_json import Json


@dataclass
class Contents:
    """samples: in the shards; read: of which decoded. kinds: how many samples have the same members.
    bad: members that cannot be decoded, and rejected ones, by reason, with the name of the first.
    sizes: width and height of images, characters of texts, seconds of audio. damage: by shard."""

    samples: int = 0
    read: int = 0
    bytes: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, list[float]] = field(default_factory=dict)
    damage: dict[str, str] = field(default_factory=dict)

    def refuse(self, reason: str, what: str, count: int = 1) -> None:
        self.bad[reason] += count
        self.first.setdefault(reason, what)


def inspect(paths: Sequence[str], at_most: int = 0) -> Contents:
    """Read shards. at_most: samples of a shard that are decoded, evenly spaced; 0 for all.

    A shard that cannot be used at all is one of the damaged ones, not an error.
    """
    found = Contents()
    for path in tqdm(paths, unit=" shards", disable=None):
        try:
            # Each by itself: together, one that cannot be used would be an error for all.
            shards = Shards([path])
        except ValueError as error:
            found.damage[path] = str(error)
            continue
        found.damage.update(shards.damage)
        for reason, count in shards.rejected.items():
            found.refuse(reason, path, count)
        found.bytes += sum(member.size for member in index_tar(path).members)
        found.samples += len(shards)
        wanted = min(at_most or len(shards), len(shards))
        for sample in np.unique(np.linspace(0, len(shards) - 1, wanted).round().astype(int)).tolist():
            endings, key = shards.endings(sample), shards.key(sample)
            found.read += 1
            found.kinds[" + ".join(sorted(endings))] += 1
            # Member by member, so that one that is damaged hides no other.
            for ending in endings:
                try:
                    data = shards.read(sample, [ending])[ending]
                    for name, value in _check(ending, data).items():
                        found.sizes.setdefault(name, []).append(value)
                except BadSample as error:
                    found.refuse(error.reason, f"{shards.path(sample)}: {key}.{ending}: {error}")
    return found


def _check(ending: str, data: bytes) -> Mapping[str, float]:
    """Decode a member by its ending. Sizes worth a plot; nothing of members that are of no known kind."""
    last = ending.rpartition(".")[2]
    if last == RECORD:
        decode_json(data)
        return {}
    sizes = next((spec.sizes for spec in MODALITIES.entries() if last in spec.members), None)
    return sizes(data) if sizes is not None else {}


def lines(found: Contents) -> list[str]:
    """The findings for a reader."""
    shown = [f"{found.samples:,} samples, {found.bytes:,} bytes; {found.read:,} read"]
    shown += [f"  {count:>10,}  {kind}" for kind, count in found.kinds.most_common(20)]
    for name, values in sorted(found.sizes.items()):
        low, middle, high = np.quantile(values, (0, 0.5, 1))
        shown.append(f"{name:<18}{low:>12,.6g} to {high:,.6g}, median {middle:,.6g}")
    shown += [f"damaged: {path}: {damage}" for path, damage in found.damage.items()]
    shown += [f"{reason:<22}{count:>8,}  {found.first[reason][:150]}" for reason, count in found.bad.most_common()]
    return [*shown, "nothing is damaged" if not (found.bad or found.damage) else "some of it is damaged"]


def plain(found: Contents) -> dict[str, Json]:
    """The findings as JSON: all but the single sizes."""
    return {
        "samples": found.samples,
        "read": found.read,
        "bytes": found.bytes,
        "kinds": dict(found.kinds),
        "bad": {reason: {"count": count, "first": found.first[reason]} for reason, count in found.bad.items()},
        "damage": found.damage,
    }
