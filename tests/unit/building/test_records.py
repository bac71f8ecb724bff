import json
import re
from pathlib import Path

import pytest

from megatron_gemini.building.captions import CaptionOrigin
from megatron_gemini.building.folders import IMAGE_FILES, folder_records
from megatron_gemini.building.records import Columns, row_count, table_records


def rows(path, **columns):
    return list(table_records(str(path), Columns(**columns)))


def test_folders_are_read_in_the_order_of_their_names(tmp_path):
    for name in ("b/2.PNG", "b/1.jpg", "a.webp", "b/note.txt", "c/x.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found, passed_over = folder_records([str(tmp_path)], CaptionOrigin.TXT)
    assert passed_over == {".txt": 1}
    assert [record.image for record in found] == [
        str(tmp_path / n) for n in ("a.webp", "b/1.jpg", "b/2.PNG", "c/x.gif")
    ]
    assert [record.number for record in found] == [0, 1, 2, 3]
    assert found[1].caption == tmp_path / "b/1.txt"
    with pytest.raises(ValueError, match="is no folder"):
        folder_records([str(tmp_path / "nowhere")], CaptionOrigin.TXT)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no picture"):
        folder_records([str(tmp_path / "empty")], CaptionOrigin.TXT)


def test_what_is_no_picture_is_counted_by_its_ending(tmp_path):
    out = tmp_path / "shards"
    for name in (
        "a.jfif",
        "a.txt",
        "b.TIF",
        "c.avif",
        "x.svg",
        "deep/y.SVG",
        "z.heic",
        "notes",
        "odd.%$",
        "orphan.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "elsewhere").symlink_to(tmp_path / "deep")
    out.mkdir()
    (out / "shard-00000.tar").touch()
    found, passed_over = folder_records([str(tmp_path)], CaptionOrigin.TXT, out)
    assert [Path(record.image).name for record in found] == ["a.jfif", "b.TIF", "c.avif"]
    assert passed_over == {".svg": 2, ".heic": 1, ".txt": 1, "without a usual ending": 2, "linked folders": 1}
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "logo.svg").touch()
    with pytest.raises(ValueError, match=r"there is no picture \(.png, .*but 1 .svg"):
        folder_records([str(tmp_path / "only")], CaptionOrigin.TXT)


def test_the_document_lists_the_endings_that_are_read():
    text = (Path(__file__).parents[3] / "docs/building.md").read_text()
    listed = text[text.index("Read are files called") : text.index("All others")]
    assert tuple(re.findall(r"`(\.\w+)`", listed)) == IMAGE_FILES


def test_captions_of_names(tmp_path):
    (tmp_path / "polar_bear").mkdir()
    picture = tmp_path / "polar_bear" / "on-the_ice.png"
    assert CaptionOrigin.FOLDER.of(picture) == "polar bear"
    assert CaptionOrigin.NAME.of(picture) == "on the ice"


def test_every_kind_of_table_gives_the_same_records(tmp_path):
    values = [{"image": f"{i}.png", "caption": f"picture, {i}", "similarity": i / 10} for i in range(5)]
    header, *lines = [list(values[0]), *(list(v.values()) for v in values)]
    for ending, mark in ((".csv", ","), (".tsv", "\t")):
        quoted = (mark.join(f'"{value}"' for value in line) for line in [header, *lines])
        (tmp_path / f"t{ending}").write_text("\n".join(quoted))
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, values)))
    expected = [(i, str(tmp_path / f"{i}.png"), f"picture, {i}") for i in range(5)]
    for ending in (".csv", ".tsv", ".jsonl"):
        found = rows(tmp_path / f"t{ending}")
        assert [(r.number, r.image, r.caption) for r in found] == expected
        assert [float(r.columns["similarity"]) for r in found] == [v["similarity"] for v in values]


def test_parquet_gives_the_same_records(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    values = {"URL": ["http://a.test/1", "http://a.test/2"], "TEXT": ["one", None], "NSFW": ["UNLIKELY", "NSFW"]}
    parquet.write_table(pyarrow.table({**values, "similarity": [0.5, float("nan")]}), tmp_path / "t.parquet")
    one, two = rows(tmp_path / "t.parquet")
    assert (one.image, one.is_url, one.caption) == ("http://a.test/1", True, "one")
    assert one.columns == {"NSFW": "UNLIKELY", "similarity": 0.5}
    assert (two.caption, two.columns) == (None, {"NSFW": "NSFW"})
    assert row_count(str(tmp_path / "t.parquet")) == 2


def test_columns_that_are_unclear_or_missing_are_told(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("where,says\na.png,hello\n")
    with pytest.raises(ValueError, match=r"is not clear; give --image-column or --url-column one of where, says"):
        rows(path)
    with pytest.raises(ValueError, match=r"--caption-column one of where, says"):
        rows(path, image="where")
    with pytest.raises(ValueError, match=r"has no column 'here'; it has where, says"):
        rows(path, image="here")
    (record,) = rows(path, image="where", caption="says", root=str(tmp_path / "deep"))
    assert (record.image, record.caption) == (str(tmp_path / "deep" / "a.png"), "hello")


@pytest.mark.parametrize("place", ["../x.png", "/etc/passwd", "a/../../x.png", "link/x.png", "nul\0.png"])
def test_a_table_cannot_name_files_outside_its_folder(place, tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path)
    (inside / "t.jsonl").write_text(json.dumps({"image": place, "caption": "x"}))
    (record,) = rows(inside / "t.jsonl")
    assert (record.problem, record.image) == ("path_outside", "")


def test_rows_that_cannot_be_read_are_counted_where_they_stand(tmp_path):
    good = json.dumps({"image": "a.png", "caption": "x"}).encode()
    lines = [
        b"nonsense",
        good,
        b"[1]",
        b"[" * 100_000,
        b'"' + b"x" * 3_000_000,
        b"\xff\xfe",
        b"",
        good,
        b'{"caption": "x", "image": 3}',
    ]
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines))
    found = [record.problem for record in rows(tmp_path / "t.jsonl")]
    assert found == ["bad_row", "", "bad_row", "bad_row", "bad_row", "bad_row", "", "no_image"]
    (tmp_path / "t.csv").write_bytes(b"image,caption\na.png,x\nb.png\n" + b"y" * 2_000_000 + b",x\nc.png,\xff\n")
    found = [(record.problem, record.caption) for record in rows(tmp_path / "t.csv")]
    assert found == [("", "x"), ("bad_row", None), ("bad_row", None), ("", "\ufffd")]


def test_a_row_that_lacks_a_column_is_no_error(tmp_path):
    lines = [
        {"url": "http://a.test/1", "caption": "x", "sha256": "AB", "n": [1]},
        {"url": "http://a.test/2"},
        {"caption": "y"},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    one, two, three = rows(tmp_path / "t.jsonl")
    assert (one.hashes, one.columns) == ({"sha256": "ab"}, {"sha256": "AB"})
    assert (two.caption, two.problem) == (None, "")
    assert three.problem == "no_image"
