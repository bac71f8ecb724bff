"""What differs between two checkpoints, in lines for people."""

from __future__ import annotations

from pathlib import Path

from megatron_gemini.checkpoint.extensions import read_checkpoint_config
from megatron_gemini.checkpoint.index import read_index
from megatron_gemini.checkpoint.run_state import read_progress
from megatron_gemini.checkpoint.weights import WeightReader, open_weights
from megatron_gemini.config.on_resume import changes

SHOWN = 10


def compare(before: Path, after: Path) -> list[str]:
    """Lines on settings, state, files beside the weights, and weights; none where all are the same."""
    lines = list[str]()
    refused, told = changes(read_checkpoint_config(before), read_checkpoint_config(after))
    for change in (*refused, *told):
        lines.append(f"setting {change.name}: {change.there} -> {change.here}")
    for name in ("step", "tokens", "optimizer_steps"):
        there, here = (getattr(read_progress(each), name) for each in (before, after))
        lines += [f"state {name}: {there:,} -> {here:,}"] if there != here else []
    return lines + _files(before, after) + _weights(open_weights(before), open_weights(after))


def _files(before: Path, after: Path) -> list[str]:
    """Of the files that both have beside the weights and the state, those whose content differs."""
    there, here = read_index(before).files, read_index(after).files
    own = ("rank-", "state.json", "config.yaml")
    lines = []
    for name in sorted(there.keys() | here.keys()):
        if not name.startswith(own) and there.get(name) != here.get(name):
            only = before if name not in here else after if name not in there else None
            lines.append(f"file {name}: " + (f"only in {only}" if only else "differs"))
    return lines


def _weights(before: WeightReader, after: WeightReader) -> list[str]:
    there, here = set(before.names()), set(after.names())
    lines = [f"weight {name}: only in the first" for name in sorted(there - here)]
    lines += [f"weight {name}: only in the second" for name in sorted(here - there)]
    moved = []
    for name in sorted(there & here):  # one at a time
        if before.shape(name) != after.shape(name):
            lines.append(f"weight {name}: {before.shape(name)} -> {after.shape(name)}")
            continue
        old, new = before.weight(name), after.weight(name)
        if not old.equal(new):
            largest, norm = float((new - old).abs().max()), float((new - old).norm() / old.norm().clamp(min=1e-30))
            moved.append((norm, f"weight {name}: moved by {norm:.2g} of its norm, at most {largest:.2g}"))
    moved.sort(reverse=True)
    more = [f"and {len(moved) - SHOWN} weights more have moved by less"] if len(moved) > SHOWN else []
    return lines + [line for _, line in moved[:SHOWN]] + more
