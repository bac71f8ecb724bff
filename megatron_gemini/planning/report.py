"""A search's result as text: the layouts in a table, what the best one needs, and why it is the best."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_gemini.config.engine import ParallelConfig
from megatron_gemini.planning.footprint import PARTS
from megatron_gemini.planning.memory import USABLE, longest_item
from megatron_gemini.planning.parameters import stages
from megatron_gemini.planning.search import ZERO3_PIPELINE, LayoutPlan, alternatives
from megatron_gemini.planning.sizes import show_size

_HEADER = (
    *("tp", "sp", "cp", "pp", "stages", "schedule", "dp", "rows", "zero", "offload", "recompute"),
    *("GPU", "host", "bubble", "sent", "MFU", "rows/s", ""),
)
_NOTE = (
    "rows: microbatches of a data-parallel rank. zero: stage of the decoder / of the encoders, where it is another.\n"
    "GPU and host: bytes of the fullest one. sent: by a GPU in a step.\n"
    "MFU and rows/s are estimates that rank layouts; the encoders' arithmetic is not in them. Before ZeRO-3 in a\n"
    f"pipeline stands what is at most {ZERO3_PIPELINE - 1:.0%} slower without."
)


def report(plans: Sequence[LayoutPlan], shown: int) -> str:
    """The table, its best line in detail, and the lines that do not fit but nearly do; best first."""
    fitting = [plan for plan in plans if plan.fits]
    rest = [plan for plan in plans if not plan.fits]
    pieces = [_machine(plans[0])]
    if fitting:
        pieces += [_table(fitting[:shown]) + _more(len(fitting) - shown), _NOTE, _best(fitting[0])]
    if rest:
        count = shown if not fitting else min(shown, 5)
        title = f"{len(rest)} of {len(plans)} layouts do not fit, whatever the ZeRO stage, offload and recomputation:"
        pieces.append(f"{title}\n{_table(rest[:count])}{_more(len(rest) - count)}")
    return "\n\n".join(pieces)


def shortage(plan: LayoutPlan) -> str:
    """By how much a plan does not fit."""
    lacks = []
    if plan.lacks_gpu:
        lacks.append(f"lacks {show_size(plan.lacks_gpu)} a GPU")
    if plan.lacks_host:
        lacks.append(f"lacks {show_size(plan.lacks_host)} a host")
    return ", ".join(lacks)


def layout_options(plan: LayoutPlan) -> str:
    """A plan's choices as options of the command line."""
    config = plan.job.config
    chosen = [("parallel", field.name) for field in dataclasses.fields(config.parallel)]
    chosen += [("engine", n) for n in ("zero_stage", "offload_optimizer", "offload_parameters", "recompute")]
    chosen += [("encoder_engines", "zero_stage")] if config.encoder_engines.zero_stage >= 0 else []
    words = []
    for section, name in chosen:
        value = getattr(getattr(config, section), name)  # of several types, each written as its option wants it
        words.append(f"--{section}.{name}" if value is True else f"--{section}.{name} {value}")
    return " ".join(word for word in words if not word.endswith("sequence False"))


def _machine(plan: LayoutPlan) -> str:
    job, machine = plan.job, plan.machine
    undivided = dataclasses.replace(job.config, parallel=ParallelConfig())
    decoder = sum(stage.parameters for stage in stages(undivided, job.vocabulary))
    encoders = sum(job.trained) + sum(job.frozen) + job.frozen_connectors
    once = dataclasses.replace(job, config=undivided, world=1)
    beside = [(role.size.name, sum(stage.parameters for stage in role.stages)) for role in once.roles_of(0)]
    roles = "".join(f", {name} {parameters / 1e9:.3f} B" for name, parameters in beside)
    return (
        f"{job.world} {machine.gpu.name} of {show_size(machine.gpu_memory)} ({USABLE:.0%} of it usable), "
        f"{machine.gpus_per_node} a host of {show_size(machine.host_memory)}\n"
        f"decoder {decoder / 1e9:.3f} B parameters with a vocabulary of {job.vocabulary:,}, encoders "
        f"{encoders / 1e9:.3f} B{roles}; "
        f"{job.config.train.rows_per_step} rows of {job.config.data.row_tokens:,} tokens a step"
    )


def _table(plans: Sequence[LayoutPlan]) -> str:
    rows = [_HEADER, *map(_row, plans)]
    # Right-aligned, so that the eye finds the orders of magnitude.
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    return "\n".join("  ".join(map(str.rjust, row, widths)).rstrip() for row in rows)


def _row(plan: LayoutPlan) -> tuple[str, ...]:
    config, job = plan.job.config, plan.job
    parallel, engine = config.parallel, config.engine
    decoder, encoders = job.zero.stage, job.encoder_engines_zero.stage
    offload = [
        name
        for name, where in (("opt", engine.offload_optimizer), ("par", engine.offload_parameters))
        if where != "none"
    ]
    return (
        str(parallel.tensor),
        "yes" if parallel.sequence else "-",
        str(parallel.context),
        str(parallel.pipeline),
        str(parallel.virtual_stages),
        parallel.schedule if parallel.pipeline > 1 else "-",
        str(job.data),
        str(job.microbatches),
        str(decoder) if decoder == encoders else f"{decoder}/{encoders}",
        "+".join(offload) or "-",
        engine.recompute,
        show_size(plan.footprint.gpu.total),
        show_size(plan.host),
        f"{plan.time.bubble_share:.1%}",
        show_size(plan.sent),
        f"{plan.mfu:.1%}",
        f"{plan.rows_per_second:.2f}",
        shortage(plan),
    )


def _more(count: int) -> str:
    return f"\n... and {count} more (--top shows more)" if count > 0 else ""


def _best(plan: LayoutPlan) -> str:
    machine, job = plan.machine, plan.job
    gpu, host, time = plan.footprint.gpu, plan.footprint.host, plan.time
    causes = sorted(time.causes().items(), key=lambda cause: -cause[1])
    told = ", ".join(f"{name} {seconds / time.total:.0%}" for name, seconds in causes if seconds > 0.005 * time.total)
    fullest = max(PARTS, key=lambda part: getattr(gpu, part))
    where = f" on pipeline rank {plan.worst}" if job.config.parallel.pipeline > 1 else ""
    lines = [
        f"best: {layout_options(plan)}",
        f"  a GPU{where}: {gpu}; {show_size(USABLE * machine.gpu_memory - gpu.total)} to spare",
        f"  a rank's share of its host: {host}",
        f"  a step of {time.total:.3g} s: {told}",
        f"  what binds: {causes[0][0]} takes most of the time, {fullest} most of the GPU",
        *(f"  {line}" for line in _reasons(plan)),
        *_warning(plan),
    ]
    return "\n".join(lines)


def _warning(plan: LayoutPlan) -> list[str]:
    """Where the longest item that the configuration allows would not fit beside what is there during its backward."""
    encoder, inputs, kept = longest_item(plan.job.config)
    gpu, usable = plan.footprint.gpu, USABLE * plan.machine.gpu_memory
    if gpu.total - gpu.activations + kept <= usable:
        return []
    return [
        f"  mind: an item of {inputs:,} inputs, which the limits of encoders.{encoder} allow, would keep "
        f"{show_size(kept)} in its encoder alone; lower them if the data have such items"
    ]


def _reasons(plan: LayoutPlan) -> list[str]:
    """What the same layout would need and take with one choice made the other way."""
    reasons = []
    for change, other in alternatives(plan):
        slower = other.time.total / plan.time.total - 1
        if abs(slower) < 0.0005:
            verdict = "as fast, and less simple"
        elif slower > 0:
            verdict = f"{slower:.1%} slower"
        else:  # the only choice that the search makes against its own estimate
            verdict = f"{-slower:.1%} faster, but ZeRO-3 in a pipeline"
        reasons.append(f"with {change}: {shortage(other) or verdict}")
    return reasons
