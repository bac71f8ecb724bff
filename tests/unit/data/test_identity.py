"""What tells files from others, and files that are both trained on and held out."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_gemini.config.data import DataConfig, SourceConfig
from megatron_gemini.data.sources import identity
from megatron_gemini.data.sources.identity import BLOCK, BLOCKS, files_identity, shared_with_validation


def write(path: Path, content: bytes) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("size", [1, BLOCK, BLOCK + 1, BLOCK * BLOCKS])
def test_every_byte_of_a_small_file_counts(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "a", bytes(size))
    before = files_identity([path])
    for place in {0, size // 3, size // 2, size - 1}:
        changed = bytearray(size)
        changed[place] = 1
        write(tmp_path / "a", bytes(changed))
        assert files_identity([path]) != before
    write(tmp_path / "a", bytes(size))
    assert files_identity([path]) == before


def test_of_a_large_file_both_ends_and_the_size_count_and_little_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 40 * BLOCK * BLOCKS
    path = write(tmp_path / "a", bytes(size))
    found = {files_identity([path])}
    for content in (b"1" + bytes(size - 1), bytes(size - 1) + b"1", bytes(size + 1), b"1" * size):
        write(tmp_path / "a", content)
        found.add(files_identity([path]))
    assert len(found) == 5
    read: list[int] = []
    true = identity.open_binary

    class Counted:
        def __init__(self, path: str) -> None:
            self.file = true(path)
            self.seek, self.__exit__ = self.file.seek, self.file.__exit__

        def __enter__(self) -> Counted:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def read(self, size: int) -> bytes:
            read.append(size)
            return self.file.read(size)

    monkeypatch.setattr(identity, "open_binary", Counted)
    files_identity([path])
    assert sum(read) == BLOCK * BLOCKS


def test_names_and_order_count_and_folders_do_not(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", b"1"), write(tmp_path / "b", b"1")
    assert files_identity([a]) != files_identity([b])
    assert files_identity([a, b]) != files_identity([b, a])
    assert files_identity([write(tmp_path / "other" / "a", b"1")]) == files_identity([a])


def test_what_is_no_file_goes_by_its_name_and_what_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert files_identity([str(tmp_path)]) == files_identity([str(tmp_path / "x" / tmp_path.name)])

    def broken(path: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(identity, "open_binary", broken)
    with pytest.raises(ValueError, match="cannot read 'x': Input/output error"):
        files_identity(["x"])


def test_files_that_are_trained_on_and_held_out_are_told(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.tar", b"1") for name in "abc"]
    (tmp_path / "link.tar").symlink_to(paths[1])

    def line(sources: list[SourceConfig], validation: list[SourceConfig]) -> str:
        return shared_with_validation(DataConfig(sources=tuple(sources), validation=tuple(validation)))

    trained = [SourceConfig(str(tmp_path / "[ab].tar"))]
    assert line(trained, [SourceConfig(paths[2])]) == line(trained, []) == ""
    assert line(trained, [SourceConfig(str(tmp_path / "absent.tar"))]) == ""
    assert line(trained, [SourceConfig(paths[0], filters=("held == true",))]) == ""
    assert line(trained, [SourceConfig(paths[0], task="text"), SourceConfig(paths[0])]).startswith(
        "warning: 1 files of"
    )
    assert "link.tar" in line(trained, [SourceConfig(str(tmp_path / "link.tar"))])
