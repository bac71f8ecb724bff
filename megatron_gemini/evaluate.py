"""Entry point of evaluation: `megatron-gemini evaluate --checkpoint DIR`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_gemini.checkpoint.directory import is_complete
from megatron_gemini.cli import end, run_command
from megatron_gemini.config.data import SourceConfig
from megatron_gemini.generation.options import OptionParser
from megatron_gemini.generation.settings import SampleSettings
from megatron_gemini.registry import METRICS, TASKS

if TYPE_CHECKING:
    from megatron_gemini.checkpoint.inference import Loaded
    from megatron_gemini.evaluation.json_data import Json
    from megatron_gemini.evaluation.report import EvaluationSettings, Results

SAMPLING = ("temperature", "top_k", "top_p", "seed", "guidance")
_DESCRIPTION = """Score a trained model on validation data, and draw a sheet of samples.

The data is that of the model's own configuration (data.sources, data.validation; paths are relative to the working
directory), unless --validation names other shards. Written are the figures (--out), and beside them samples.png and,
for a run directory, loss.png.

  megatron-gemini evaluate --checkpoint runs/quickstart
  megatron-gemini evaluate --checkpoint runs/quickstart --validation caption=data/test-*.tar --out report.json
"""


@dataclass
class Evaluation:
    """What an evaluation found out, and where it is to be written. report: plain data, results' figures included."""

    loaded: Loaded
    results: Results
    report: dict[str, Json]
    out: Path


def main(argv: list[str]) -> int:
    """Parse, load, evaluate, write. Returns the exit status."""
    write(evaluate_command(argv))
    return 0


def evaluate_command(argv: list[str]) -> Evaluation:
    """All that `megatron-gemini evaluate` finds out with these options, for programs that add figures of their own."""
    options = _parser().parse(argv)
    out = Path(options.out) if options.out else default_out(Path(options.checkpoint))
    # Now, and not once an evaluation of minutes has nowhere to write.
    if options.out and not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist")
    if is_complete(out.parent):
        raise ValueError(f"--out {out}: {out.parent} is a checkpoint, which another file would damage; name a folder")
    if min(options.samples, options.images) < 1:
        raise ValueError(f"--samples is {options.samples} and --images {options.images}; both must be 1 or more")
    drawing = SampleSettings(**{name: getattr(options, name) for name in SAMPLING})

    # Not as argparse's choices: the registry's message names the nearest one, or how others are added.
    for name in options.metrics:
        METRICS.check(name)

    # What can be wrong in the options was told before torch is imported, which takes seconds.
    from megatron_gemini.checkpoint.inference import load_for_inference
    from megatron_gemini.evaluation.report import EvaluationSettings, evaluate
    from megatron_gemini.generation.api import Generator

    loaded = load_for_inference(options.checkpoint)
    validation = tuple(options.validation) or loaded.config.data.validation
    if not validation:
        raise ValueError(
            "there is no validation data: the model's data.validation is empty; name shards by --validation"
        )
    settings = EvaluationSettings(
        drawing, options.samples, options.images, tuple(options.disjoint), metrics=tuple(options.metrics)
    )
    results = evaluate(Generator(loaded), training_sources(loaded), validation, settings)
    return Evaluation(loaded, results, complete(results, loaded, settings, options.runs), out)


def default_out(checkpoint: Path) -> Path:
    """report.json in a run's folder; beside a single checkpoint, in a folder of its own."""
    # A checkpoint lists its files: one that is added is taken for damage.
    folder = checkpoint.with_name(f"{checkpoint.name}.evaluation") if is_complete(checkpoint) else checkpoint
    return folder / "report.json"


def complete(results: Results, loaded: Loaded, settings: EvaluationSettings, runs: Sequence[str]) -> dict[str, Json]:
    """The report: figures, what training took, and how it all was made."""
    from megatron_gemini.evaluation.json_data import rounded
    from megatron_gemini.evaluation.runs import training_figures

    tokenizer = loaded.config.train.image_tokenizer
    # The image tokenizer was trained for this model, so the time that it took is part of what the model cost.
    paths = [Path(run) for run in runs] or [run_of(loaded), *([Path(tokenizer)] if tokenizer else [])]
    return {
        **{name: rounded(score.value) for name, score in results.scores.items()},
        **results.facts,
        **training_figures(paths),
        "checkpoint": str(loaded.directory),
        "sampling": dataclasses.asdict(settings.drawing),
    }


def run_of(loaded: Loaded) -> Path:
    """The run directory that the checkpoint lies in."""
    return loaded.directory.parent.parent


def training_sources(loaded: Loaded) -> list[SourceConfig]:
    """What the model and its image tokenizer were trained on."""
    # What the tokenizer saw was seen as well: a drawing may be a copy of an image that only it was trained on.
    # Its configuration travels in the model's checkpoint, while the path that training was given may be gone.
    return [each for config in (loaded.config, loaded.tokenizer_config) if config for each in config.data.sources]


def write(evaluation: Evaluation, phrases: Mapping[str, str] | None = None) -> None:
    """Writes report, sheet and loss curves; prints the figures. phrases: of the sheet, see `sheet.subtitle`."""
    from megatron_gemini.evaluation.sheet import make_sheet, subtitle
    from megatron_gemini.training.plots import plot_losses

    report, results, out, run = evaluation.report, evaluation.results, evaluation.out, run_of(evaluation.loaded)
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    samples = out.with_name("samples.png")
    title = f"What {run.name} draws, sees and hears"
    encoders = evaluation.loaded.config.encoders
    make_sheet(results, title, subtitle(report, phrases), encoders).save(samples)
    written = [out, samples]
    # A checkpoint that was copied out of its run has no curves.
    metrics = run / "metrics.jsonl"
    if metrics.is_file():
        try:
            plot_losses(metrics, out.with_name("loss.png"))
            written.append(out.with_name("loss.png"))
        except ValueError as error:  # a run of one step that was skipped has figures to report and none to draw
            print(f"warning: {error}", file=sys.stderr)
    for name, score in results.scores.items():
        aim = "" if score.better == "neither" else f"  {score.better} is better"
        print(f"{name:<32} {score!s:>12}{aim}")
    for name, value in report.items():
        if isinstance(value, (int, float)) and name not in results.scores:
            print(f"{name:<32} {value:>12g}")
    # To the other stream, so that a program which reads the figures does not meet it.
    if not results.separate:
        print("warning: training and validation shards share content; see validation in the report", file=sys.stderr)
    for task, count in results.not_asked.items():
        print(f"warning: {task}: {count} drawings were not asked for; this model cannot draw", file=sys.stderr)
    print(f"written: {', '.join(map(str, written))}")


def _source(text: str) -> SourceConfig:
    task, equals, shards = text.partition("=")
    if task not in TASKS or not equals or not shards:
        raise argparse.ArgumentTypeError(f"{text!r} is not TASK=SHARDS, with TASK one of {', '.join(TASKS)}")
    return SourceConfig(shards=shards, task=task)  # type: ignore[arg-type]


def _parser() -> OptionParser:
    parser = OptionParser("megatron-gemini evaluate", _DESCRIPTION)
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's directory, or one checkpoint's")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--validation",
        action="append",
        type=_source,
        default=[],
        metavar="TASK=SHARDS",
        help="validation shards and what to ask of them, any number of times (default: the model's data.validation)",
    )
    data.add_argument(
        "--disjoint",
        nargs="+",
        default=[],
        metavar="FIELD",
        help="metadata fields of which training and validation shards must share no value, such as voice",
    )
    data.add_argument("--samples", type=int, default=400, metavar="N", help="of every validation source (default: 400)")
    data.add_argument("--metrics", nargs="+", default=[], metavar="NAME", help="such as exact_match cer (default: all)")
    drawing = parser.add_argument_group("drawing; texts are always the likeliest")
    drawing.add_argument("--images", type=int, default=200, metavar="N", help="images to draw a task (default: 200)")
    parser.add_sampling(drawing, SAMPLING)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        metavar="FILE",
        help="the report (default: report.json in the run's directory, or beside a single checkpoint)",
    )
    output.add_argument(
        "--runs",
        nargs="+",
        default=[],
        metavar="DIR",
        help="run directories whose training the report sums up, the model's first (default: its own and its image "
        "tokenizer's)",
    )
    return parser


if __name__ == "__main__":
    end(run_command(main, sys.argv[1:]))
