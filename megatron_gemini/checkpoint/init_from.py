"""`init_from`: a new run, and every role of it, begins with weights of other checkpoints of this project.

Every engine is filled before the first step, trained or frozen, in every layout of ranks. Each rank reads what it holds
a part of, one parameter at a time. Moments stay fresh. A run that goes on has weights of its own by then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_gemini.checkpoint.directory import held
from megatron_gemini.checkpoint.extensions import FILE, Extensions
from megatron_gemini.checkpoint.fragments import describe
from megatron_gemini.checkpoint.index import INDEX, file_hash
from megatron_gemini.checkpoint.names import NameMap, map_names
from megatron_gemini.checkpoint.piece import cut
from megatron_gemini.checkpoint.weights import WEIGHTS, WeightReader, find_weights, open_weights, verify_weights
from megatron_gemini.config.init_from import WHOLE, InitFromConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.engine.engine import Engine
from megatron_gemini.engine.module_engine import ModuleEngine
from megatron_gemini.engine.zero import ZeroEngine
from megatron_gemini.parallel.parameters import placement_of

SHOWN = 3
"""Names of one kind that a message has."""
VOCABULARY = ("decoder.embedding.weight", "decoder.head.weight")
"""Parameters with a row for every token, which mean nothing without the text model and the control tokens."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Model:
    """One of an engine's models. role: its name, "" for the policy. shapes: global ones, of all its parameters."""

    role: str
    sections: tuple[InitFromConfig, ...]
    parts: Sequence[ModuleEngine]
    shapes: Shapes

    def setting(self, number: int) -> str:
        """What messages call a section."""
        return f"role {self.role}, init_from.{number}" if self.role else f"init_from.{number}"


@dataclass(frozen=True)
class _Source:
    """What one section of `init_from` gives. names: the checkpoint's by the model's."""

    model: _Model
    section: InitFromConfig
    directory: Path
    reader: WeightReader
    names: Mapping[str, str]

    def told_as(self) -> str:
        of_role = f"the role {self.model.role}" if self.model.role else ""
        what = (of_role or "the model") if self.section.module == WHOLE else self.section.module
        what += f" of {of_role}" if of_role and what != of_role else ""
        elements = sum(math.prod(self.model.shapes[name]) for name in self.names)
        return f"initialized {what} ({elements:,} parameters) from {self.directory}"

    def origin(self) -> str:
        """What tells these weights, and how they are taken, from any other; a copy elsewhere counts as the same."""
        # A checkpoint's index holds the hashes of all its files.
        name = WEIGHTS if (self.directory / WEIGHTS).is_file() else INDEX
        plain = InitFromConfig(self.section.checkpoint)
        given = {f.name: getattr(self.section, f.name) for f in dataclasses.fields(plain)}
        other = [f"{key} {value!r}" for key, value in given.items() if value != getattr(plain, key)]
        by = f" (by {', '.join(other)})" if other else ""
        return f"a checkpoint whose {name} has the SHA-256 {file_hash(self.directory / name)}{by}"


def initialize(engine: Engine) -> list[str]:
    """Fill the engine as its configuration's `init_from` says, and its roles as theirs; collective.

    Returns a line about each section. Raises the same ValueError on every rank, before any weight is changed, for a
    checkpoint that is not there or is damaged. The same for one that does not fit, with names that are missing or
    unexpected, and shapes that differ.
    """
    return _initialize(engine, _models(engine))


def initialize_roles(engine: Engine) -> list[str]:
    """Of an engine that is loaded: make the roles that checkpoints leave out as they were when the run began.

    Returns and raises as `initialize`.
    """
    absent = {name for name, role in engine.roles.items() if not role.in_checkpoints}
    return _initialize(engine, [model for model in _models(engine) if model.role in absent])


def _models(engine: Engine) -> list[_Model]:
    """Those that begin as another checkpoint's; collective."""
    given: list[tuple[str, tuple[InitFromConfig, ...], Sequence[ModuleEngine]]] = [
        ("", engine.config.init_from, [*engine.parts, *engine.frozen]),
        *((name, role.spec.init_from, role.engines) for name, role in engine.roles.items()),
    ]
    return [_Model(role, s, parts, _global_shapes(engine, parts)) for role, s, parts in given if s]


def _initialize(engine: Engine, models: Sequence[_Model]) -> list[str]:
    wanted = [(model, number) for model in models for number in range(len(model.sections))]
    if not wanted:
        return []
    sources, directories, problem = list[_Source](), list[Path](), ""
    try:
        if engine.topology.rank == 0:  # once, and before any of them is read
            directories = [_find(model, number) for model, number in wanted]
            for directory, (model, number) in dict(zip(directories, wanted, strict=True)).items():
                with _telling(model.setting(number)):
                    verify_weights(directory)
    except ValueError as error:
        problem = str(error)
    _raise_first(engine, problem)
    # By one rank alone: a run that goes on there may give each rank another newest checkpoint.
    directories = engine.gather(directories)[0]
    with contextlib.ExitStack() as stack:
        try:
            for directory, (model, number) in zip(directories, wanted, strict=True):
                stack.enter_context(held(directory))
                sources.append(_open(model, number, directory, engine.config))
        except ValueError as error:
            problem = str(error)
        _raise_first(engine, problem)
        for source in sources:
            _fill(source)
        for model in models:
            if model.role:
                engine.roles[model.role].origin = _origin(engine, [each for each in sources if each.model is model])
    return [source.told_as() for source in sources]


def _origin(engine: Engine, sources: Sequence[_Source]) -> str:
    """Of a role, the same on every rank."""
    model, found = sources[0].model, list[str]()
    if engine.topology.rank == 0:  # a file's hash reads all of it
        if model.shapes.keys() - {name for source in sources for name in source.names}:
            found.append(f"the initial values of seed {engine.config.train.seed}")
        found += [source.origin() for source in sources]
    return ", and over them ".join(engine.gather(found)[0])


def _global_shapes(engine: Engine, parts: Sequence[ModuleEngine]) -> Shapes:
    """Global shape by name of every parameter of a whole model, also of what other pipeline ranks hold."""
    mine: dict[str, tuple[int, ...]] = {}
    for part in parts:
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


def _find(model: _Model, number: int) -> Path:
    with _telling(f"{model.setting(number)}.checkpoint"):
        return find_weights(Path(model.sections[number].checkpoint))


def _open(model: _Model, number: int, directory: Path, config: RunConfig) -> _Source:
    """Raises ValueError where the checkpoint does not fit."""
    with _telling(f"{model.setting(number)} ({directory})"):
        reader, section = open_weights(directory), model.sections[number]
        found = map_names(section, list(model.shapes), reader.names())
        _check(found, model.shapes, reader)
        if any(name in found.sources for name in VOCABULARY):
            _check_vocabulary(directory, Path(config.data.text_model))
    return _Source(model, section, directory, reader, found.sources)


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
def _fill(source: _Source) -> None:
    """Every piece that this rank has of what the source gives, and what the forward reads of it."""
    for part in source.model.parts:
        for fragment in part.fragments:
            if fragment.count and fragment.name in source.names:
                whole = source.reader.weight(source.names[fragment.name])
                fragment.master().copy_(cut(whole, describe(fragment)))
        if isinstance(part, ZeroEngine):  # the forward reads other memory than the optimizer's masters
            part.wrapper.publish_masters()
            part.wrapper.put_back()
