"""Adds the codes of every image to tar shards, in place.

    python tools/encode_images.py --checkpoint runs/image_tokenizer --shards "data/*.tar"

Every picture key.png, key.jpg, ... (docs/data.md lists the endings) gets a member key.codes.json: {"codes": [...],
"tokenizer": ...}, where the tokenizer is named by a hash of its weights. A shard that has all its codes from this
tokenizer is left alone; any other is written beside and renamed, so that it is whole at every moment.
"""

from __future__ import annotations

import argparse
import glob
import io
import json
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_gemini.modalities.image.spec import IMAGE

if TYPE_CHECKING:
    import numpy as np

    from megatron_gemini.modalities.image.code_tokenizer import ImageTokenizer

IMAGES = tuple(f".{ending}" for ending in IMAGE.members)
CODES = ".codes.json"
MAX_MEMBER_BYTES = 256 * 1024 * 1024


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="run or checkpoint of the image tokenizer")
    parser.add_argument("--shards", required=True, nargs="+", metavar="GLOB", help="tar shards, patterns in quotes")
    parser.add_argument("--batch", type=int, default=256, help="images encoded at once (default: %(default)s)")
    parser.add_argument("--device", default="", help="cpu or cuda (default: cuda where there is one)")
    options = parser.parse_args(argv)
    try:
        encode_shards(options.checkpoint, find_shards(options.shards), options.batch, options.device)
    except (ValueError, OSError, tarfile.TarError) as error:
        print(f"encode_images: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def find_shards(patterns: Sequence[str]) -> list[Path]:
    """Every file that the patterns name, once, in order. Raises ValueError for a pattern that names none."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        paths = sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise ValueError(f"no shard matches {pattern!r}")
        found.update(dict.fromkeys(Path(path).resolve() for path in paths))
    return list(found)


def encode_shards(checkpoint: Path, shards: Sequence[Path], batch: int, device: str = "") -> None:
    """Raises ValueError that names the tokenizer, the option or the shard that cannot be used."""
    import torch
    from tqdm import tqdm

    from megatron_gemini.checkpoint.inference import load_image_tokenizer
    from megatron_gemini.modalities.image.code_tokenizer import fingerprint

    if batch < 1:
        raise ValueError(f"--batch is {batch}; it must be 1 or more")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = load_image_tokenizer(checkpoint).to(device)
    except RuntimeError as error:
        raise ValueError(f"--device {device} cannot be used: {error}") from None
    name = fingerprint(tokenizer)
    total: Counter[str] = Counter()
    with tqdm(shards, unit="shard", disable=None) as progress:
        for shard in progress:
            total += encode_shard(shard, tokenizer, name, batch)
            progress.set_postfix(images=total["images"], skipped=total["skipped"])
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(total.items()) if reason.startswith("image_"))
    print(
        f"{len(shards)} shards: {total['images']} images encoded, {total['current']} already had their codes"
        + (f"; {total['skipped']} skipped ({reasons})" if total["skipped"] else "")
        + (f"; {total['without']} of the shards hold no image" if total["without"] else "")
    )


def encode_shard(shard: Path, tokenizer: ImageTokenizer, name: str, batch: int) -> Counter[str]:
    """Counts of images encoded, current (left as they are), skipped, and the reasons why; without: 1 if it has none."""
    names, current = survey(shard, name)
    images = [member for member in names if member.lower().endswith(IMAGES)]
    if not images:
        return Counter(without=1)
    if all(codes_name(image) in current for image in images):
        return Counter(current=len(images))
    codes, bad = encode_members(shard, tokenizer, batch)
    if not codes:
        raise ValueError(f"{shard}: none of its {len(images)} images can be read ({', '.join(sorted(bad))})")
    rewrite(shard, codes, name)
    return Counter(images=len(codes), skipped=sum(bad.values())) + bad


def survey(shard: Path, name: str) -> tuple[list[str], set[str]]:
    """(names of all members, names of the codes that come from the tokenizer called `name`)."""
    names, current = [], set()
    for member, data in members(shard):
        names.append(member.name)
        if member.name.endswith(CODES) and _made_by(data) == name:
            current.add(member.name)
    if not names:
        raise ValueError(f"{shard} is an empty tar")
    return names, current


def _made_by(data: bytes) -> str | None:
    try:
        return json.loads(data).get("tokenizer")
    except (ValueError, AttributeError, RecursionError):
        return None


def encode_members(shard: Path, tokenizer: ImageTokenizer, batch: int) -> tuple[dict[str, list[int]], Counter[str]]:
    """(codes by the name of their member, how many images cannot be read by reason)."""
    from megatron_gemini.modalities.bad_sample import BadSample, guarded
    from megatron_gemini.modalities.image.preprocess import decode_image, square_image

    codes: dict[str, list[int]] = {}
    bad: Counter[str] = Counter()
    names, pixels = [], []
    for member, data in members(shard):
        if not member.name.lower().endswith(IMAGES):
            continue
        try:
            with guarded("decode", f"{shard}: {member.name}"):
                pixels.append(square_image(decode_image(data), tokenizer.config.image_size))
        except BadSample as error:
            bad[error.reason] += 1
            continue
        names.append(codes_name(member.name))
        if len(pixels) == batch:
            codes.update(zip(names, encode(tokenizer, pixels), strict=True))
            names, pixels = [], []
    if pixels:
        codes.update(zip(names, encode(tokenizer, pixels), strict=True))
    return codes, bad


def encode(tokenizer: ImageTokenizer, pixels: list[np.ndarray]) -> list[list[int]]:
    import numpy as np

    from megatron_gemini.modalities.image.preprocess import signed_pixels

    device = next(tokenizer.parameters()).device
    return tokenizer.encode(signed_pixels(np.stack(pixels)).to(device)).tolist()


def rewrite(shard: Path, codes: dict[str, list[int]], name: str) -> None:
    """Copies the shard with `codes` after their images and without any others, and puts the copy in its place."""
    temporary = shard.with_name(f".{shard.name}.tmp")
    try:
        with temporary.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for member, data in members(shard):
                    if member.name.endswith(CODES):
                        continue
                    _add(tar, member.name, data)
                    key = codes_name(member.name)
                    if member.name.lower().endswith(IMAGES) and key in codes:
                        _add(tar, key, json.dumps({"codes": codes[key], "tokenizer": name}).encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, shard)
    finally:
        temporary.unlink(missing_ok=True)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size, header.mode = len(data), 0o644
    tar.addfile(header, io.BytesIO(data))


def members(shard: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Every regular file of a tar with its content. Raises ValueError unless the tar is whole to its end marker."""
    try:
        with tarfile.open(shard, mode="r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                if member.size > MAX_MEMBER_BYTES:
                    raise ValueError(f"{shard}: {member.name} has {member.size:,} bytes; the limit is 256 MiB")
                content = tar.extractfile(member)
                assert content is not None
                data = content.read()
                if len(data) != member.size:
                    raise ValueError(f"{shard} breaks off within {member.name}")
                yield member, data
            end = tar.offset
        with shard.open("rb") as file:  # tarfile takes a broken header for the end
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError(f"{shard} is damaged: it has no end marker after its last readable member")
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{shard} is not a whole tar: {error}") from None


def codes_name(image: str) -> str:
    """Member name of an image's codes."""
    return image.rsplit(".", 1)[0] + CODES


if __name__ == "__main__":
    sys.exit(main())
