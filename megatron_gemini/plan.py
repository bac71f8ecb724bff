"""Entry point of planning: `megatron-gemini plan --config run.yaml --gpus 64 --gpu_memory 80GB --host_memory 1TB`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_gemini.cli import end, run_command
from megatron_gemini.config.load import load_config
from megatron_gemini.config.run import RunConfig
from megatron_gemini.contracts import TokenLayout
from megatron_gemini.generation.options import OptionParser
from megatron_gemini.modalities.code_ranges import code_ranges
from megatron_gemini.models.presets import TEXT_PIECES, preset
from megatron_gemini.planning.files import check_path, write_plan
from megatron_gemini.planning.hardware import GPUS
from megatron_gemini.planning.report import report, shortage
from megatron_gemini.planning.search import Machine, search
from megatron_gemini.planning.sizes import parse_size
from megatron_gemini.registry import OBJECTIVES

_DESCRIPTION = """Which layout of ranks a training run should have on machines that are not there yet.

Lists the legal layouts with the bytes of a GPU and a host, what is sent, and an estimate of the time, best first, and
writes the chosen one for `megatron-gemini train --config`. Settings of the run are given as to train: --config,
--preset, --section.field value.

  megatron-gemini plan --config run.yaml --gpus 64 --gpu_memory 80GB --host_memory 1TB --out plan.yaml
  megatron-gemini plan --config plan.yaml --dry_run_rank 517 --world 1024
"""


def main(argv: list[str]) -> int:
    """Plan, or build one rank's part of a job. Returns the exit status."""
    options, settings = _parser().parse_known_args(argv)
    config = load_config(settings, presets=preset, prog="megatron-gemini plan")
    objective = OBJECTIVES.get(config.objective.kind)
    # Its layouts differ in nothing but the number of ranks.
    if objective.data_parallel_only:
        raise ValueError(
            f"objective.kind is {objective.name}, whose model is small and data parallel only; plan is of larger ones"
        )
    layout = token_layout(config, options.text_pieces)
    if options.dry_run_rank is not None or options.world is not None:
        return _dry_run(config, layout, options)
    return _plan(config, layout, options)


def token_layout(config: RunConfig, text_pieces: int | None) -> TokenLayout:
    """The vocabulary, from the number of text pieces that is given, else the text model's, else the presets'."""
    if text_pieces is None and Path(config.data.text_model).is_file():
        # Here, so that a plan for a text model that does not exist yet needs no SentencePiece.
        from megatron_gemini.modalities.text.tokenizer import TextTokenizer

        text_pieces = TextTokenizer(config.data.text_model).size
    return TokenLayout(TEXT_PIECES if text_pieces is None else text_pieces, code_ranges(config))


def _plan(config: RunConfig, layout: TokenLayout, options: argparse.Namespace) -> int:
    # All that can be wrong in the options is told before the search, which takes seconds for large jobs.
    out = Path(options.out) if options.out else None
    if out:
        check_path(out)
    for name in ("gpus", "gpus_per_node", "top"):
        if getattr(options, name) is None or getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be 1 or more")
    machine = Machine(
        GPUS[options.gpu],
        parse_size(options.gpu_memory, "--gpu_memory"),
        parse_size(options.host_memory, "--host_memory"),
        options.gpus_per_node,
    )
    plans = search(config, options.gpus, layout.size, machine)
    if options.text_pieces is None and not Path(config.data.text_model).is_file():
        print(f"data.text_model does not exist here: {layout.text_size:,} text pieces assumed (--text_pieces)")
    print(report(plans, options.top))
    # The table stands before the error, so that it shows how much is missing.
    best = plans[0]
    if not best.fits:
        raise ValueError(f"no layout fits; the nearest {shortage(best)}: take more GPUs or hosts, or a smaller model")
    if out:
        print("\nwrote " + " and ".join(map(str, write_plan(best, out))))
    return 0


def _dry_run(config: RunConfig, layout: TokenLayout, options: argparse.Namespace) -> int:
    if options.dry_run_rank is None or options.world is None:
        raise ValueError("--dry_run_rank and --world belong together: which rank, of how many")
    from megatron_gemini.config.layout import check_layout

    if not 0 <= options.dry_run_rank < options.world:
        raise ValueError(
            f"--dry_run_rank is {options.dry_run_rank}; a world of {options.world} has 0 to {options.world - 1}"
        )
    check_layout(config, options.world)

    from megatron_gemini.planning.dry_run import dry_run  # imports torch and megatron-core, which takes seconds
    from megatron_gemini.training.quiet import quiet_warnings

    quiet_warnings()

    print(dry_run(config, layout, options.dry_run_rank, options.world))
    return 0


def _parser() -> OptionParser:
    parser = OptionParser("megatron-gemini plan", _DESCRIPTION)
    machine = parser.add_argument_group("the machines")
    machine.add_argument("--gpus", type=int, metavar="N", help="GPUs of the job, all of them")
    machine.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="their kind (default: h100)")
    _size(machine, "gpu_memory", "80GB", "memory of one")
    _count(machine, "gpus_per_node", "N", "GPUs of a host (default: 8)", 8)
    _size(machine, "host_memory", "1TB", "memory of a host")
    result = parser.add_argument_group("the result")
    written = "write the best layout here, and DeepSpeed's JSON beside it"
    result.add_argument("--out", metavar="FILE.yaml", help=written)
    result.add_argument("--top", type=int, default=12, metavar="N", help="layouts to show (default: 12)")
    _count(result, "text_pieces", "N", "size of the text model, where data.text_model does not exist yet")
    dry = parser.add_argument_group("a dry run: one rank's part of a job is built on this machine, without memory")
    _count(dry, "dry_run_rank", "R", "which rank")
    dry.add_argument("--world", type=int, metavar="N", help="of how many")
    return parser


# Options of several words may be written with - or _, like every setting.


def _count(group: argparse._ArgumentGroup, name: str, metavar: str, what: str, default: int | None = None) -> None:
    group.add_argument(
        f"--{name}", f"--{name.replace('_', '-')}", type=int, default=default, metavar=metavar, help=what
    )


def _size(group: argparse._ArgumentGroup, name: str, default: str, what: str) -> None:
    shown = f"{what} (default: {default})"
    group.add_argument(f"--{name}", f"--{name.replace('_', '-')}", default=default, metavar="SIZE", help=shown)


if __name__ == "__main__":
    end(run_command(main, sys.argv[1:]))
