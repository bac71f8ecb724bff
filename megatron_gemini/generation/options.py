"""Command lines of generation and evaluation; the standard library only, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

from megatron_gemini.generation.settings import SampleSettings

_SAMPLING: dict[str, tuple[type, str]] = {
    "temperature": (float, "0 takes the likeliest token"),
    "top_k": (int, "sample from the k likeliest tokens; 0 from all"),
    "top_p": (float, "sample from the fewest likeliest tokens whose probabilities reach this sum"),
    "seed": (int, "the same seed gives the same answer"),
    "guidance": (float, "classifier-free guidance of images; 1 is off, 2 to 4 follow the prompt more closely"),
    "max_tokens": (int, "most tokens of an answer, image codes included"),
}


class OptionParser(argparse.ArgumentParser):
    """Mistakes are ValueErrors, told in one line like those of every other command."""

    def __init__(self, prog: str, description: str) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, formatter_class=formatter, allow_abbrev=False)
        what = "module that adds encoders, connectors, objectives and the like; may be given several times"
        self.add_argument("--plugin", action="append", metavar="MODULE", help=what)  # `cli.run_command` takes it out

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The options. Raises ValueError for a mistake; `--help` prints and raises SystemExit(0)."""
        # argparse names all unknown words together and knows no way out; here the first is told, with the nearest name.
        options, unknown = self.parse_known_args(argv)
        if unknown and unknown[0].startswith("-"):
            known = [name for action in self._actions for name in action.option_strings]
            close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
            way_out = f"did you mean {close[0]}?" if close else "see --help"
            raise ValueError(f"there is no option {unknown[0]}; {way_out}")
        if unknown:
            raise ValueError(f"{unknown[0]!r} stands alone; see --help for the options")
        return options

    def add_sampling(self, group: argparse._ArgumentGroup, names: Sequence[str]) -> None:
        """The named numeric fields of `SampleSettings`, with their defaults."""
        for name in names:
            kind, what = _SAMPLING[name]
            value = getattr(SampleSettings, name)
            option, shown = f"--{name.replace('_', '-')}", f"{what} (default: {value})"
            group.add_argument(option, type=kind, default=value, metavar="N", help=shown)

    # Asked by those who walk through argv themselves: the value of an option may look like a word of its own.
    def value_options(self) -> set[str]:
        """Options that take a value."""
        return {name for action in self._actions if action.nargs != 0 for name in action.option_strings}
