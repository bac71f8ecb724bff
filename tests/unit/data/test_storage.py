"""Storage that fails for a moment costs no sample; storage that stays away ends the reading. Bad data are neither."""

import errno
import glob
import io
import json
import logging
import multiprocessing
import os
from types import SimpleNamespace

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_gemini.building import examine
from megatron_gemini.building.examine import read_file
from megatron_gemini.building.fetch import Fetcher
from megatron_gemini.building.filters import Filters
from megatron_gemini.building.records import Record
from megatron_gemini.config.data import SourceConfig
from megatron_gemini.data.loading import worker
from megatron_gemini.data.loading.loader import Loader
from megatron_gemini.data.loading.workers import WorkerPool
from megatron_gemini.data.sources import parquet, storage
from megatron_gemini.data.sources.attachments import read_attachment
from megatron_gemini.data.sources.parquet import Parquet
from megatron_gemini.data.sources.paths import expand_shards, open_binary
from megatron_gemini.data.sources.records import open_records
from megatron_gemini.data.sources.spec import FormatSpec
from megatron_gemini.data.sources.table import Table
from megatron_gemini.modalities.bad_sample import BadSample, DataUnreachable
from megatron_gemini.registry import FORMATS
from tests.tiny_shards import FORM, LAYOUT, Characters, run_config, write_tar


@pytest.fixture
def slept(monkeypatch):
    """The seconds that were slept, which pass at once."""
    found = []
    monkeypatch.setattr(storage, "sleep", found.append)
    return found


def write(folder, form):
    """A file of two samples, "one" and "two"."""
    path = folder / f"x.{form}"
    if form == "tar":
        write_tar(path, [("a", {"txt": b"one"}), ("b", {"txt": b"two"})])
    elif form == "jsonl":
        path.write_text('{"txt": "one"}\n{"txt": "two"}\n')
    else:
        pq.write_table(pa.table({"txt": ["one", "two"]}), path)
    return path


def fail(monkeypatch, path, times, error=None):
    """Let the file fail so many times to be opened."""
    left, plain = [times], open

    def flaky(name, *arguments, **options):
        if str(name) == str(path) and left[0]:
            left[0] -= 1
            raise error or OSError(errno.EIO, "Input/output error")
        return plain(name, *arguments, **options)

    monkeypatch.setattr("builtins.open", flaky)


FORMS = ["tar", "jsonl", "parquet"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOENT, errno.EACCES])
def test_a_moment_without_storage_costs_no_sample(tmp_path, monkeypatch, slept, caplog, form, code):
    path = write(tmp_path, form)
    records = open_records(SourceConfig(shards=str(path)), ["txt"])
    fail(monkeypatch, path, 3, OSError(code, "away"))
    assert records.read(1, ["txt"]) == {"txt": b"two"}
    assert slept == [0.5, 2.0, 8.0]
    assert caplog.text.count("away); trying again in") == 3


@pytest.mark.parametrize("form", FORMS)
def test_storage_that_stays_away_ends_the_reading(tmp_path, monkeypatch, slept, form):
    path = write(tmp_path, form)
    records = open_records(SourceConfig(shards=str(path)), ["txt"])
    fail(monkeypatch, path, 99)
    with pytest.raises(
        DataUnreachable, match=rf"x\.{form}' cannot be read .*Input/output error.*, also not 40\.5 seconds"
    ):
        records.read(1, ["txt"])
    assert slept == list(storage.DELAYS)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_asked_again_at_the_start_too_but_not_for_a_mistake(tmp_path, monkeypatch, slept, form):
    path = write(tmp_path, form)
    fail(monkeypatch, path, 1)
    assert len(open_records(SourceConfig(shards=str(path)), ["txt"])) == 2
    assert slept == [0.5]
    fail(monkeypatch, path, 99, PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(ValueError, match=r"cannot read .*Permission denied"):
        open_records(SourceConfig(shards=str(path)), ["txt"])
    assert slept == [0.5]


def test_a_file_that_a_record_names_is_asked_for_again_and_its_absence_is_no_failure(tmp_path, monkeypatch, slept):
    shard = str(write(tmp_path, "jsonl"))
    (tmp_path / "a.png").write_bytes(b"in")
    (tmp_path / "d").mkdir()
    fail(monkeypatch, tmp_path / "a.png", 2)
    assert read_attachment(shard, "a.png") == b"in"
    assert slept == [0.5, 2.0]
    assert [read_attachment(shard, name) for name in ("b.png", "a.png/b", "d")] == [None] * 3
    fail(monkeypatch, tmp_path / "a.png", 99)
    with pytest.raises(DataUnreachable):
        read_attachment(shard, "a.png")
    assert len(slept) == 6


@pytest.mark.parametrize("name", ["a" * 300, "loop.png", "locked.png"])
def test_a_record_s_name_alone_ends_no_run(tmp_path, monkeypatch, slept, name):
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "locked.png").write_bytes(b"x")
    fail(monkeypatch, tmp_path / "locked.png", 99, PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(BadSample) as error:
        read_attachment(str(tmp_path / "x.jsonl"), name)
    assert error.value.reason == "attachment_refused"
    assert not slept


class Broken(io.BytesIO):
    """A file that fails to be read, a given number of times over all that are opened."""

    left = 0

    def read(self, size=-1):
        if Broken.left:
            Broken.left -= 1
            raise OSError("no errno")
        return super().read(size)


def test_arrow_s_errors_are_told_from_the_file_s(tmp_path, monkeypatch, slept):
    path = write(tmp_path, "parquet")
    records = Parquet([str(path)], ["txt"])
    monkeypatch.setattr(parquet, "open_binary", lambda name: Broken(path.read_bytes()))
    Broken.left = 2
    assert records.read(0, ["txt"]) == {"txt": b"one"}
    assert len(slept) == 2
    records = Parquet([str(path)], ["txt"])
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(len(data) // 3) + data[4 + len(data) // 3 :])
    with pytest.raises(BadSample) as error:
        records.read(0, ["txt"])
    assert error.value.reason == "read_error"
    assert len(slept) == 2


def test_the_errors_of_a_store_s_client_are_trouble_of_the_storage_whatever_their_kind(tmp_path, monkeypatch, slept):
    store = fsspec.filesystem("memory")
    store.pipe("/away/x.tar", write(tmp_path, "tar").read_bytes())
    store.pipe("/away/x.jsonl", write(tmp_path, "jsonl").read_bytes())
    opened = [open_records(SourceConfig(shards=f"memory://away/x.{form}"), ["txt"]) for form in ("tar", "jsonl")]
    plain, left = type(store)._open, [0]

    def flaky(self, *arguments, **options):
        if left[0]:
            left[0] -= 1
            raise RuntimeError("the client has lost its connection")
        return plain(self, *arguments, **options)

    monkeypatch.setattr(type(store), "_open", flaky)
    for records in opened:
        left[0] = 1
        assert records.read(1, ["txt"]) == {"txt": b"two"}
    left[0] = 1
    assert read_attachment("memory://away/x.jsonl", "x.tar")
    assert len(slept) == 3
    left[0] = 99
    with pytest.raises(DataUnreachable):
        opened[0].read(0, ["txt"])


def test_a_run_ends_with_the_reason_and_counts_no_sample(tmp_path, monkeypatch, slept):
    path = write(tmp_path, "jsonl")
    source = SourceConfig(shards=str(path), task="text", fields={"text": ("txt",)}, name="s")
    with Loader(run_config([source], lanes=1, look_ahead=1, cache_bytes=0), 0, 1, LAYOUT, Characters(), FORM) as loader:
        loader.next()
        fail(monkeypatch, path, 99)
        with pytest.raises(DataUnreachable):
            loader.next()
        assert not loader.skipped


def test_a_worker_tells_its_rank_that_the_storage_is_away(monkeypatch):
    class Work:
        def unpack(self):
            raise DataUnreachable("x is away")

    monkeypatch.setattr(worker.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(worker, "_end_with_parent", lambda lifeline: None)
    receiving, sending = multiprocessing.Pipe(duplex=False)
    worker.run_worker(Work(), sending, receiving, [0.0] * 5)
    pool = WorkerPool.__new__(WorkerPool)
    with pytest.raises(DataUnreachable, match="x is away"):
        pool._receive(SimpleNamespace(rows=receiving))


def test_storage_says_when_it_is_read(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(storage, "reading", told.append)
    monkeypatch.setattr(storage, "sleep", told.append)
    path = write(tmp_path, "jsonl")
    fail(monkeypatch, path, 1)
    assert storage.patiently(lambda: open_binary(str(path)).read(1), str(path)) == b"{"
    assert told == [True, 0.5, False]


def test_slow_storage_is_no_slow_sample_and_silent_storage_ends_the_run(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(worker.time, "monotonic", lambda: now[0])
    pool = WorkerPool.__new__(WorkerPool)
    pool._config = run_config([], sample_seconds=5.0)
    running = SimpleNamespace(now_decoding=[0.0, 0.0, 0.0, 0.0, 0.0])
    assert not pool._late(running)
    running.now_decoding[worker.STARTED :] = [94.0, 0.0]
    assert pool._late(running)
    running.now_decoding[worker.READING] = 1.0
    assert not pool._late(running)
    now[0] = 695.0
    with pytest.raises(DataUnreachable, match="has waited for the storage for 601 seconds"):
        pool._late(running)


def test_a_worker_s_sample_has_all_its_time_once_it_is_read(tmp_path, monkeypatch):
    config = run_config([SourceConfig(shards=str(write(tmp_path, "tar")), task="text")], lanes=1, look_ahead=1)
    numbers, seen = [0.0] * 5, []

    class Slow(Characters):
        def encode(self, text):
            seen.append(numbers[worker.STARTED])
            raise SystemExit

    monkeypatch.setattr(storage, "reading", storage.reading)  # put back when the test ends
    monkeypatch.setattr(worker.time, "monotonic", iter(range(1000, 9000)).__next__)
    work = worker.WorkerTask(config, LAYOUT, Slow(), FORM, [0], 0, 1, None, 0)
    with pytest.raises(SystemExit):
        worker._send_rows(work, None, numbers)
    assert numbers[worker.READING] == 0
    assert seen[0] > 1000  # later than the watch began: the reading began it anew


def test_what_is_no_trouble_of_storage_passes_at_once(tmp_path, slept, caplog):
    def bad():
        raise json.JSONDecodeError("x", "y", 0)

    with caplog.at_level(logging.WARNING), pytest.raises(json.JSONDecodeError):
        storage.patiently(bad, str(tmp_path))
    assert not slept and not caplog.text


def test_a_format_of_a_plugin_needs_no_patience_of_its_own(tmp_path, slept):
    class Careless(Table):
        """One record of a table, which cannot be read at first."""

        def __init__(self, paths):
            super().__init__(paths, [1])
            self.failures = 2

        def read(self, sample, names):
            self.failures -= 1
            if self.failures >= 0:
                raise ConnectionResetError("away")
            return {"text": b"a"}

    FORMATS.register("careless", FormatSpec("careless", (".careless",), lambda paths, names, cache: Careless(paths)))
    try:
        (tmp_path / "x.careless").write_text("")
        source = SourceConfig(shards=f"{tmp_path}/x.careless", task="text", name="s")
        config = run_config([source], lanes=1, look_ahead=1)
        with Loader(config, 0, 1, LAYOUT, Characters(), FORM) as loader:
            loader.next()
            assert slept == [0.5, 2.0] and not loader.skipped
    finally:
        FORMATS.unregister("careless")


@pytest.mark.parametrize(("pattern", "call"), [("x.tar", "stat"), ("{x,y}.tar", "stat"), ("*.tar", "glob")])
def test_shards_are_looked_for_again_where_the_storage_fails(tmp_path, monkeypatch, slept, pattern, call):
    (tmp_path / "x.tar").touch()
    (tmp_path / "y.tar").touch()
    module, left = (glob if call == "glob" else os), [2]
    plain = getattr(module, call)

    def flaky(name, *arguments, **options):
        if str(name).startswith(str(tmp_path)) and left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return plain(name, *arguments, **options)

    monkeypatch.setattr(module, call, flaky)
    assert len(expand_shards(str(tmp_path / pattern))) == (1 if pattern == "x.tar" else 2)
    assert slept == list(storage.DELAYS[:2])
    left[0] = 99
    with pytest.raises(DataUnreachable):
        expand_shards(str(tmp_path / pattern))


def test_a_build_asks_again_for_a_file_and_leaves_none_out(tmp_path, monkeypatch, slept):
    path, plain, left = tmp_path / "a.png", os.open, [2]
    path.write_bytes(b"picture")

    def flaky(name, *arguments, **options):
        if str(name) == str(path) and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return plain(name, *arguments, **options)

    monkeypatch.setattr(os, "open", flaky)
    assert read_file(str(path), 100) == b"picture"
    assert slept == list(storage.DELAYS[:2])
    left[0] = 99
    with pytest.raises(DataUnreachable, match=r"a\.png' cannot be read"):
        read_file(str(path), 100)
    left[0] = 0
    for name in ("x" * 300, "", "a.png/x"):  # too long, a folder, a file as a folder: no trouble of the storage
        with pytest.raises(BadSample):
            read_file(str(tmp_path / name), 100)


def test_a_build_ends_where_the_storage_stays_away(monkeypatch):
    def away(path, max_bytes):
        raise DataUnreachable("cannot be read")

    monkeypatch.setattr(examine, "read_file", away)
    with pytest.raises(DataUnreachable):
        examine.Examiner(Filters(), Fetcher(), 100)(Record(0, "a.png", caption="x"))


def test_a_client_that_is_not_installed_is_told_at_once(monkeypatch, slept):
    def absent(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(ValueError, match="needs a client that is not installed"):
        expand_shards("s3://bucket/x.tar")
    assert slept == []
