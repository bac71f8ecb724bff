"""Which layouts of ranks a run can have: the rules, each with its reason, and the layouts nearest to an illegal one.

Read before any process group exists, by training and by the planner, which enumerates with `layouts`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from megatron_gemini.config.check import divides
from megatron_gemini.config.engine import ParallelConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.registry import OBJECTIVES

VIRTUAL_STAGES = (1, 2, 4, 8)
"""Stages a pipeline rank that are worth a look: more shrink the bubble less than they cost in transfers."""
SHOWN = 3


def check_layout(config: RunConfig, world: int) -> None:
    """Raise a `ValueError` if `config` cannot run on `world` ranks, with the reason and the nearest that can."""
    reason = why_not(config, world)
    if reason is None:
        return
    # As options behind the same command: what is offered can be pasted, and a test does so.
    near = "; ".join(_as_options(config, found, world) for found in nearest_layouts(config, world)[:SHOWN])
    raise ValueError(f"{reason}; nearest that {world} ranks can run: {near or 'none, whatever the layout'}")


def why_not(config: RunConfig, world: int) -> str | None:
    """Why `config` cannot run on `world` ranks, and None if it can."""
    try:
        _check_model(config)
        _check_world(config, world)
        _check_tokens(config)
        _check_pipeline(config, world)
    except ValueError as error:
        return str(error)
    return None


def data_size(config: RunConfig, world: int) -> int:
    """Data-parallel ranks of a legal layout."""
    parallel = config.parallel
    return world // (parallel.tensor * parallel.context * parallel.pipeline)


def layouts(config: RunConfig, world: int) -> Iterator[RunConfig]:
    """`config` with every legal `parallel` section on `world` ranks; all else stays."""
    # By the divisors of the world, level by level: all products of sizes up to 1,024 ranks would be a billion.
    sizes = [size for size in range(1, world + 1) if world % size == 0]
    for tensor in sizes:
        for context in (size for size in sizes if world % (tensor * size) == 0):
            for pipeline in (size for size in sizes if world % (tensor * context * size) == 0):
                for parallel in _variants(config, tensor, context, pipeline):
                    found = dataclasses.replace(config, parallel=parallel)
                    if why_not(found, world) is None:
                        yield found


def nearest_layouts(config: RunConfig, world: int) -> list[RunConfig]:
    """Legal configurations on `world` ranks, those first that change least of `config`'s parallel section."""
    return sorted(layouts(config, world), key=lambda other: _distance(config, other))


def _variants(config: RunConfig, tensor: int, context: int, pipeline: int) -> Iterator[ParallelConfig]:
    virtual = {*VIRTUAL_STAGES, config.parallel.virtual_stages} if pipeline > 1 else {1}
    for stages in sorted(v for v in virtual if v * pipeline <= config.model.layers):
        for schedule in ("interleaved" if stages > 1 else "1f1b", "breadth_first"):
            if pipeline == 1 and schedule == "breadth_first" != config.parallel.schedule:
                continue  # without a pipeline the schedule changes nothing
            # Both ways: sequence parallelism saves activations, and sends a gather more in the backward of each branch.
            for sequence in (False, True) if tensor > 1 else (False,):
                yield ParallelConfig(tensor, sequence, context, pipeline, stages, schedule)  # type: ignore[arg-type]


def _check_model(config: RunConfig) -> None:
    tensor, model = config.parallel.tensor, config.model
    # Key/value heads need not divide: a rank may hold them all, which multi-query attention's single one makes cheap.
    for name in ("heads", "mlp_width"):
        value = getattr(model, name)
        if value % tensor:
            raise ValueError(f"parallel.tensor is {tensor}, which does not divide model.{name} ({value})")
    # Where ranks are more than key heads, several share one: each of them then needs heads that read the same one.
    if tensor > 1 and model.kv_heads > 1 and model.kv_heads % tensor and tensor % model.kv_heads:
        raise ValueError(
            f"parallel.tensor is {tensor} and model.kv_heads is {model.kv_heads}; one must divide the other"
        )


def _check_world(config: RunConfig, world: int) -> None:
    parallel, objective = config.parallel, OBJECTIVES.get(config.objective.kind)
    ranks = parallel.tensor * parallel.context * parallel.pipeline
    if objective.data_parallel_only and ranks > 1:
        name = next(name for name in ("tensor", "context", "pipeline") if getattr(parallel, name) > 1)
        raise ValueError(
            f"parallel.{name} is {getattr(parallel, name)}; the model of the objective {objective.name} is small and "
            "trained data parallel only"
        )
    if world % ranks:
        raise ValueError(
            f"parallel.tensor x context x pipeline is {ranks}, which does not divide the {world} ranks of this job; "
            f"start a multiple of {ranks} ranks or lower one of them"
        )
    # Every data-parallel rank takes as many microbatches: a pipeline's ranks wait for each other in each of them.
    size = world // ranks
    who = f"{size} data-parallel ranks"
    name, count = objective.per_step(config)
    divides(size, count, who, name)
    if objective.rows is not None and config.train.validation_every and config.data.validation:
        divides(size, config.train.validation_rows, who, "train.validation_rows")


def _check_tokens(config: RunConfig) -> None:
    parallel, tokens = config.parallel, config.data.row_tokens
    if parallel.sequence and parallel.tensor == 1:
        raise ValueError(
            "parallel.sequence divides the tokens over the tensor-parallel ranks, but parallel.tensor is 1; "
            "set parallel.sequence to false or raise parallel.tensor"
        )
    if parallel.context > 1:
        # Rank c of n has the chunks c and 2n - 1 - c: causal attention is then as much work for every rank.
        chunks = 2 * parallel.context
        divides(chunks, tokens, f"2 x parallel.context ({chunks} chunks)", "data.row_tokens")
    if parallel.sequence:
        # The ranks scatter and gather tensors of one size, so that each has as many tokens.
        parts, name = parallel.tensor, "parallel.tensor"
        if parallel.context > 1:
            parts, name = parts * 2 * parallel.context, "parallel.tensor x 2 x parallel.context"
        divides(parts, tokens, name, "data.row_tokens")


def _check_pipeline(config: RunConfig, world: int) -> None:
    parallel, layers = config.parallel, config.model.layers
    pipeline, virtual = parallel.pipeline, parallel.virtual_stages
    if virtual > 1 and pipeline == 1:
        raise ValueError(
            f"parallel.virtual_stages is {virtual}, but parallel.pipeline is 1; a stage is cut further to shrink the "
            "bubble of a pipeline, and there is none"
        )
    if pipeline * virtual > layers:
        raise ValueError(
            f"parallel.pipeline x virtual_stages is {pipeline * virtual}, but model.layers is {layers}; "
            "every stage needs a layer"
        )
    _check_schedule(config, world)


def _check_schedule(config: RunConfig, world: int) -> None:
    parallel = config.parallel
    pipeline, virtual, schedule = parallel.pipeline, parallel.virtual_stages, parallel.schedule
    if schedule == "1f1b" and virtual > 1:
        raise ValueError(
            f"parallel.schedule 1f1b has one stage a rank, but parallel.virtual_stages is {virtual}; "
            "use interleaved or breadth_first"
        )
    if schedule == "interleaved" and virtual == 1:
        raise ValueError(
            "parallel.schedule interleaved needs parallel.virtual_stages of 2 or more, not 1; use 1f1b or raise them"
        )
    if pipeline == 1 or schedule == "breadth_first":
        return  # breadth-first takes any number of rows: a stage has done with all before the next begins
    microbatches = config.train.rows_per_step // data_size(config, world)
    if schedule == "interleaved" and microbatches % pipeline:
        raise ValueError(
            f"parallel.schedule interleaved wants microbatches in multiples of parallel.pipeline ({pipeline}), but a "
            f"data-parallel rank has {microbatches} rows of train.rows_per_step ({config.train.rows_per_step})"
        )
    if microbatches < pipeline:
        raise ValueError(
            f"parallel.schedule 1f1b keeps a row in each of the {pipeline} stages, but a data-parallel rank has "
            f"{microbatches} rows of train.rows_per_step ({config.train.rows_per_step}); raise it or use breadth_first"
        )


_AXES = ("tensor", "context", "pipeline", "virtual_stages")


def _changes(config: RunConfig, other: RunConfig) -> dict[str, object]:
    """Settings of `other`'s parallel section that differ."""
    names = (*_AXES, "sequence", "schedule")
    return {n: new for n in names if (new := getattr(other.parallel, n)) != getattr(config.parallel, n)}


def _distance(config: RunConfig, other: RunConfig) -> tuple[bool, int, float, int, int]:
    """Another number of ranks a row, then settings to change, then how far the sizes move; ties to the simpler axis."""
    pairs = [(getattr(config.parallel, name), getattr(other.parallel, name)) for name in _AXES]
    moved = sum(abs(math.log2(ours / theirs)) for ours, theirs in pairs)
    # How many ranks share a row decides how many data-parallel ranks there are: another number changes most.
    product = math.prod(ours for ours, _ in pairs[:3]) != math.prod(theirs for _, theirs in pairs[:3])
    return product, len(_changes(config, other)), moved, other.parallel.context, other.parallel.pipeline


def _as_options(config: RunConfig, other: RunConfig, world: int) -> str:
    words = [
        f"--parallel.no_{name}" if value is False else f"--parallel.{name}" + ("" if value is True else f" {value}")
        for name, value in _changes(config, other).items()
    ]
    return f"{' '.join(words)} ({data_size(other, world)} data parallel)"
