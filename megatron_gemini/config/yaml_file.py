"""Reading a YAML file that somebody else may have written: bounded, plain data only, no surprises."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from megatron_gemini.config.schema import Plain

# A checkpoint's config.yaml may come from a stranger. That of the 70B recipe has 4 kB and four levels.
MAX_BYTES = 1 << 20
MAX_DEPTH = 16


def read_yaml(path: str | Path) -> dict[str, Plain]:
    """The mapping that a YAML file holds.

    Values are plain data (`yaml.safe_load`'s types), never objects; `${...}` stays text. Raises a `ValueError` that
    names the file when it cannot be read, is larger than `MAX_BYTES`, nests deeper than `MAX_DEPTH`, uses an alias,
    repeats a key or is no mapping.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)  # one more than is allowed, and never all of a file without end
    except OSError as error:
        raise ValueError(f"cannot read the configuration {path}: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES} bytes; a configuration is a short YAML file")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start}); a configuration is a YAML file") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, origin: str) -> dict[str, Plain]:
    """The mapping that a YAML text holds; `origin` names it in the errors of `read_yaml`. An empty text is `{}`."""
    import yaml  # where a file is read: options alone need none of it

    try:
        _refuse_bombs(text, origin)
        document = yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise ValueError(f"{origin} is no valid YAML: {_one_line(error)}") from error
    if document is None:  # an empty file, or comments alone
        return {}
    if not isinstance(document, Mapping):
        raise ValueError(
            f"{origin} holds a {type(document).__name__}; a configuration is a mapping of sections, such as `train:`"
        )
    return {str(key): value for key, value in document.items()}


def _refuse_bombs(text: str, origin: str) -> None:
    """Look at the events only: they are linear in the text's length, where an alias makes the data exponential."""
    import yaml

    # Only SafeLoader's events: other loaders make objects of what a tag names, and so run code that a file brings.
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"{origin}, line {line}: alias *{event.anchor}; write the value out instead")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"{origin}, line {line}: nested deeper than {MAX_DEPTH} levels")


@functools.cache
def _loader() -> type:
    """`yaml.SafeLoader` that refuses a repeated key, of which PyYAML would silently keep the last."""
    import yaml

    class UniqueKeyLoader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            seen = set()
            for key_node, _ in node.value:
                key = (key_node.tag, str(key_node.value))
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value} appears twice", key_node.start_mark
                    )
                seen.add(key)
            return super().construct_mapping(node, deep)

    return UniqueKeyLoader


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else problem
