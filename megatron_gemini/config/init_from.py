"""Weights that a new run begins with, from checkpoints of this project."""

from __future__ import annotations

from dataclasses import dataclass

WHOLE = "."
"""Stands for all parameters, where a prefix of names is asked for."""
ANY = "*"
"""Stands for one part of a name, between two dots."""


@dataclass(frozen=True)
class InitFromConfig:
    """One module's weights. Several are taken in order, a later one over an earlier one.

    Prefixes end at a dot: `encoders.vision` begins `encoders.vision.norm` and not `encoders.vision2.norm`. What follows
    `source` in a name of the checkpoint is changed by `rename`, and then follows `module` in the name here.
    """

    checkpoint: str = ""
    """A run's directory (its newest checkpoint), one checkpoint's, or a folder with model.safetensors."""
    module: str = WHOLE
    """What is filled, as a prefix of this model's names: encoders.vision, connectors, decoder, or . for everything."""
    source: str = ""
    """Where it is in the checkpoint, as a prefix of its names, or . for everything; empty if it is called as here."""
    rename: tuple[str, ...] = ()
    """OLD=NEW: where the rest of a name begins with OLD, that becomes NEW. All are applied, each to what the one before
    gave. Each * in OLD stands for any one part, and those in NEW for the same parts, in order:
    layers.*.attn=layers.*.attention."""
    allow_missing: tuple[str, ...] = ()
    """Prefixes, below `module`, of parameters that keep their initial values where the checkpoint lacks them."""
    ignore: tuple[str, ...] = ()
    """Prefixes, below `source`, of the checkpoint's parameters that are not taken."""

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ValueError("checkpoint is empty; name a run's directory, or one checkpoint's")
        if not self.module:
            raise ValueError(f"module is empty; write {WHOLE} for the whole model, or a prefix of its names")
        for name, prefix in (("module", self.module), ("source", self.source)):
            if prefix not in ("", WHOLE):
                _check_prefix(prefix, name, stars=False)
        for name in ("allow_missing", "ignore"):
            for prefix in getattr(self, name):
                _check_prefix(prefix, name, stars=True)
        for rename in self.rename:
            old, equals, new = rename.partition("=")
            if not equals or "=" in new:
                raise ValueError(f"rename has {rename!r}; write OLD=NEW")
            for prefix in (old, new):
                _check_prefix(prefix, "rename", stars=True)
            if old.split(".").count(ANY) != new.split(".").count(ANY):
                raise ValueError(f"rename has {rename!r}; write as many {ANY} in NEW as in OLD")


def _check_prefix(prefix: str, name: str, *, stars: bool) -> None:
    for part in prefix.split("."):
        if not part or (ANY in part and not (stars and part == ANY)):
            allowed = f", and {ANY} for any one" if stars else ""
            raise ValueError(f"{name} has {prefix!r}; write the parts of a name with dots between them{allowed}")
