"""Which settings may change when a run goes on: a table with every setting, and what it says of two configurations.

- FIXED: the model, or the order of its data, would be another one. Refused.
- FREE: what a run may be given anew, such as its learning rate, its steps and its layout of ranks. Told.
- OWN: where the run lies, and what is compared by content elsewhere. Nothing is said.

Settings that an encoder, a connector or an objective adds to those that all of its kind have are FIXED, unless their
field's metadata is `MAY_CHANGE`. So a plugin's settings are safe without a word from it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from megatron_gemini.config.run import RunConfig
from megatron_gemini.config.schema import SectionValue, SettingValue

FIXED, FREE, OWN = "fixed", "free", "own"
# Sections by their dotted names, with * for an encoder's name and for the number of a list's item.
_TABLE: dict[str, dict[str, str]] = {
    "model": {
        FIXED: "width layers heads kv_heads head_width mlp_width activation qk_norm rope_theta norm_eps tie_embeddings",
        FREE: "init_std",  # of the beginning alone
    },
    "encoders.*": {FIXED: "enabled", FREE: "frozen lr_scale"},
    "encoders.*.cost": {FREE: "quadratic linear constant"},
    "encoders.*.connector": {FIXED: "kind", FREE: "frozen lr_scale"},
    "image_tokenizer": {
        FIXED: "image_size patch width layers heads mlp_width codes code_width",
        FREE: "commitment l2_weight logit_laplace_weight",
    },
    "data": {
        FIXED: "row_tokens lanes look_ahead row_inputs",
        FREE: "temperature caption_dropout max_bad_share prefetch workers sample_seconds cache_bytes",
        OWN: "text_model",  # a file may move: its content is compared
    },
    # Positions of every source go on where they were, whatever its share is from now on.
    "data.sources.*": {
        FIXED: "task",
        FREE: "weight format fields prompts filters operations epochs tokens",
        OWN: "shards name",  # the loader compares labels, and what the files hold
    },
    "data.validation.*": {
        FREE: "shards task weight prompts name format fields filters operations epochs tokens",
    },
    "data.curriculum.*": {FREE: "step weights"},
    "parallel": {FREE: "tensor sequence context pipeline virtual_stages schedule"},
    "engine": {
        FREE: "precision zero_stage offload_optimizer offload_parameters nvme_path recompute offload_activations "
        "gradient_clipping deepspeed_config adam",
    },
    "encoder_engines": {FREE: "zero_stage recompute chunk_tokens"},
    "optimizer": {FREE: "lr beta1 beta2 eps weight_decay"},
    "schedule": {FREE: "kind warmup_steps decay_steps final_ratio"},
    "objective": {FIXED: "kind"},
    "train": {
        FIXED: "seed",
        # The loader refuses another rows_per_step where the run does not stand between two of its steps.
        FREE: "steps rows_per_step save_every keep keep_every validation_every validation_rows max_skipped_steps "
        "rank_timeout",
        OWN: "output_dir resume image_tokenizer",
    },
    "init_from.*": {OWN: "checkpoint module source rename allow_missing ignore"},
    "logging": {FREE: "every tensorboard wandb_project"},
}
RULES = {f"{section}.{n}": rule for section, rules in _TABLE.items() for rule, ns in rules.items() for n in ns.split()}
_EXTENDED = re.compile(r"encoders\.\*(\.connector)?\.\w+|objective\.\w+")
SHOWN = 5


@dataclass(frozen=True)
class Change:
    """A setting with the value that it had and the one that it has."""

    name: str
    there: SettingValue
    here: SettingValue


def rule_of(name: str, metadata: Mapping[str, bool]) -> str:
    """The rule of a setting. metadata: of its field. Raises KeyError for one that the table has forgotten."""
    pattern = re.sub(r"^encoders\.[^.]+|\.\d+(?=\.)", lambda m: "encoders.*" if m[0].startswith("e") else ".*", name)
    if pattern not in RULES and _EXTENDED.fullmatch(pattern):
        return FREE if metadata.get("may_change") else FIXED
    return RULES[pattern]


def leaves(section: SectionValue, prefix: str = "") -> Iterator[tuple[str, SettingValue, str]]:
    """(dotted name, value, rule) of every setting below a section."""
    for field in dataclasses.fields(section):
        name, value = f"{prefix}{field.name}", cast("SettingValue", getattr(section, field.name))
        named = isinstance(value, Mapping) and any(map(dataclasses.is_dataclass, value.values()))
        listed = isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value))
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{name}.")
        elif named:
            for key, item in cast("Mapping[str, SectionValue]", value).items():
                yield from leaves(item, f"{name}.{key}.")
        elif listed:
            for number, item in enumerate(cast("tuple[SectionValue, ...]", value)):
                yield from leaves(item, f"{name}.{number}.")
        elif value != () or f"{name}.*" not in _TABLE:  # an empty list of sections has no settings
            yield name, value, rule_of(name, cast("Mapping[str, bool]", field.metadata))


def changes(there: RunConfig, here: RunConfig) -> tuple[list[Change], list[Change]]:
    """(those that are refused, those that are told)."""
    # What an encoder that is in neither model would be does not matter. Other encoders are compared by name elsewhere.
    enabled = {*there.enabled_encoders, *here.enabled_encoders}
    before, after = ({name: (value, rule) for name, value, rule in leaves(each)} for each in (there, here))
    found: dict[str, list[Change]] = {FIXED: [], FREE: [], OWN: []}
    for name in {**before, **after}:
        rule = (before.get(name) or after[name])[1]
        absent = name.startswith("encoders.") and name.split(".")[1] not in enabled
        # Items that only one of two lists has: the loader knows what to say of sources.
        absent = absent or (rule == FIXED and not (name in before and name in after))
        old, new = (each[name][0] if name in each else () for each in (before, after))
        if old != new and not absent:
            found[rule].append(Change(name, old, new))
    return found[FIXED], found[FREE]


def refuse_changes(there: RunConfig, here: RunConfig, origin: str) -> str:
    """A line on the settings that have changed, empty if none has.

    Raises ValueError for one that may not.
    """
    refused, told = changes(there, here)
    if refused:
        raise ValueError(
            f"{origin} was trained with {_listed(refused, '{0} {1}, which is {2} now')}; set it back, begin anew by "
            "--train.no_resume, or begin a run with another train.output_dir and take the weights by init_from"
        )
    return f"settings that have changed: {_listed(told, '{0} {1} -> {2}')}" if told else ""


def _listed(found: list[Change], form: str) -> str:
    more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(form.format(each.name, _shown(each.there), _shown(each.here)) for each in found[:SHOWN]) + more


def _shown(value: SettingValue) -> str:
    if isinstance(value, Mapping):
        value = dict(value)
    text = " ".join((repr(value) if value in ("", ()) or not isinstance(value, str) else value).split())
    return text if len(text) <= 60 else text[:57] + "..."
