"""Codes of another tokenizer than the run's are refused before the first step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.data.loading.loader import Loader
from megatron_gemini.modalities.image.code_tokenizer import ImageTokenizer, fingerprint
from megatron_gemini.objectives.codes import check_codes
from megatron_gemini.parallel.parameters import initialize
from tests.tiny_shards import FORM, IMAGE_TOKENIZER, LAYOUT, Characters, run_config, write_tar

CODES = [0] * IMAGE_TOKENIZER.codes_per_image


def tokenizer(seed: int) -> ImageTokenizer:
    made = ImageTokenizer(IMAGE_TOKENIZER)
    initialize(made, seed)
    return made


def loader(folder: Path, *makers: str | None) -> Loader:
    """Of a shard for each name of a tokenizer, the second as documents that name the file with their codes."""
    sources = []
    for number, maker in enumerate(makers):
        given = {"codes": CODES} if maker is None else {"codes": CODES, "tokenizer": maker}
        codes, task = json.dumps(given).encode(), ("generate", "interleave")[number % 2]
        document = json.dumps({"items": [{"text": "draw"}, {"codes": "x.codes.json"}]}).encode()
        members = {"txt": b"one", "codes.json": codes}
        if task == "interleave":
            members = {"json": document, "x.codes.json": codes}
        shard = write_tar(folder / f"{number}.tar", [("a", members)])
        sources.append(SourceConfig(shards=shard, task=task))
    return Loader(run_config(tuple(sources), lanes=2), 0, 1, LAYOUT, Characters(), FORM)


def test_codes_of_the_runs_own_tokenizer_and_those_that_do_not_say_pass(tmp_path: Path) -> None:
    own = tokenizer(0)
    with loader(tmp_path, fingerprint(own), fingerprint(own), None) as good:
        check_codes(good, own)
        check_codes(good, None)


@pytest.mark.parametrize("makers", [("other",), (None, "other"), ("OWN", "other")])
def test_codes_of_another_tokenizer_are_refused_with_both_names_and_the_shard(
    tmp_path: Path, makers: tuple[str | None, ...]
) -> None:
    own = tokenizer(0)
    named = [fingerprint(own) if maker == "OWN" else maker for maker in makers]
    with loader(tmp_path, *named) as mixed, pytest.raises(ValueError) as raised:
        check_codes(mixed, own)
    message = str(raised.value)
    assert fingerprint(own) in message and f"other ({tmp_path}/{len(makers) - 1}.tar)" in message
    assert "tools/encode_images.py" in message and "\n" not in message


def test_codes_of_two_tokenizers_are_refused_also_where_the_run_names_none(tmp_path: Path) -> None:
    with loader(tmp_path, "one", "other") as mixed, pytest.raises(ValueError, match=r"of two tokenizers, one \("):
        check_codes(mixed, None)


def test_another_tokenizer_has_another_name() -> None:
    assert fingerprint(tokenizer(0)) == fingerprint(tokenizer(0)) != fingerprint(tokenizer(1))
