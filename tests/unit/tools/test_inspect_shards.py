import json

import numpy as np
from PIL import Image

from megatron_gemini.building.contact_sheet import COLUMNS, GAP, TEXT, TILE, contact_sheet
from megatron_gemini.data.sources.shards import Shards
from tests.tiny_shards import document, png, sample, texts, write_tar
from tools import inspect_shards


def findings(capsys, *arguments):
    status = inspect_shards.main([*map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_sound_shards_are_counted_and_called_so(tmp_path, capsys):
    one = write_tar(tmp_path / "x-0.tar", ((f"a{i}", sample(i)) for i in range(3)))
    two = write_tar(tmp_path / "x-1.tar", [("d", document(0))])
    status, found = findings(capsys, one, two)
    assert (status, found["samples"], found["read"], found["bad"], found["damage"]) == (0, 4, 4, {}, {})
    assert found["kinds"] == {"codes.json + mp4 + png + txt + wav": 3, "0.png + 1.codes.json + json": 1}
    assert found["bytes"] == sum(len(data) for i in range(3) for data in sample(i).values()) + sum(
        map(len, document(0).values())
    )
    assert inspect_shards.main([str(tmp_path / "x-{0..1}.tar"), "--at-most", "1"]) == 0
    printed = capsys.readouterr().out
    assert "4 samples" in printed and "; 2 read" in printed and "nothing is damaged" in printed
    assert "image width" in printed and "audio seconds" in printed


def test_damage_is_counted_by_reason_with_the_name_of_the_first(tmp_path, capsys):
    samples = [
        ("good", {"png": png(), "txt": b"good"}),
        ("half", {"png": png()[:100], "txt": b"half"}),
        ("text", {"png": png(), "txt": b"\xff"}),
        ("json", {"json": b"{", "txt": b"x"}),
        ("../up", {"txt": b"x"}),
        ("other", {"bin": b"anything"}),
    ]
    shard = write_tar(tmp_path / "x.tar", samples)
    nothing = tmp_path / "nothing.tar"
    nothing.write_bytes(b"no tar" * 200)
    broken = tmp_path / "broken.tar"
    texts(broken, 8)
    broken.write_bytes(broken.read_bytes()[:2000])
    status, found = findings(capsys, shard, nothing, broken, "--sheet", tmp_path / "s.png")
    assert status == 1
    counts = {reason: entry["count"] for reason, entry in found["bad"].items()}
    assert counts == {"image_corrupt": 1, "bad_text": 1, "bad_json": 1, "tar_unsafe_name": 1, "tar_damaged": 1}
    assert "half.png" in found["bad"]["image_corrupt"]["first"]
    assert set(found["damage"]) == {str(nothing), str(broken)}
    assert Image.open(tmp_path / "s.png").width > TILE
    assert inspect_shards.main([str(tmp_path / "none-*.tar")]) == 2


def test_a_sheet_shows_its_samples_in_order_and_a_reason_for_what_it_cannot_show(tmp_path):
    def flat(level):
        return png_of(np.full((20, 40, 3), level, np.uint8))

    def png_of(pixels):
        path = tmp_path / "p.png"
        Image.fromarray(pixels).save(path)
        return path.read_bytes()

    levels = [20 * i for i in range(10)]
    samples = [(f"s{i}", {"png": flat(level), "txt": b"a caption"}) for i, level in enumerate(levels)]
    samples.append(("t", {"txt": b"no picture"}))
    samples += [("v", {"mp4": sample(1)["mp4"]}), ("w", {"wav": sample(1)["wav"]}), ("x", {"wav": b"no sound"})]
    sheet = contact_sheet(Shards([write_tar(tmp_path / "x.tar", samples)]))
    assert sheet.size == (COLUMNS * (TILE + GAP) + GAP, 2 * (TILE + TEXT + GAP) + GAP)
    for i, level in enumerate(levels):
        middle = (GAP + i % COLUMNS * (TILE + GAP) + TILE // 2, GAP + i // COLUMNS * (TILE + TEXT + GAP) + TILE // 2)
        assert sheet.getpixel(middle) == (level,) * 3
    grey = (211, 211, 211)
    second = GAP + TILE + TEXT + GAP  # the top of the second row
    corners = [sheet.getpixel((GAP + column * (TILE + GAP) + 5, second + 5)) for column in (2, 5)]
    assert corners == [grey, grey]
    clip, sound = (
        np.asarray(sheet)[second : second + TILE, GAP + column * (TILE + GAP) :][:, :TILE] for column in (3, 4)
    )
    assert all((picture != 255).any() and not (picture == grey).all() for picture in (clip, sound))
