"""`init_from`: a new run begins with weights of other checkpoints of this project.

Every engine is filled before the first step, trained or frozen, in every layout of ranks. Each rank reads what it holds
a part of, one parameter at a time. Moments stay fresh. A run that goes on has weights of its own by then.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_gemini.checkpoint.directory import held
from megatron_gemini.checkpoint.extensions import FILE, Extensions
from megatron_gemini.checkpoint.fragments import describe
from megatron_gemini.checkpoint.index import file_hash
from megatron_gemini.checkpoint.names import NameMap, map_names
from megatron_gemini.checkpoint.pieces import cut
from megatron_gemini.checkpoint.weights import WeightReader, find_weights, open_weights, verify_weights
from megatron_gemini.config.init_from import WHOLE, InitFromConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine.engine import Engine
from megatron_gemini.engine.zero import ZeroEngine
from megatron_gemini.parallel.parameters import placement_of

SHOWN = 3
"""Names of one kind that a message has."""
VOCABULARY = ("decoder.embedding.weight", "decoder.head.weight")
"""Parameters with a row for every token, which mean nothing without the text model and the control tokens."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Source:
    """What one section of `init_from` gives. names: the checkpoint's by the model's."""

    reader: WeightReader
    names: Mapping[str, str]
    told_as: str


def initialize(engine: Engine) -> list[str]:
    """Fill the engine as its configuration's `init_from` says; collective. Returns a line about each section.

    Raises the same ValueError on every rank, before any weight is changed, for a checkpoint that is not there or is
    damaged. The same for one that does not fit, with names that are missing or unexpected, and shapes that differ.
    """
    sections = engine.config.init_from
    if not sections:
        return []
    model = _global_shapes(engine)
    sources, directories, problem = [], list[Path](), ""
    try:
        if engine.topology.rank == 0:  # once, and before any of them is read
            directories = [_find(section, number) for number, section in enumerate(sections)]
            for directory, number in {each: number for number, each in enumerate(directories)}.items():
                with _telling(f"init_from.{number}"):
                    verify_weights(directory)
    except ValueError as error:
        problem = str(error)
    _raise_first(engine, problem)
    # By one rank alone: a run that goes on there may give each rank another newest checkpoint.
    directories = engine.gather(directories)[0]
    with contextlib.ExitStack() as stack:
        try:
            for number, section in enumerate(sections):
                stack.enter_context(held(directories[number]))
                sources.append(_open(section, number, directories[number], model, engine.config))
        except ValueError as error:
            problem = str(error)
        _raise_first(engine, problem)
        for source in sources:
            _fill(engine, source)
    return [source.told_as for source in sources]


def _global_shapes(engine: Engine) -> Shapes:
    """Global shape by name of every parameter of the whole model, also of what other pipeline ranks hold."""
    mine: dict[str, tuple[int, ...]] = {}
    for part in (*engine.parts, *engine.frozen):
        if part.groups.data_rank == part.groups.model_rank == 0:  # once is enough, of thousands of ranks
            mine |= {name: tuple(placement_of(p).global_shape) for name, p in part.module.named_parameters()}
    whole: dict[str, tuple[int, ...]] = {}
    for theirs in engine.gather(mine):
        whole |= theirs
    return whole


def _raise_first(engine: Engine, problem: str) -> None:
    """Raise the same ValueError on every rank if some rank has a problem."""
    # Not `raise_together`, which sends a thousand bytes: names of parameters are long.
    problems = engine.gather(problem)
    for rank, said in enumerate(problems):
        if said:
            raise ValueError(said if rank == 0 else f"rank {rank}: {said}")


@contextlib.contextmanager
def _telling(setting: str) -> Iterator[None]:
    """Messages begin with the setting's name: a run has checkpoints of its own, and several of these."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error


def _find(section: InitFromConfig, number: int) -> Path:
    with _telling(f"init_from.{number}.checkpoint"):
        return find_weights(Path(section.checkpoint))


def _open(section: InitFromConfig, number: int, directory: Path, model: Shapes, config: RunConfig) -> _Source:
    """Raises ValueError where the checkpoint does not fit."""
    with _telling(f"init_from.{number} ({directory})"):
        reader = open_weights(directory)
        found = map_names(section, list(model), reader.names())
        _check(found, model, reader)
        if any(name in found.sources for name in VOCABULARY):
            _check_vocabulary(directory, Path(config.data.text_model))
    elements = sum(math.prod(model[name]) for name in found.sources)
    what = "the model" if section.module == WHOLE else section.module
    return _Source(reader, found.sources, f"initialized {what} ({elements:,} parameters) from {directory}")


def _check(found: NameMap, model: Shapes, reader: WeightReader) -> None:
    """Raise ValueError with the first names that are missing, unexpected or of another shape."""
    other = []
    for ours, theirs in found.sources.items():
        if model[ours] != reader.shape(theirs):
            rows = model[ours][1:] == reader.shape(theirs)[1:] and ours in VOCABULARY
            why = ": the text model, or the number of codes, is another one" if rows else ""
            other.append(f"{theirs} is {reader.shape(theirs)} there and {model[ours]} here{why}")
    wrong = [
        _listed("the checkpoint lacks", found.missing, "name in allow_missing what may keep its initial values"),
        _listed("the model has no place for", found.unexpected, "rename it, or name it in ignore"),
        _listed("other shapes:", other, "use the settings that the module was trained with"),
    ]
    if any(wrong):
        raise ValueError("; ".join(filter(None, wrong)))


def _listed(what: str, names: list[str], way_out: str) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{what} {', '.join(names[:SHOWN])}{more} ({way_out})" if names else ""


def _check_vocabulary(directory: Path, text_model: Path) -> None:
    """Raise ValueError where rows of the checkpoint's vocabulary stand for other tokens than they would here."""
    theirs = directory / "text.model"
    # Two text models of the same size have the same shapes, and every row would be another piece's.
    if theirs.is_file() and text_model.is_file() and file_hash(theirs) != file_hash(text_model):
        raise ValueError(f"its vocabulary is not that of data.text_model {text_model}; set it to {theirs}")
    if (directory / FILE).is_file():
        Extensions.read(directory).check_tokens(directory)


@torch.no_grad()
def _fill(engine: Engine, source: _Source) -> None:
    """Every piece that this rank has of what the source gives, and what the forward reads of it."""
    for part in (*engine.parts, *engine.frozen):
        for fragment in part.fragments:
            if fragment.count and fragment.name in source.names:
                whole = source.reader.weight(source.names[fragment.name])
                fragment.master().copy_(cut(whole, describe(fragment)))
        if isinstance(part, ZeroEngine):  # the forward reads other memory than the optimizer's masters
            part.wrapper.publish_masters()
            part.wrapper.put_back()
