"""The names in force when a checkpoint was written: plugins, control tokens, encoders, connectors and the objective.

A checkpoint's numbers do not say what they mean. A row of the embedding belongs to the modality that had its control
token, and a plugin decides what a parameter's name stands for. So the names are saved beside the numbers. They are
compared before config.yaml is read, since settings of a plugin are unknown without it.

Names in a checkpoint are only compared with those that are there. None is imported, or looked up as a module.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_gemini import plugins
from megatron_gemini.checkpoint.directory import write_text
from megatron_gemini.config.load import read_config
from megatron_gemini.config.run import RunConfig
from megatron_gemini.registry import MODALITIES

FILE = "extensions.json"
_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Extensions:
    """Names of one model.

    plugins: all that were loaded, in order. connectors: kind, by enabled encoder. control_tokens: by modality that an
    enabled encoder reads; the others are in no row.
    """

    plugins: tuple[str, ...]
    objective: str
    connectors: Mapping[str, str]
    control_tokens: Mapping[str, str]

    @staticmethod
    def of(config: RunConfig) -> Extensions:
        """Those in force now, in a run of `config`."""
        enabled = config.enabled_encoders
        return Extensions(
            plugins.loaded(),
            config.objective.kind,
            {name: config.encoders[name].connector.kind for name in enabled},
            {spec.name: spec.control for spec in MODALITIES.entries() if spec.control and spec.encoder in enabled},
        )

    @staticmethod
    def read(directory: Path) -> Extensions:
        """Those of a checkpoint. Raises ValueError where there are none, or something in their place is no name."""
        try:
            found = json.loads((directory / FILE).read_text())
            named, objective = tuple(found["plugins"]), found["objective"]
            tables = dict(found["connectors"]), dict(found["control_tokens"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{directory} has no readable {FILE}: {error!r}; it is not of this version") from error
        texts = [*named, objective, *(text for table in tables for pair in table.items() for text in pair)]
        for text in texts:  # they come from a stranger, and messages repeat them as parts of commands
            if not isinstance(text, str) or not _NAME.fullmatch(text):
                raise ValueError(f"{directory / FILE} has {text!r} in the place of a name; the checkpoint is damaged")
        return Extensions(named, objective, *tables)

    def write(self, directory: Path) -> None:
        write_text(directory / FILE, json.dumps(asdict(self), indent=1))

    def check_tokens(self, origin: Path) -> None:
        """Raise ValueError unless every control token of this checkpoint still stands for the same modality."""
        for modality, token in self.control_tokens.items():
            for spec in MODALITIES.entries():
                if spec.control == token and spec.name != modality:
                    raise ValueError(
                        f"in {origin} the control token {token} stands for the modality {modality}, here for "
                        f"{spec.name}; load the plugin that registers the one without that of the other"
                    )
                if spec.control != token and spec.name == modality:
                    raise ValueError(
                        f"in {origin} the modality {modality} has the control token {token}, here {spec.control}; "
                        "load the release of its plugin that the checkpoint was made with"
                    )

    def check_same(self, now: Extensions, origin: Path) -> None:
        """Raise ValueError unless a run that is made of `now` can go on from this checkpoint."""
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
    """The configuration in a checkpoint, with the encoders that it was made with and no others.

    Raises ValueError for a plugin that is not loaded, before the configuration is read, or for a control token that
    stands for another modality now.
    """
    recorded = Extensions.read(directory)
    plugins.check(recorded.plugins, str(directory))
    recorded.check_tokens(directory)
    config = read_config(directory / "config.yaml")
    # An encoder of a plugin that came later is enabled by default, and the checkpoint has no weights for it.
    encoders = {
        name: section if name in recorded.connectors else dataclasses.replace(section, enabled=False)
        for name, section in config.encoders.items()
    }
    return dataclasses.replace(config, encoders=encoders)


def check_resumable(directory: Path, config: RunConfig) -> None:
    """Raise ValueError unless a run of `config` can go on from a checkpoint: all names in force must be the same."""
    recorded = Extensions.read(directory)
    plugins.check(recorded.plugins, str(directory))
    recorded.check_tokens(directory)
    recorded.check_same(Extensions.of(config), directory)
