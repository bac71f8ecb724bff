"""Whole builds by the command: what is kept, what is counted, and that a killed build ends as an untouched one."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image, features

from megatron_gemini.building import fetch
from megatron_gemini.building.journal import Journal
from megatron_gemini.config.data import SourceConfig
from megatron_gemini.data.loading.loader import Loader
from megatron_gemini.data.sources.paths import expand_shards
from megatron_gemini.data.sources.shards import Shards
from tests.tiny_shards import FORM, LAYOUT, Characters, keys_of, run_config
from tests.unit.building.pictures import encoded, smooth
from tools import build_shards

ROOT = Path(__file__).parents[3]
AVIF = features.check("avif")


def run(*arguments):
    return build_shards.main([*map(str, arguments), "--workers", "2"])


def folder(path, count, size=24):
    path.mkdir()
    for i in range(count):
        (path / f"{i:03d}.png").write_bytes(encoded(smooth(i, size)))
        (path / f"{i:03d}.txt").write_text(f"picture {i}\n")
    return path


def report(out):
    value = json.loads((out / "report.json").read_text())
    return value, {reason: found["count"] for reason, found in value["dropped"].items()}


def shard_bytes(out):
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


def test_a_folder_of_pictures_becomes_shards_that_train(tmp_path, capsys):
    pictures, out = folder(tmp_path / "in", 7), tmp_path / "out"
    original = (pictures / "000.png").read_bytes()
    (pictures / "100.jpg").write_bytes(original)  # the same file, called otherwise
    (pictures / "100.txt").write_text("again")
    (pictures / "101.jpg").write_bytes(encoded(smooth(1, 48), "JPEG", quality=80))  # the same picture, another size
    (pictures / "101.txt").write_text("again")
    (pictures / "102.gif").write_bytes(encoded(smooth(50, 24), "GIF"))
    (pictures / "102.txt").write_text("a gif")
    (pictures / "103.png").write_bytes(encoded(smooth(51, 4)))
    (pictures / "103.txt").write_text("small")
    (pictures / "104.png").write_bytes(original[:200])
    (pictures / "104.txt").write_text("half")
    (pictures / "105.png").write_bytes(b"no picture")
    (pictures / "105.txt").write_text("what")
    (pictures / "106.png").write_bytes(encoded(smooth(52, 24)))  # no caption
    os.mkfifo(pictures / "107.png")  # nobody will ever write to it
    (pictures / "107.txt").write_text("pipe")
    (pictures / "108.png").write_bytes(encoded(smooth(53, 24)))
    (pictures / "108.txt").write_bytes(b"\xff\xfe")

    assert (
        run("--images", pictures, "--out", out, "--dedup", "perceptual", "--min-side", 8, "--samples-per-shard", 3) == 0
    )
    value, dropped = report(out)
    assert (value["records"], value["kept"]) == (16, 8)
    assert dropped == {
        "duplicate_file": 1,
        "duplicate_picture": 1,
        "image_small": 1,
        "image_corrupt": 1,
        "image_unreadable": 1,
        "no_caption": 1,
        "no_regular_file": 1,
        "bad_text": 1,
    }
    assert value["shards"] == {"shard-00000.tar": 3, "shard-00001.tar": 3, "shard-00002.tar": 2}
    printed = capsys.readouterr().out
    assert "duplicate_picture" in printed and "101.jpg" in printed and "50.0%" in printed
    for name in ("sizes.png", "samples.png"):
        Image.open(out / name).verify()

    shards = Shards(expand_shards(str(out / "shard-{00000..00002}.tar")))
    assert keys_of(shards) == [f"{number:09d}" for number in (0, 1, 2, 3, 4, 5, 6, 9)]
    members = shards.read(0, ["png", "txt", "json"])
    assert (members["png"], members["txt"]) == (original, b"picture 0")
    described = json.loads(members["json"])
    assert described == {"source": "000.png", "sha256": described["sha256"], "width": 24, "height": 24}
    config = run_config([SourceConfig(shards=str(out / "*.tar"), task="caption", name="c")], cache_bytes=0)
    with Loader(config, 0, 1, LAYOUT, Characters(), FORM) as loader:
        assert all(loader.sources[0].document(position) for position in range(8))
        loader.next()
        assert not loader.skipped


def test_pictures_of_all_kinds_that_pillow_reads_are_built_and_others_are_shown(tmp_path, capsys):
    pictures, out = tmp_path / "in", tmp_path / "out"
    pictures.mkdir()
    kinds = {"a.jfif": "JPEG", "b.tif": "TIFF", "c.gif": "GIF", "d.bmp": "BMP", **({"e.avif": "AVIF"} if AVIF else {})}
    for seed, (name, kind) in enumerate(kinds.items()):
        (pictures / name).write_bytes(encoded(smooth(seed, 24), kind))
    for name in ("x.svg", "y.svg", "z.heic"):
        (pictures / name).write_text("<svg/>")
    assert run("--images", pictures, "--captions", "name", "--out", out) == 0
    value, dropped = report(out)
    assert (value["kept"], dropped) == (len(kinds), {})
    assert value["passed_over"] == {".svg": 2, ".heic": 1}
    assert "passed over" in (printed := capsys.readouterr().out) and "2 .svg, 1 .heic" in printed
    endings = [Shards([str(out / "shard-00000.tar")]).endings(sample)[0] for sample in range(len(kinds))]
    assert endings == ["jpg", *["png"] * (len(kinds) - 1)]


def test_a_table_is_filtered_by_its_columns_before_a_file_is_opened(tmp_path):
    folder(tmp_path / "in", 3)
    lines = [
        {"image": "000.png", "caption": "a good one", "similarity": 0.4, "NSFW": "UNLIKELY"},
        {"image": "nowhere.png", "caption": "too low", "similarity": 0.2, "NSFW": "UNLIKELY"},
        {"image": "001.png", "caption": "unsure", "similarity": 0.4, "NSFW": "UNSURE"},
        {"image": "002.png", "caption": "короткая подпись", "similarity": 0.4, "NSFW": "UNLIKELY"},
        {"image": "nowhere.png", "caption": "gone", "similarity": 0.4, "NSFW": "UNLIKELY"},
        {"image": "../in/../../x.png", "caption": "outside", "similarity": 0.4, "NSFW": "UNLIKELY"},
    ]
    (tmp_path / "in" / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    limits = ("--min", "similarity=0.3", "--only", "NSFW=UNLIKELY,0", "--script", "latin")
    assert run("--table", tmp_path / "in" / "t.jsonl", "--out", out, *limits) == 0
    _, dropped = report(out)
    expected = ("low_similarity", "other_NSFW", "caption_script", "no_file", "path_outside")
    assert dropped == dict.fromkeys(expected, 1)
    described = json.loads(Shards([str(out / "shard-00000.tar")]).read(0, ["json"])["json"])
    assert (described["similarity"], described["NSFW"], described["source"]) == (0.4, "UNLIKELY", "000.png")


def test_a_build_from_addresses_counts_what_its_fetcher_refuses(tmp_path, monkeypatch):
    site = folder(tmp_path / "site", 2)
    handler = partial(type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None}), directory=site)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        here = f"http://site.test:{server.server_port}"
        real = socket.getaddrinfo
        known = {"site.test": "127.0.0.1", "inner.test": "10.0.0.7"}
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda host, *rest, **named: real(known.get(host, host), *rest, **named)
        )
        public = fetch.is_public
        monkeypatch.setattr(fetch.Fetcher, "is_allowed", staticmethod(lambda ip: ip == "127.0.0.1" or public(ip)))
        monkeypatch.setattr(fetch.Fetcher.__init__, "__defaults__", (20_000_000, 20.0, 5, fetch.Fetcher.is_allowed))
        lines = ["url,caption,sha256", f"{here}/000.png,one,", f"{here}/001.png,two,{'0' * 64}"]
        lines += [f"{here}/none.png,three,", "http://inner.test/x.png,four,", "file:///etc/passwd,five,"]
        (tmp_path / "t.csv").write_text("\n".join(lines))
        assert run("--table", tmp_path / "t.csv", "--out", tmp_path / "out") == 0
        server.shutdown()
    value, dropped = report(tmp_path / "out")
    assert value["kept"] == 1
    assert dropped == dict.fromkeys(("wrong_hash", "http_404", "host_not_public", "url_scheme"), 1)


def test_no_record_ends_a_build(tmp_path, monkeypatch, capsys):
    """Names that cannot be encoded or looked up, numbers beyond every type, and what nobody thought of."""
    pictures = folder(tmp_path / "in", 2)
    with open(os.fsencode(pictures) + b"/caf\xe9.png", "wb") as file:
        file.write(b"no picture, and a name that is no text")
    assert run("--images", pictures, "--captions", "name", "--out", tmp_path / "names") == 0
    assert "bad_text" in capsys.readouterr().out
    lines = [{"image": "000.png", "caption": "one", "n": 10**400}, {"image": "\ud83d.png", "caption": "half"}]
    lines += [
        {"image": "x\0.png", "caption": "zero"},
        {"image": "001.png", "caption": "two", "n": 1, "\ud83d": "\ud83d"},
    ]
    lines += [{"image": "n" * 5000, "caption": "long"}]
    (pictures / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert (
        run("--table", pictures / "t.jsonl", "--out", tmp_path / "files", "--min", "n=1", "--max", f"n={10**30}") == 0
    )
    value, dropped = report(tmp_path / "files")
    assert value["kept"] == 1
    assert dropped == {"no_n": 2, "path_outside": 2}
    urls = [
        "http://\ud83d.test/",
        "http://a.test/\ud83d",
        "http://a.test/?\ud83d",
        "http://" + "ü" * 300 + "/",
        "http://.:80/",
    ]
    (pictures / "u.jsonl").write_text("\n".join(json.dumps({"url": url, "caption": "x"}) for url in urls))
    assert run("--table", pictures / "u.jsonl", "--out", tmp_path / "urls") == 2
    assert report(tmp_path / "urls")[1] == {"url_invalid": 5}
    monkeypatch.setattr("megatron_gemini.building.examine.decode_image", lambda data: 1 // 0)
    assert run("--images", pictures, "--captions", "name", "--out", tmp_path / "wall") == 2
    assert report(tmp_path / "wall")[1] == {"record_failed": 2, "bad_text": 1}


def test_a_lost_shard_takes_what_was_built_after_it_along(tmp_path):
    """What comes of a record may be another thing the second time: here a file that was lost has come back."""
    pictures, out = folder(tmp_path / "in", 12), tmp_path / "out"
    rows = [json.dumps({"image": f"{i:03d}.png", "caption": str(i)}) for i in range(12)]
    (pictures / "t.jsonl").write_text("\n".join(rows))
    (pictures / "003.png").rename(tmp_path / "kept")
    command = ("--table", pictures / "t.jsonl", "--out", out, "--samples-per-shard", "2")
    assert run(*command) == 0
    assert len(report(out)[0]["shards"]) == 6
    (out / "shard-00001.tar").unlink()
    (tmp_path / "kept").rename(pictures / "003.png")
    kill_at, add = 2, Journal.add

    def killed(self, entry):
        add(self, entry)
        if len(self.entries) == kill_at:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", killed)
        assert run(*command) == 130
    assert run(*command) == 0
    keys = [key for name in sorted(report(out)[0]["shards"]) for key in keys_of(Shards([str(out / name)]))]
    assert keys == [f"{number:09d}" for number in range(12)]
    assert {path.name for path in out.glob("*.tar")} == set(report(out)[0]["shards"])


KILLED = """
import os, signal, sys
from tools import build_shards
replace, shards = os.replace, []
def kill_at_the_fourth_shard(source, to):
    if str(to).endswith(".tar"):
        shards.append(to)
    if len(shards) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, to)
os.replace = kill_at_the_fourth_shard
build_shards.main(sys.argv[1:])
"""


def test_a_killed_build_goes_on_and_ends_with_the_same_shards(tmp_path):
    pictures = folder(tmp_path / "in", 60)
    (pictures / "030.png").write_bytes((pictures / "002.png").read_bytes())  # a duplicate of an earlier shard's sample
    command = ["--images", str(pictures), "--samples-per-shard", "4", "--workers", "1"]
    assert build_shards.main([*command, "--out", str(tmp_path / "whole")]) == 0
    killed = tmp_path / "killed"
    process = subprocess.run([sys.executable, "-c", KILLED, *command, "--out", str(killed)], cwd=ROOT)
    assert process.returncode == -signal.SIGKILL
    assert len(list(killed.glob("*.tar"))) == 3, "it was not killed half-way"
    (killed / "shard-00001.tar").write_bytes(b"")  # a shard that the disk lost is made again, with all after it
    assert build_shards.main([*command, "--out", str(killed)]) == 0
    assert shard_bytes(killed) == shard_bytes(tmp_path / "whole")
    assert report(killed)[0]["dropped"] == report(tmp_path / "whole")[0]["dropped"]


def test_a_finished_build_is_left_alone_and_another_is_not_mixed_in(tmp_path, capsys):
    pictures, out = folder(tmp_path / "in", 2), tmp_path / "out"
    assert run("--images", pictures, "--out", out) == 0
    before = (out / "shard-00000.tar").stat().st_mtime_ns
    assert run("--images", pictures, "--out", out) == 0
    assert (out / "shard-00000.tar").stat().st_mtime_ns == before
    assert run("--images", pictures, "--out", out, "--min-side", 30) == 2
    assert "holds a build with other options; choose another --out" in capsys.readouterr().err
    (pictures / "000.txt").write_text("another caption")
    assert run("--images", pictures, "--out", out) == 2
    assert "holds a build with other input" in capsys.readouterr().err


def contents(paths):
    return [
        [shards.read(i, ["png", "txt"]) for i in range(len(shards))]
        for shards in map(Shards, [[str(p)] for p in paths])
    ]


def test_validation_is_held_out_by_content_beside_the_shards(tmp_path, capsys):
    pictures = folder(tmp_path / "in", 40)
    for i in range(20):  # each again, under a name that comes much later
        (pictures / f"{i + 100}.png").write_bytes((pictures / f"{i:03d}.png").read_bytes())
        (pictures / f"{i + 100}.txt").write_text("again")
    command = ("--images", pictures, "--samples-per-shard", "7", "--validation", "0.3", "--dedup", "none")
    assert run(*command, "--out", tmp_path / "out") == 0
    assert "held out" in capsys.readouterr().out
    value, _ = report(tmp_path / "out")
    train, held_out = (sorted((tmp_path / "out" / inner).glob("shard-*.tar")) for inner in ("", "validation"))
    sides = [[sample["png"] for shard in contents(side) for sample in shard] for side in (train, held_out)]
    assert not set(sides[0]) & set(sides[1])
    assert sorted(map(len, sides)) == sorted((value["held_out"], 60 - value["held_out"]))
    assert sum(value["shards"].values()) == value["kept"] == 60
    assert 6 <= len(set(sides[1])) <= 18  # 12 of 40 are expected
    # Alone, each is on the same side: no other sample decides.
    assert run("--images", pictures, "--validation", "0.3", "--out", tmp_path / "other", "--dedup", "exact") == 0
    alone = contents(sorted((tmp_path / "other" / "validation").glob("*.tar")))
    assert {sample["png"] for shard in alone for sample in shard} == set(sides[1])
    # One whose shard of validation is lost is built again from there, the same.
    before = shard_bytes(tmp_path / "out"), shard_bytes(tmp_path / "out" / "validation")
    held_out[1].unlink()
    assert run(*command, "--out", tmp_path / "out") == 0
    assert (shard_bytes(tmp_path / "out"), shard_bytes(tmp_path / "out" / "validation")) == before
    assert len(expand_shards(str(tmp_path / "out" / "*.tar"))) == len(train)


def test_workers_do_not_change_the_shards(tmp_path):
    pictures = folder(tmp_path / "in", 9)
    for workers in ("1", "3"):
        assert (
            build_shards.main(["--images", str(pictures), "--out", str(tmp_path / workers), "--workers", workers]) == 0
        )
    assert shard_bytes(tmp_path / "1") == shard_bytes(tmp_path / "3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "nowhere"], "'nowhere' is no folder"),
        (["--table", "nowhere.xlsx"], "there are .csv, .tsv, .jsonl, .parquet"),
        (["--table", "nowhere.csv"], "No such file"),
        (["--table", "t.csv", "--min", "similarity"], "write COLUMN=VALUE"),
        (["--table", "t.csv", "--max", "punsafe=low"], "--max takes a number"),
        (["--table", "t.csv", "--max", "punsafe=nan"], "--max takes a number"),
        (["--table", "t.csv", "--max-bytes", str(10**30)], "--max-bytes is 1000"),
        (["--table", "t.csv", "--seconds", "1e30"], "--seconds is 1e+30"),
        (["--table", "t.csv", "--seconds", "nan"], "--seconds is nan"),
        (["--table", "t.csv", "--validation", "1"], "--validation is 1.0"),
        (["--table", "t.csv", "--samples-per-shard", "0"], "--samples-per-shard is 0"),
        (["--table", "t.csv", "--dedup-bits", "40"], "--dedup-bits is 40"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("image,caption\na.png,x\n")
    assert run(*arguments, "--out", "out") == 2
    assert message in capsys.readouterr().err


def test_a_build_in_which_nothing_can_be_used_shows_why(tmp_path, capsys):
    pictures = folder(tmp_path / "in", 2, size=8)
    assert run("--images", pictures, "--out", tmp_path / "out", "--min-side", 9) == 2
    error = capsys.readouterr().err
    assert "no record can be used" in error and "image_small" in error and "8 x 8 pixels" in error
