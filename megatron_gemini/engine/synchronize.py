"""What all ranks agree on before a step: how much loss it has, whether to stop, and that all are about to run the same.

Ranks that disagree would wait for each other for ever, or train on nonsense. The one collective that starts every step
therefore carries a fingerprint of what each rank is about to do, and a difference ends all of them with the same
message.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_gemini.config.load import dump_config
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import Batch
from megatron_gemini.parallel.encoders.assignment import peers
from megatron_gemini.parallel.topology import Topology
from megatron_gemini.registry import ENCODERS

_WEIGHT, _STOP, _COUNTS, _PROBLEM, _STEP, _MICROBATCHES, _ROW_TOKENS, _ENCODERS, _CONFIG, _ROWS = range(10)
_SHOWN = {
    _STEP: "step {} to take",
    _MICROBATCHES: "{} microbatches",
    _ROW_TOKENS: "rows of {} tokens",
    _ENCODERS: "the encoders {}",
}
_TEXT = 1000  # bytes of a rank's problem that the others get to read


@dataclass(frozen=True)
class StepFingerprint:
    """What a rank is about to do.

    step: number of the update. microbatches: rows of this rank. row_tokens: of each; 0 if they are not all as long, or
    not rows. encoders: that run. rows: digest of the rows, the same on the ranks that share them. config: of the
    settings.
    """

    step: int
    microbatches: int
    row_tokens: int = 0
    encoders: tuple[str, ...] = ()
    rows: int = 0
    config: int = 0


def config_digest(config: RunConfig) -> int:
    """A number that differs for another configuration. Worth keeping: it takes milliseconds."""
    return zlib.crc32(dump_config(config).encode())


def step_fingerprint(step: int, batches: Sequence[Batch], config: RunConfig, digest: int) -> StepFingerprint:
    """The fingerprint of a step on packed rows. batches: with all their tensors on the CPU. digest: `config_digest`."""
    lengths = {len(batch.token_T) for batch in batches}
    tokens = lengths.pop() if len(lengths) == 1 else 0
    return StepFingerprint(step, len(batches), tokens, config.enabled_encoders, rows_digest(batches), digest)


def rows_digest(batches: Sequence[Batch]) -> int:
    """crc32 of tokens, weights, documents and sizes of media; not of pixels and sound, which come with them."""
    digest = 0
    for batch in batches:
        media = [tensor for each in batch.media.values() for tensor in (each.grid_I3, each.time_I, each.token_O)]
        columns = [batch.columns[name] for name in sorted(batch.columns)]
        for tensor in (batch.token_T, batch.target_T, batch.weight_T, batch.segment_T, batch.span_T, *columns, *media):
            digest = zlib.crc32(tensor.contiguous().numpy().data, digest)
    return digest


def shards_digest(sources: Sequence[tuple[str, int, Sequence[str]]]) -> int:
    """A number that differs for other shards or other samples in them; (label, samples, paths) of every source."""
    # Folders may have other names on other nodes.
    seen = [(label, samples, [os.path.basename(path) for path in paths]) for label, samples, paths in sources]
    return zlib.crc32(json.dumps(seen).encode())


def preflight(config: int, shards: int, topology: Topology, device: torch.device) -> None:
    """Raise the same ValueError on every rank if some have other settings (`config_digest`) or other shards."""
    # crc32 has 32 bits without a sign, which float32 would round and int32 not hold.
    every = _gather(torch.tensor([config, shards], dtype=torch.int64), topology, device)
    differences = []
    for column, what in enumerate(("another configuration", "other shards in data.sources")):
        ranks, _ = _minorities(every[:, column].tolist())
        differences += [f"{_name(numbers)}: {what} than {_others(ranks)}" for numbers in ranks.values()]
    if differences:
        raise ValueError(
            f"the ranks do not have the same job: {'; '.join(differences)}. Every rank needs the same configuration "
            "and must see the same files"
        )


def raise_together(problem: str, topology: Topology, device: torch.device) -> None:
    """Raise the same ValueError on every rank if some rank has a problem."""
    if _gather(torch.tensor([float(bool(problem))]), topology, device).any():
        raise ValueError(_problems(problem, topology, device))


def synchronize_step(
    weight: float, stop: int, fingerprint: StepFingerprint, topology: Topology, device: torch.device, problem: str = ""
) -> tuple[float, int]:
    """(sum of the loss weights of all rows, number of the signal to stop for or 0), the same on every rank.

    A sum of 0 is no error: the documents of one step may all be such that nothing of them is learned.

    weight: of this rank's rows, which its peers know too and which counts once. stop: what this rank was asked to stop
    for, or 0. problem: why this rank cannot take the step, if so.
    Raises the same ValueError on every rank if some rank has a problem, or not the fingerprint that it should have.
    """
    mine = torch.zeros(_ROWS + 1, dtype=torch.float64)  # float64 holds all of these exactly
    mine[_WEIGHT], mine[_STOP], mine[_COUNTS], mine[_PROBLEM] = weight, stop, topology.counts_row_once, bool(problem)
    mine[_STEP], mine[_MICROBATCHES], mine[_ROW_TOKENS] = (
        fingerprint.step,
        fingerprint.microbatches,
        fingerprint.row_tokens,
    )
    # A bit for each encoder of the registry. Sums of powers of two up to 2^52 are exact in float64.
    mine[_ENCODERS] = sum(1 << number for number, name in enumerate(ENCODERS) if name in fingerprint.encoders)
    mine[_CONFIG], mine[_ROWS] = fingerprint.config, fingerprint.rows
    every = _gather(mine, topology, device)
    if every[:, _PROBLEM].any():
        raise ValueError(_problems(problem, topology, device))
    # Behind the problems: a rank that could not read its rows has another fingerprint just for that.
    differences = _differences(every.long(), topology)
    if differences:
        raise ValueError(
            f"the ranks are not about to run the same step: {'; '.join(differences)}. Every rank needs the same "
            "configuration, the same data and the same checkpoint"
        )
    # A signal may have reached one rank alone, and all of them stop for it.
    total, stopped = float((every[:, _WEIGHT] * every[:, _COUNTS]).sum()), int(every[:, _STOP].max())
    return total, stopped


def _gather(mine: torch.Tensor, topology: Topology, device: torch.device) -> torch.Tensor:
    """[ranks, len(mine)] on the CPU."""
    if topology.world == 1:
        return mine[None]
    here = mine.to(device)
    every = here.new_empty(topology.world * len(mine))
    dist.all_gather_into_tensor(every, here)
    return every.view(topology.world, -1).cpu()


def _problems(problem: str, topology: Topology, device: torch.device) -> str:
    """What the ranks that have a problem say, each once."""
    # A gather wants as many bytes from every rank. The cut may go through a character: `ignore` drops its rest.
    text = problem.encode()[:_TEXT]
    mine = torch.zeros(_TEXT, dtype=torch.uint8)
    mine[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    ranks: dict[str, list[int]] = {}
    for rank, line in enumerate(_gather(mine, topology, device)):
        said = bytes(line.tolist()).rstrip(b"\0").decode(errors="ignore")
        if said:
            ranks.setdefault(said, []).append(rank)
    if len(ranks) == 1 and len(next(iter(ranks.values()))) == topology.world:
        return next(iter(ranks))  # everybody has it
    return "\n".join(f"{_name(numbers)}: {said}" for said, numbers in ranks.items())


def _differences(every: torch.Tensor, topology: Topology) -> list[str]:
    """What differs between ranks where it must not, in words that name them; every: int64 [ranks, fields]."""
    found = []
    for field, phrase in _SHOWN.items():
        ranks, usual = _minorities(every[:, field].tolist())
        for value, numbers in ranks.items():
            has = f"{_name(numbers)} {'has' if len(numbers) == 1 else 'have'}"
            found.append(f"{has} {phrase.format(_show(field, value))}, {_others(ranks)} {_show(field, usual)}")
    ranks, _ = _minorities(every[:, _CONFIG].tolist())
    found += [f"{_name(numbers)}: another configuration than {_others(ranks)}" for numbers in ranks.values()]
    for data_rank in range(topology.data_size):
        holders = peers(topology, data_rank)
        ranks, usual = _minorities(every[holders, _ROWS].tolist())
        for numbers in ranks.values():
            odd = [holders[number] for number in numbers]
            same = next(rank for rank in holders if int(every[rank, _ROWS]) == usual)
            found.append(
                f"{_name(odd)}: other rows than rank {same}, though both work on those of data rank {data_rank}"
            )
    return found


def _minorities(values: list[int]) -> tuple[dict[int, list[int]], int]:
    """(places of every value but the most frequent one, that one; of equally frequent ones the first)."""
    usual = Counter(values).most_common(1)[0][0]
    places: dict[int, list[int]] = {}
    for place, value in enumerate(values):
        if value != usual:
            places.setdefault(value, []).append(place)
    return places, usual


def _others(minorities: dict[int, list[int]]) -> str:
    return "all others" if len(minorities) == 1 else "most"


def _name(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _show(field: int, value: int) -> str:
    if field != _ENCODERS:
        return str(value)
    return ", ".join(name for number, name in enumerate(ENCODERS) if value >> number & 1) or "none"
