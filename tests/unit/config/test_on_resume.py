"""Which settings a run may go on with: every one has a rule, and what it says is held to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import cast

import pytest

from megatron_gemini.config import on_resume
from megatron_gemini.config.build import Partial, build, merge
from megatron_gemini.config.data import DataConfig, PhaseConfig, SourceConfig
from megatron_gemini.config.encoders import ConnectorConfig, VisionConfig
from megatron_gemini.config.init_from import InitFromConfig
from megatron_gemini.config.load import config_from_dict, dump_config
from megatron_gemini.config.on_resume import FIXED, FREE, OWN, RULES, changes, leaves, refuse_changes, rule_of
from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import MAY_CHANGE, SectionValue

WHOLE = RunConfig(
    data=DataConfig(
        sources=(SourceConfig(name="a"), SourceConfig(name="b")),
        validation=(SourceConfig(),),
        curriculum=(PhaseConfig(3, (1.0, 2.0)),),
    ),
    init_from=(InitFromConfig("x"),),
)
"""Every list of sections has an item."""


def changed(name: str, value: object) -> RunConfig:
    """`WHOLE` with another value of one setting, past all checks between settings."""

    def put(section: object, parts: list[str]) -> object:
        if not parts:
            return value
        if isinstance(section, tuple):
            return tuple(put(item, parts[1:]) if n == int(parts[0]) else item for n, item in enumerate(section))
        if isinstance(section, dict):
            return section | {parts[0]: put(section[parts[0]], parts[1:])}
        made = object.__new__(type(section))
        for each in dataclasses.fields(cast("SectionValue", section)):
            old = getattr(section, each.name)
            object.__setattr__(made, each.name, put(old, parts[1:]) if each.name == parts[0] else old)
        return made

    return cast("RunConfig", put(WHOLE, name.split(".")))


def test_every_setting_has_a_rule() -> None:
    """A new one must be put into the table before it can be used."""
    found = {name for name, *_ in leaves(WHOLE)}
    assert {"model.width", "data.sources.1.weight", "encoders.vision.connector.kind", "init_from.0.module"} <= found
    sections = {f.name for f in dataclasses.fields(RunConfig)}
    assert {name.split(".")[0] for name in found} == sections


def test_the_table_names_nothing_else() -> None:
    names = {name for name, *_ in leaves(WHOLE)}
    for section in ("encoders", "data.sources", "data.validation", "data.curriculum", "init_from"):
        keys = {name.removeprefix(f"{section}.").split(".")[0] for name in names if name.startswith(f"{section}.")}
        names |= {name.replace(f"{section}.{key}.", f"{section}.*.") for name in names for key in keys}
    assert RULES.keys() <= names


@dataclass(frozen=True)
class ToyConnectorConfig(ConnectorConfig):
    """A plugin's."""

    tokens: int = 3
    noise: float = field(default=0.0, metadata=MAY_CHANGE)


@dataclass(frozen=True)
class ToySection:
    """A section that the table has not."""

    forgotten: int = 1


def test_a_setting_without_a_rule_is_found() -> None:
    with pytest.raises(KeyError, match=r"train\.forgotten"):
        list(leaves(ToySection(), "train."))


def test_a_plugins_own_settings_are_fixed_unless_they_say_otherwise() -> None:
    rules = {name: rule for name, _, rule in leaves(ToyConnectorConfig(), "encoders.toy.connector.")}
    assert rules == {
        "encoders.toy.connector.kind": FIXED,
        "encoders.toy.connector.frozen": FREE,
        "encoders.toy.connector.lr_scale": FREE,
        "encoders.toy.connector.tokens": FIXED,
        "encoders.toy.connector.noise": FREE,
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.rope_theta", 5e5),
        ("model.norm_eps", 1e-5),
        ("model.qk_norm", False),
        ("train.seed", 1),
        ("data.row_tokens", 512),
        ("data.lanes", 12),
        ("data.sources.1.task", "text"),
        ("encoders.audio.max_seconds", 10.0),
        ("encoders.vision.max_side", 32),
        ("encoders.vision.connector.kind", "other"),
        ("objective.kind", "other"),
        ("image_tokenizer.codes", 128),
    ],
)
def test_what_makes_another_model_or_another_order_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^step-1 was trained with {name} .*, which is .* now; set it back"):
        refuse_changes(WHOLE, changed(name, value), "step-1")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer.lr", 0.5),
        ("train.steps", 7),
        ("parallel.tensor", 2),
        ("engine.zero_stage", 1),
        ("logging.every", 9),
        ("encoders.vision.frozen", True),
        ("data.sources.1.weight", 3.0),
        ("data.workers", 3),
        ("objective.z_loss", 0.5),
        ("data.curriculum", ()),
    ],
)
def test_what_may_change_is_told_in_a_line(name: str, value: object) -> None:
    line = refuse_changes(WHOLE, changed(name, value), "step-1")
    assert line.startswith(f"settings that have changed: {name}") and "\n" not in line and " -> " in line


@pytest.mark.parametrize("name", ["train.output_dir", "data.text_model", "data.sources.0.shards"])
def test_what_is_compared_elsewhere_is_not_told(name: str) -> None:
    assert rule_of(name, {}) == OWN
    assert refuse_changes(WHOLE, changed(name, "elsewhere"), "step-1") == ""


def test_an_encoder_that_is_in_neither_model_does_not_matter() -> None:
    off = {**WHOLE.encoders, "vision": VisionConfig(enabled=False)}
    wider = {**WHOLE.encoders, "vision": VisionConfig(enabled=False, width=8)}
    there, here = (dataclasses.replace(WHOLE, encoders=encoders) for encoders in (off, wider))
    assert changes(there, here) == ([], [])


def test_many_changes_are_one_short_line() -> None:
    values: Partial = {"optimizer": dict.fromkeys(("lr", "beta1", "beta2", "eps", "weight_decay"), 0.5)}
    here = build(RunConfig, cast("Partial", merge({"train": {"steps": 9, "save_every": 3}}, values)))
    line = refuse_changes(RunConfig(), here, "x")
    assert line.endswith(", and 2 more") and len(line) < 300
    assert on_resume.SHOWN == 5


def test_a_configuration_that_was_written_and_read_is_the_same() -> None:
    import yaml

    assert changes(WHOLE, config_from_dict(yaml.safe_load(dump_config(WHOLE)))) == ([], [])
