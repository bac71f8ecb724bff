"""What makes a shard another one for a build, and how long a name may be that a stranger's document gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_gemini.data.sources.attachments import read_attachment
from megatron_gemini.data.sources.shard_writer import shard_digest
from megatron_gemini.modalities.bad_sample import BadSample
from tests.tiny_shards import write_tar


def digest(folder: Path, members: dict[str, bytes]) -> str:
    return shard_digest(Path(write_tar(folder / "x.tar", [("a", members)])))


def test_names_sizes_and_contents_make_a_shard_another_one(tmp_path: Path) -> None:
    members = {"txt": b"one", "cls": b"two"}
    begun = digest(tmp_path, members)
    assert digest(tmp_path, dict(members)) == begun
    others = [{"txt": b"one", "cls2": b"two"}, {"txt": b"onet", "cls": b"wo"}, {"txt": b"one", "cls": b"owt"}]
    assert len({begun, *(digest(tmp_path, other) for other in others)}) == 4


def test_codes_that_are_added_later_leave_it_the_same(tmp_path: Path) -> None:
    begun = digest(tmp_path, {"txt": b"one"})
    assert digest(tmp_path, {"txt": b"one", "codes.json": b"[1]"}) == begun


def test_a_name_of_1024_characters_is_looked_for_and_a_longer_one_refused(tmp_path: Path) -> None:
    longest = ("a" * 127 + "/") * 8
    longest = longest[:-1] + "b"
    assert len(longest) == 1024
    assert read_attachment(str(tmp_path / "x.tar"), longest) is None
    with pytest.raises(BadSample) as error:
        read_attachment(str(tmp_path / "x.tar"), longest + "c")
    assert error.value.reason == "unsafe_name"
