"""Entry point of generation: `megatron-gemini generate --checkpoint DIR ... "text"`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_gemini.cli import end, run_command
from megatron_gemini.generation.options import OptionParser
from megatron_gemini.generation.settings import SampleSettings, answers
from megatron_gemini.registry import MODALITIES

if TYPE_CHECKING:
    from megatron_gemini.generation.api import Piece
    from megatron_gemini.modalities.spec import ModalitySpec

SHORTEST_SIDE = 256  # pixels of a saved image that is enlarged by default
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp")
_DESCRIPTION = """Ask a trained model. What it says is printed, on a terminal as it comes; what it draws is saved.

Texts and files make up the prompt in the order in which they are given:

  megatron-gemini generate --checkpoint runs/quickstart "draw a seven" --out seven.png
  megatron-gemini generate --checkpoint runs/quickstart --image x.png "what is this?"
  megatron-gemini generate --checkpoint runs/quickstart --audio x.wav "what was said?"
"""


def main(argv: list[str]) -> int:
    """Parse, load, ask, print and save. Returns the exit status."""
    options = parse(argv)
    # All that can be wrong in the options is told before torch is imported, which takes seconds.
    settings = SampleSettings(
        **{f.name: getattr(options, f.name) for f in dataclasses.fields(SampleSettings) if f.name != "cache"},
        cache=not options.no_cache,
    )
    if not options.items:
        kinds = ", ".join(f"--{spec.name}" for spec in read_from_files())
        raise ValueError(f'nothing was asked; give a text ("what is this?") or a file: {kinds}')
    out = Path(options.out or "answer.png")
    check_out(out)
    if options.scale < 0:
        raise ValueError(f"--scale is {options.scale}; 1 keeps the size, 0 enlarges to {SHORTEST_SIDE} pixels")

    from megatron_gemini.checkpoint.inference import load_for_inference
    from megatron_gemini.generation.api import Generator
    from megatron_gemini.generation.code_runs import cannot_make, drawn_modalities
    from megatron_gemini.generation.prompt_files import read_item

    generator = Generator(load_for_inference(options.checkpoint))
    drawn = drawn_modalities()[0]
    if options.out and not generator.codebook:
        raise ValueError(f"--out {out} is for what is drawn, but {cannot_make(drawn)}")
    items = [read_item(kind, value, generator.config) for kind, value in options.items]
    # A person sees the first words at once; a program gets the whole answer or none of it.
    answer = generator.stream if sys.stdout.isatty() else generator.respond
    images = show(answer(items, settings), out, options.scale)
    # A script that asked for an image has to see in the status that there is none.
    if options.out and not images:
        print(f"no image was drawn, so {out} was not written; --answer {drawn} asks for one", file=sys.stderr)
        return 1
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; `items` holds the pairs (kind, value) of the prompt in the order of the command line.

    Raises ValueError for a mistake; `--help` prints and raises SystemExit(0).
    """
    parser = _parser()
    return parser.parse(_named(argv, parser.value_options()))


def read_from_files() -> list[ModalitySpec]:
    """Modalities that a prompt takes as files, those of plugins included. Text, which has no encoder, is none."""
    return [spec for spec in MODALITIES.entries() if spec.encoder and spec.decode is not None]


def check_out(out: Path) -> None:
    """Raises ValueError when no image could be saved there, before any work is done."""
    if out.suffix.lower() not in IMAGE_FILES:
        raise ValueError(f"--out {out} is not the name of an image; end it in one of {', '.join(IMAGE_FILES)}")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist")


def show(pieces: Iterable[Piece], out: Path, scale: int) -> int:
    """Prints texts and codes, and saves images at once: the first as `out`, the others as out-2, out-3, ...

    scale: enlarges by this factor (bicubic); 0 by the smallest that makes the shorter side `SHORTEST_SIDE`.
    Returns the number of images.
    """
    from PIL import Image

    from megatron_gemini.data.samples.items import Codes

    images, in_text = 0, False
    try:
        for piece in pieces:
            if isinstance(piece, str):
                print(piece, end="", flush=True)
                in_text = True
                continue
            if isinstance(piece, Codes):
                print("\n" * in_text + f"{piece.target} codes: {' '.join(map(str, piece.codes))}", flush=True)
                in_text = False
                continue
            # At once and not at the end: what came before an interruption is there.
            images += 1
            path = out if images == 1 else out.with_stem(f"{out.stem}-{images}")
            height, width = piece.pixels_HW3.shape[:2]
            # Rounded up to a whole number, so that every pixel of the model's is enlarged alike.
            factor = scale or -(-SHORTEST_SIDE // min(height, width))
            picture = Image.fromarray(piece.pixels_HW3)
            if factor > 1:
                picture = picture.resize((width * factor, height * factor), Image.Resampling.BICUBIC)
            picture.save(path)
            print("\n" * in_text + f"image saved to {path}", flush=True)
            in_text = False
    finally:
        # Also after Ctrl-C, so that what is told next does not stand behind half a sentence.
        if in_text:
            print()
    return images


class _Item(argparse.Action):
    """Adds (kind, value) to the prompt."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[str] | None,
        option_string: str | None = None,
    ) -> None:
        namespace.items = [*namespace.items, (self.option_strings[0].removeprefix("--"), values)]


def _named(argv: list[str], takes_value: set[str]) -> list[str]:
    """argv with `--text=` before every bare text: argparse itself forgets where positionals stood among options."""
    named: list[str] = []
    rest = iter(argv)
    for word in rest:
        if word == "--":
            named += [f"--text={text}" for text in rest]
        elif word.startswith("--") or word == "-h":
            named.append(word)
            if word in takes_value:
                named += [value] if (value := next(rest, None)) is not None else []
        else:
            named.append(f"--text={word}")
    return named


def _parser() -> OptionParser:
    parser = OptionParser("megatron-gemini generate", _DESCRIPTION)
    parser.set_defaults(items=[])  # texts and files in one list: argparse keeps no order between two options
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's directory, or one checkpoint's")
    prompt = parser.add_argument_group("prompt, any number in any order")
    prompt.add_argument("--text", action=_Item, metavar="TEXT", help="a text; --text itself may be left out")
    for spec in read_from_files():
        prompt.add_argument(f"--{spec.name}", action=_Item, metavar="FILE", help=spec.files or None)
    sampling = parser.add_argument_group("sampling")
    parser.add_sampling(sampling, ("temperature", "top_k", "top_p", "seed", "guidance", "max_tokens"))
    answer = SampleSettings.answer
    sampling.add_argument(
        "--answer", choices=answers(), default=answer, help=f"what may be answered (default: {answer})"
    )
    sampling.add_argument("--no-cache", action="store_true", help="compute keys and values again for every token")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        metavar="FILE",
        help="image to write; a second one is numbered, as in answer-2.png (default: answer.png)",
    )
    output.add_argument(
        "--scale",
        type=int,
        default=0,
        metavar="N",
        help=f"enlarge saved images N times; 1 keeps their size (default: to {SHORTEST_SIDE} pixels or more)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    return parser


if __name__ == "__main__":
    end(run_command(main, sys.argv[1:]))
