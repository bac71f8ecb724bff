"""The trained image code tokenizer as a small folder that checkpoints and tools can carry."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from megatron_gemini.checkpoint.directory import resolve
from megatron_gemini.checkpoint.inference import WEIGHTS, load_image_tokenizer, save_weights
from megatron_gemini.config.load import read_config


def image_tokenizer_path(path: Path) -> Path:
    """The folder with model.safetensors and config.yaml that a user means by `path`.

    path: such a folder, the run or a checkpoint of a model that carries one, or the run or a checkpoint of the
    tokenizer's own training, whose weights are then written once beside the checkpoint, as weights-step-*.

    Raises ValueError, in one line, when there is none or it is damaged.
    """
    if (path / WEIGHTS).is_file():
        return path
    step = resolve(path)
    if (step / "image_tokenizer" / WEIGHTS).is_file():
        return step / "image_tokenizer"
    folder = step.parent / f"weights-{step.name}"
    if not (folder / WEIGHTS).is_file():
        _export(step, folder)
    return folder


def _export(step: Path, folder: Path) -> None:
    """Several ranks may do this at once: each writes a folder of its own, and the first to rename it wins."""
    tokenizer = load_image_tokenizer(step)
    temporary = Path(tempfile.mkdtemp(prefix=".weights-", dir=step.parent))
    try:
        temporary.chmod(0o755)
        save_weights(tokenizer, read_config(step / "config.yaml"), temporary)
        temporary.rename(folder)
    except OSError:
        if not (folder / WEIGHTS).is_file():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
