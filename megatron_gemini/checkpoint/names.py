"""Which parameter of a checkpoint becomes which of this model: `config.init_from` as a map of names.

Names are compared by their parts between dots, so that no prefix ends within a part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from megatron_gemini.config.init_from import ANY, WHOLE, InitFromConfig

Parts: TypeAlias = tuple[str, ...]


def parts(prefix: str) -> Parts:
    """The parts of a name or of a prefix; none of one that stands for everything."""
    return () if prefix in ("", WHOLE) else tuple(prefix.split("."))


def stars(name: Parts, pattern: Parts) -> Parts | None:
    """What `*` stands for where `name` begins with `pattern`; None where it does not."""
    if len(name) < len(pattern):
        return None
    pairs = list(zip(name, pattern, strict=False))  # what is left of the name stays behind the pattern
    if any(wanted not in (ANY, part) for part, wanted in pairs):
        return None
    return tuple(part for part, wanted in pairs if wanted == ANY)


def rename(name: Parts, rule: str) -> Parts:
    """`name` by one rule OLD=NEW; as it is where it does not begin with OLD."""
    old, _, new = rule.partition("=")
    found = stars(name, parts(old))
    if found is None:
        return name
    values = iter(found)
    return (*(next(values) if part == ANY else part for part in parts(new)), *name[len(parts(old)) :])


@dataclass(frozen=True)
class NameMap:
    """How two models fit.

    sources: the checkpoint's name by the model's. missing: names of the model that the checkpoint lacks. unexpected:
    names of the checkpoint that the model lacks.
    """

    sources: dict[str, str]
    missing: list[str]
    unexpected: list[str]


def map_names(section: InitFromConfig, wanted: Sequence[str], there: Sequence[str]) -> NameMap:
    """The map that a section says. wanted: names of the whole model. there: of the whole checkpoint.

    Raises ValueError where the module or its source has no parameter at all, or two names become the same.
    """
    module, source = parts(section.module), parts(section.source or section.module)
    ours = _below(module, wanted, f"module is {section.module}", "the model")
    theirs = _below(source, there, f"source is {section.source or section.module}", section.checkpoint)
    sources: dict[str, str] = {}
    unexpected = []
    for name, rest in theirs.items():
        if _any_begins(rest, section.ignore):
            continue
        for rule in section.rename:
            rest = rename(rest, rule)
        target = ".".join((*module, *rest))
        if target in sources:  # whichever came last would win, by the order of the alphabet
            raise ValueError(f"rename makes {target} of both {sources[target]} and {name}")
        if target in ours:
            sources[target] = name
        else:
            unexpected.append(name)
    absent = {name: rest for name, rest in ours.items() if name not in sources}
    missing = [name for name, rest in absent.items() if not _any_begins(rest, section.allow_missing)]
    return NameMap(sources, missing, unexpected)


def _below(prefix: Parts, names: Iterable[str], setting: str, where: str) -> dict[str, Parts]:
    """Of the names that begin with the prefix, what follows it."""
    names = sorted(names)
    found = {name: parts(name)[len(prefix) :] for name in names if parts(name)[: len(prefix)] == prefix}
    if not found:
        known = sorted({".".join(parts(name)[: max(1, len(prefix))]) for name in names})
        shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
        raise ValueError(f"{setting}, and {where} has no parameter below it; there are {shown}")
    return found


def _any_begins(name: Parts, prefixes: Sequence[str]) -> bool:
    return any(stars(name, parts(prefix)) is not None for prefix in prefixes)
