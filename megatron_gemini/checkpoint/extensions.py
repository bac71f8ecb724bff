"""The names in force when a checkpoint was written: plugins, control tokens, encoders, connectors and the objective.

A checkpoint's numbers do not say what they mean. A row of the embedding belongs to the modality that had its control
token, and a plugin decides what a parameter's name stands for. So the names are saved beside the numbers. They are
compared before config.yaml is read, since settings of a plugin are unknown without it.

Names in a checkpoint are only compared with those that are there. None is imported, or looked up as a module.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_gemini import plugins
from megatron_gemini.checkpoint.index import write_text
from megatron_gemini.config.load import read_config
from megatron_gemini.config.run import RunConfig
from megatron_gemini.modalities.control_tokens import control_tokens
from megatron_gemini.registry import MODALITIES

FILE = "extensions.json"
_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Extensions:
    """Names of one model.

    plugins: all that were loaded, in order. connectors: kind, by enabled encoder. control_tokens: by what they stand
    for, as in `modalities.control_tokens`, of all that the model reads or makes; others are in no row.
    """

    plugins: tuple[str, ...]
    objective: str
    connectors: Mapping[str, str]
    control_tokens: Mapping[str, str]

    @staticmethod
    def of(config: RunConfig) -> Extensions:
        """Those in force now, in a run of `config`."""
        kinds = {name: config.encoders[name].connector.kind for name in config.enabled_encoders}
        used = {spec.name for spec in MODALITIES.entries() if spec.encoder in kinds}
        makes = [spec for spec in MODALITIES.entries() if spec.codes is not None and spec.codes.size(config)]
        used |= {f"{spec.name}_{end}" for spec in makes for end in ("begin", "end")}
        tokens = {meaning: token for meaning, token in control_tokens().items() if meaning in used}
        return Extensions(plugins.loaded(), config.objective.kind, kinds, tokens)

    @staticmethod
    def read(directory: Path) -> Extensions:
        """Those of a checkpoint. Raises ValueError where there are none, or something in their place is no name."""
        try:
            found = json.loads((directory / FILE).read_text())
            named, objective = tuple(found["plugins"]), found["objective"]
            tables = dict(found["connectors"]), dict(found["control_tokens"])
        # The repr, since the text of a KeyError is the bare key.
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{directory} has no readable {FILE}: {error!r}; it is not of this version") from error
        texts = [*named, objective, *(text for table in tables for pair in table.items() for text in pair)]
        if isinstance(found["plugins"], str):
            raise ValueError(f"{directory / FILE} has a text in the place of the plugins; the checkpoint is damaged")
        for text in texts:  # they come from a stranger, and messages repeat them as parts of commands
            if not isinstance(text, str) or not _NAME.fullmatch(text):
                raise ValueError(f"{directory / FILE} has {text!r} in the place of a name; the checkpoint is damaged")
        return Extensions(named, objective, *tables)

    def write(self, directory: Path) -> None:
        write_text(directory / FILE, json.dumps(asdict(self), indent=1))

    def check_tokens(self, origin: Path) -> None:
        """Raise ValueError unless every control token of this checkpoint still stands for the same."""
        here = control_tokens()
        meanings = {token: meaning for meaning, token in here.items()}
        # Plugins get the next free tokens, so that another plugin, or another order of them, moves all that follow.
        options = " ".join(f"--plugin {name}" for name in self.plugins)
        way_out = f"load the plugins that it was made with, in their order: {options or 'none'}"
        for meaning, token in self.control_tokens.items():
            if meanings.get(token, meaning) != meaning:
                raise ValueError(
                    f"in {origin} the control token {token} stands for {meaning}, here for {meanings[token]}; {way_out}"
                )
            if here.get(meaning, token) != token:
                raise ValueError(
                    f"in {origin} {meaning} has the control token {token}, here {here[meaning]}; {way_out}"
                )

    def check_same(self, now: Extensions, origin: Path) -> None:
        """Raise ValueError unless a run that is made of `now` can go on from this checkpoint."""
        # Parameters of the same names and shapes may mean something else: no comparison of tensors would tell.
        anew = "set it back, or begin a run with another train.output_dir and take the weights by init_from"
        if self.objective != now.objective:
            raise ValueError(
                f"{origin} was trained with objective.kind {self.objective}, which is {now.objective} now; {anew}"
            )
        for name in dict.fromkeys((*self.connectors, *now.connectors)):
            there, here = self.connectors.get(name), now.connectors.get(name)
            if there is None or here is None:
                raise ValueError(
                    f"{origin} was trained with{'out' if there is None else ''} the encoder {name}, "
                    f"encoders.{name}.enabled is {'false' if here is None else 'true'} now; {anew}"
                )
            if there != here:
                raise ValueError(
                    f"{origin} was trained with encoders.{name}.connector.kind {there}, which is {here} now; {anew}"
                )


def read_checkpoint_config(directory: Path) -> RunConfig:
    """The configuration in a checkpoint.

    Raises ValueError for a plugin that is not loaded, or a control token that stands for something else now, before the
    configuration is read.
    """
    recorded = Extensions.read(directory)
    plugins.check(recorded.plugins, str(directory))
    recorded.check_tokens(directory)
    return read_config(directory / "config.yaml")


def check_resumable(directory: Path, config: RunConfig) -> None:
    """Raise ValueError unless a run of `config` can go on from a checkpoint: all names in force must be the same."""
    recorded = Extensions.read(directory)
    plugins.check(recorded.plugins, str(directory))
    recorded.check_tokens(directory)
    recorded.check_same(Extensions.of(config), directory)
