"""Where the caption of a picture in a folder comes from."""

from __future__ import annotations

from enum import Enum
from pathlib import Path


class CaptionOrigin(Enum):
    """txt: the text file beside the picture. folder: the name of its folder. name: its own name."""

    TXT = "txt"
    FOLDER = "folder"
    NAME = "name"

    def of(self, picture: Path) -> str | Path:
        """The caption, or the file to read it from."""
        if self is CaptionOrigin.TXT:
            return picture.with_suffix(".txt")
        name = picture.parent.name if self is CaptionOrigin.FOLDER else picture.stem
        return " ".join(name.replace("_", " ").replace("-", " ").split())
