"""Tars are read by their headers, and what they may not hold is left out and counted."""

import io
import json
import os
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.data.sources import shards as shards_module
from megatron_gemini.data.sources.index_cache import read_members, read_summary, write_index
from megatron_gemini.data.sources.paths import expand_shards
from megatron_gemini.data.sources.shards import MAX_TEXT_BYTES, Shards
from megatron_gemini.data.sources.tar_index import index_tar
from megatron_gemini.modalities.bad_sample import BadSample
from tests.tiny_shards import add, keys_of, write_tar


def tar_of(path, *headers, format=tarfile.PAX_FORMAT):
    """A tar of (name, type, data) members as given, however wrong."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, kind, data in headers:
            header = tarfile.TarInfo(name)
            header.type, header.size, header.linkname = kind, len(data), "/etc/passwd"
            tar.addfile(header, io.BytesIO(data))
    return str(path)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_reads_as_the_standard_library_does(tmp_path, format):
    long, non_ascii = "d/" * 60 + "k.txt", "größe-ключ.txt"
    names = ["a.txt", "./b.codes.json", "e/f.png", non_ascii, *([] if format == tarfile.USTAR_FORMAT else [long * 2])]
    path = tar_of(tmp_path / "x.tar", *((n, tarfile.REGTYPE, n.encode() * 99) for n in names), format=format)
    index = index_tar(path)
    assert not index.rejected
    assert not index.damage
    with tarfile.open(path) as tar:
        assert [member.name for member in index.members] == [m.name.removeprefix("./") for m in tar.getmembers()]
        for member, theirs in zip(index.members, tar.getmembers(), strict=True):
            assert (member.offset, member.size) == (theirs.offset_data, theirs.size)


def test_members_of_one_key_are_one_sample_wherever_they_lie(tmp_path):
    path = tar_of(tmp_path / "x.tar", *((n, tarfile.REGTYPE, n.encode()) for n in ("a.txt", "d/a.txt", "a.codes.json")))
    shards = Shards([path])
    assert keys_of(shards) == ["a", "d/a"]
    assert shards.endings(0) == ["txt", "codes.json"]
    assert shards.read(0, ["codes.json", "png"]) == {"codes.json": b"a.codes.json"}
    assert shards.read(1, ["txt"]) == {"txt": b"d/a.txt"}


def test_what_a_tar_may_not_hold_is_left_out_and_counted(tmp_path):
    path = tar_of(
        tmp_path / "x.tar",
        ("good.txt", tarfile.REGTYPE, b"good"),
        ("./", tarfile.DIRTYPE, b""),
        ("../up.txt", tarfile.REGTYPE, b"x"),
        ("a/../../up.txt", tarfile.REGTYPE, b"x"),
        ("/etc/cron.d/x.txt", tarfile.REGTYPE, b"x"),
        ("new\nline.txt", tarfile.REGTYPE, b"x"),
        ("..\\up.txt", tarfile.REGTYPE, b"x"),
        ("symlink.txt", tarfile.SYMTYPE, b""),
        ("hardlink.txt", tarfile.LNKTYPE, b""),
        ("device.txt", tarfile.CHRTYPE, b""),
        ("pipe.txt", tarfile.FIFOTYPE, b""),
        ("good.txt", tarfile.REGTYPE, b"again"),
    )
    shards = Shards([path])
    assert keys_of(shards) == ["good"]
    assert shards.read(0, ["txt"]) == {"txt": b"good"}
    assert shards.rejected == {"tar_unsafe_name": 5, "tar_link": 2, "tar_special_file": 2, "tar_duplicate": 1}


def test_a_member_above_the_limit_is_left_out_before_it_is_read(tmp_path):
    path = tar_of(tmp_path / "x.tar", ("a.txt", tarfile.REGTYPE, b"x" * 11), ("b.txt", tarfile.REGTYPE, b"x" * 10))
    index = index_tar(path, max_member_bytes=10)
    assert [member.name for member in index.members] == ["b.txt"]
    assert index.rejected == {"tar_member_too_large": 1}


def test_long_texts_are_refused_before_they_are_read(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a", {"txt": b"x" * (MAX_TEXT_BYTES + 1), "png": b"p"})])
    with pytest.raises(BadSample, match=r"a\.txt has 1,048,577 bytes") as error:
        Shards([path]).read(0, ["txt"])
    assert error.value.reason == "text_too_large"


@pytest.mark.parametrize(
    ("length", "keys", "where"),
    [
        (2048, ["a", "b"], "without an end marker"),
        (2000, ["a", "b"], "without an end marker"),  # the data is whole, only its padding is not
        (1600, ["a"], "within a member"),
        (1536, ["a"], "within a member"),
        (1500, ["a"], "within a header"),
        (1024, ["a"], "without an end marker"),
    ],
)
def test_a_truncated_tar_gives_what_is_whole_and_is_named(tmp_path, length, keys, where):
    path = write_tar(tmp_path / "x.tar", [("a", {"txt": b"a" * 100}), ("b", {"txt": b"b" * 100})])
    os.truncate(path, length)
    shards = Shards([path])
    assert keys_of(shards) == keys
    assert [shards.read(i, ["txt"])["txt"] for i in range(len(keys))] == [key.encode() * 100 for key in keys]
    assert where in shards.damage[path]
    assert shards.rejected == {"tar_damaged": 1}


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 5119), st.integers(0, 255), st.integers(0, 5120))
def test_no_damage_makes_the_reader_fail_or_read_beyond_the_file(tmp_path_factory, place, byte, length):
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    write_tar(path, [("a" * 120, {"txt": b"a" * 100}), ("b", {"txt": b"b" * 600})])
    data = bytearray(path.read_bytes()[:5120])
    data[place % len(data)] = byte
    path.write_bytes(data[:length])
    for member in index_tar(str(path)).members:
        assert 0 <= member.offset <= member.offset + member.size <= length


def test_an_oversized_extended_header_is_not_read(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [("a", {"txt": b"a"})])
    with tarfile.open(path, "a") as tar:
        header = tarfile.TarInfo("pax")
        header.type, header.size = tarfile.XHDTYPE, 10_000_000
        tar.addfile(header, io.BytesIO(b"0" * header.size))
        add(tar, "b.txt", b"b")
    index = index_tar(str(path))
    assert [member.name for member in index.members] == ["a.txt"]
    assert "extended header of 10,000,000 bytes" in index.damage


@pytest.mark.parametrize("content", [b"", b"\0" * 10240, b"not a tar at all" * 100])
def test_a_shard_without_a_sample_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "empty.tar"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"the shard '.*empty\.tar' holds no usable sample"):
        Shards([str(path)])


def test_a_shard_of_links_only_is_an_error_with_its_reasons(tmp_path):
    path = tar_of(tmp_path / "x.tar", ("a.txt", tarfile.SYMTYPE, b""), ("b.txt", tarfile.SYMTYPE, b""))
    with pytest.raises(ValueError, match=r"x\.tar' holds no usable sample \(tar_link: 2\)"):
        Shards([path])


def test_ranges_and_globs_expand_in_order(tmp_path):
    for number in (8, 9, 10, 11):
        (tmp_path / f"t-{number:03d}.tar").touch()
    names = [str(tmp_path / f"t-{number:03d}.tar") for number in (8, 9, 10, 11)]
    assert expand_shards(f"{tmp_path}/t-{{008..010}}.tar") == names[:3]
    assert expand_shards(f"{tmp_path}/t-*.tar") == names
    assert expand_shards(f"{tmp_path}/t-0{{0..1}}*.tar") == names


def test_no_match_names_the_pattern_and_the_nearest_files(tmp_path):
    (tmp_path / "train-000.tar").touch()
    (tmp_path / "other.tar").touch()
    with pytest.raises(
        ValueError, match=r"no shard matches '.*trian-\*\.tar'; the nearest that exist: .*train-000\.tar"
    ):
        expand_shards(f"{tmp_path}/trian-*.tar")
    with pytest.raises(ValueError, match=r"no shard matches '.*train-001\.tar'; the nearest that exist: .*train-000"):
        expand_shards(f"{tmp_path}/train-{{000..001}}.tar")
    with pytest.raises(ValueError, match=r"the folder '.*nowhere' does not exist"):
        expand_shards(f"{tmp_path}/nowhere/train-*.tar")
    with pytest.raises(ValueError, match="gives 0 shards"):
        expand_shards("t-{5..2}.tar")
    with pytest.raises(ValueError, match="gives 1,000,000,000 shards"):
        expand_shards("t-{1..1000000000}.tar")
    with pytest.raises(ValueError, match="set its `shards`"):
        expand_shards("")


def many(path, count):
    return write_tar(path, ((f"s{i:05d}", {"txt": b"%05d" % i, "png": b"p"}) for i in range(count)))


def test_listed_shards_are_not_opened_until_a_sample_is_asked_for(tmp_path, monkeypatch):
    paths = [many(tmp_path / f"{n}.tar", 3 + n) for n in range(4)]
    for path in paths:
        write_index(path)
    expected = [(f"s{i:05d}", {"txt": b"%05d" % i, "png": b"p"}) for n in range(4) for i in range(3 + n)]
    monkeypatch.setattr(shards_module, "index_tar", lambda path: pytest.fail(f"{path} was opened"))
    opened = []
    real = shards_module.read_members
    monkeypatch.setattr(shards_module, "read_members", lambda path, *rest: opened.append(path) or real(path, *rest))
    shards = Shards(paths)
    assert (len(shards), shards.first_sample, opened) == (18, [0, 3, 7, 12], [])
    assert shards.read(12, ["txt"]) == {"txt": b"00000"}
    assert opened == [paths[3]]
    assert [(shards.key(i), shards.read(i, ["txt", "png"])) for i in range(18)] == expected
    assert opened == [paths[3], *paths[:3]]


def test_an_index_of_another_tar_is_passed_over(tmp_path):
    path = many(tmp_path / "x.tar", 5)
    write_index(path)
    assert read_summary(path).samples == 5
    os.utime(path, ns=(1, 1))  # a copy: other times, the same headers
    assert read_summary(path).samples == 5
    write_tar(tmp_path / "x.tar", ((f"t{i:05d}", {"txt": b"%05d" % i, "png": b"p"}) for i in range(5)))
    assert read_summary(path) is None
    assert Shards([path]).key(0) == "t00000"


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 2000), byte=st.integers(0, 255), length=st.integers(0, 2000))
def test_a_damaged_index_is_never_trusted_beyond_its_tar(tmp_path_factory, place, byte, length):
    folder = tmp_path_factory.getbasetemp()
    path = many(folder / "indexed.tar", 3)
    write_index(path)
    file = folder / "indexed.tar.index.json"
    data = bytearray(file.read_bytes())
    data[place % len(data)] = byte
    file.write_bytes(data[: max(length, len(data) // 2)] if length < len(data) else data)
    summary = read_summary(path)
    members = None if summary is None else read_members(path, summary)
    for member in members or []:
        assert 512 <= member.offset <= member.offset + member.size <= os.path.getsize(path)
        assert ".." not in member.name.split("/")
    file.unlink()


def test_an_index_that_lies_about_its_members_is_not_used(tmp_path):
    path = many(tmp_path / "x.tar", 3)
    write_index(path)
    file = tmp_path / "x.tar.index.json"
    honest = file.read_text()
    assert json.loads(honest)["summary"]["samples"] == 3
    for lie in (honest.replace("s00000.txt", "../up.txt"), honest.replace("s00001.txt", "s00000.txt")):
        file.write_text(lie)
        assert keys_of(Shards([path])) == ["s00000", "s00001", "s00002"]
    file.write_text(honest.replace('"samples": 3', '"samples": 4'))
    with pytest.raises(BadSample, match="had 4 samples and has 3 now"):
        Shards([path]).read(0, ["txt"])


def test_the_index_of_a_large_tar_is_kept_in_the_folder_of_the_run(tmp_path, monkeypatch):
    path, cache = many(tmp_path / "x.tar", 500), tmp_path / "run" / "index"
    small = many(tmp_path / "y.tar", 5)
    assert len(Shards([path, small], cache)) == 505
    assert [file.name.split(".")[0] for file in cache.iterdir()] == ["x"]
    monkeypatch.setattr(shards_module, "index_tar", lambda path: pytest.fail(f"{path} was read again"))
    again = Shards([path], cache)
    assert again.read(499, ["txt"]) == {"txt": b"00499"}


def test_only_the_shards_used_last_are_kept_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_OPEN_MEMBERS", 25)
    shards = Shards([many(tmp_path / f"{n}.tar", 5) for n in range(5)])
    for sample in (*range(25), *range(24, -1, -3)):
        assert shards.read(sample, ["txt"]) == {"txt": b"%05d" % (sample % 5)}
        assert len(shards._open) <= 2
    with pytest.raises(IndexError):
        shards.key(25)


def test_a_folder_in_the_place_of_a_shard_is_called_one(tmp_path):
    (tmp_path / "x.parquet").mkdir()
    with pytest.raises(ValueError, match=r"matches .*; it is a folder: write .*x\.parquet/\* for the files in it"):
        expand_shards(str(tmp_path / "x.parquet"))
