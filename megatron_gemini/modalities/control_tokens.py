"""Which control tokens the modalities have: the built-in ones their own, those of plugins what is still free."""

from __future__ import annotations

import dataclasses

from megatron_gemini.contracts import CONTROL_TOKENS
from megatron_gemini.modalities.spec import ModalitySpec
from megatron_gemini.registry import MODALITIES


def control_tokens() -> dict[str, str]:
    """Names of the control tokens in force, by what they stand for.

    A modality's own name is that of its placeholder; NAME_begin and NAME_end are around its codes.
    """
    found: dict[str, str] = {}
    for spec in MODALITIES.entries():
        if spec.control:
            found[spec.name] = spec.control
        if spec.codes is not None:
            found |= {f"{spec.name}_begin": spec.codes.begin, f"{spec.name}_end": spec.codes.end}
    return found


def with_control_tokens(name: str, spec: ModalitySpec) -> ModalitySpec:
    """The spec of a plugin with a control token in every place that it leaves open: the next free `reserved_n`.

    The order of registration decides, which is that of the plugins: every process loads them in the same one.
    Raises ValueError for a token that another modality has, and when no `reserved_n` is left.
    """
    taken = set(control_tokens().values())
    if spec.encoder:
        spec = dataclasses.replace(spec, control=_take(name, spec.control, taken))
    if spec.codes is not None:
        begin, end = (_take(name, token, taken) for token in (spec.codes.begin, spec.codes.end))
        spec = dataclasses.replace(spec, codes=dataclasses.replace(spec.codes, begin=begin, end=end))
    return spec


def _take(name: str, wanted: str, taken: set[str]) -> str:
    # Codes begin behind the control tokens, so that a new one would change the ids of a trained model's codes.
    free = [token for token in CONTROL_TOKENS if token.startswith("reserved_") and token not in taken]
    token = wanted or (free[0] if free else "")
    if not token:
        raise ValueError(f"no control token is left for the modality {name!r}; load fewer plugins that add one")
    if token in taken or token not in CONTROL_TOKENS:
        why = "another modality's" if token in taken else "none of `contracts.CONTROL_TOKENS`"
        raise ValueError(f"the control token {token!r} of the modality {name!r} is {why}; leave it open")
    taken.add(token)
    return token
