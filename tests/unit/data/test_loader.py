"""Rows depend on seed and data alone, not on ranks, interruptions or prefetching; bad samples only cost themselves."""

import builtins
import dataclasses
import json
import pickle
import struct
import threading
import zlib
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.config.data import PhaseConfig, SourceConfig
from megatron_gemini.data.loading.lane import checked
from megatron_gemini.data.loading.loader import Loader, lanes_of
from megatron_gemini.data.loading.prefetch import Prefetch
from megatron_gemini.data.loading.reader import skipped_table
from megatron_gemini.registry import TASKS
from tests.tiny_shards import FORM, LAYOUT, Characters, chat, document, png, run_config, sample, texts, wav, write_tar


def load(config, rank=0, size=1):
    return Loader(config, rank, size, LAYOUT, Characters(), FORM)


def content(batch):
    """Everything in a row, comparable."""
    media = {name: [t.tolist() for t in vars(m).values()] for name, m in sorted(batch.media.items())}
    tokens = [getattr(batch, f.name).tolist() for f in dataclasses.fields(batch) if f.name.endswith("_T")]
    columns = {name: [str(column.dtype), column.tolist()] for name, column in sorted(batch.columns.items())}
    return json.dumps([tokens, columns, media, batch.samples])


def steps(loaders, count):
    """Rows of `count` global steps over all ranks, in the order of the rows."""
    rows = []
    for _ in range(count):
        found = [row for loader in loaders for row in loader.next().items()]
        assert len(dict(found)) == len(found), "two ranks have read the same row"
        rows += [content(batch) for _, batch in sorted(found, key=lambda row: row[0])]
    return rows


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A configuration with every task."""
    folder = tmp_path_factory.mktemp("shards")
    all_tasks = write_tar(folder / "all.tar", ((f"s{i}", sample(i)) for i in range(7)))
    interleaved = write_tar(folder / "interleave.tar", ((f"d{i}", document(i)) for i in range(5)))
    chats = write_tar(folder / "chat.tar", ((f"c{i}", chat(i)) for i in range(5)))
    paths = {task: {"interleave": interleaved, "chat": chats}.get(task, all_tasks) for task in TASKS}
    sources = [
        SourceConfig(shards=path, task=task, weight=i + 1)  # type: ignore[arg-type]
        for i, (task, path) in enumerate(paths.items())
    ]
    return run_config(sources, rows_per_step=2, row_tokens=96)


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
def test_the_rows_are_the_same_on_any_number_of_ranks(mixture, ranks):
    """Of four lanes: also where they are not divided evenly, and where some ranks have none."""
    one = steps([load(mixture)], 12)
    assert len(set(one)) == 24
    assert steps([load(mixture, rank, ranks) for rank in range(ranks)], 12) == one


@given(st.integers(1, 40), st.integers(1, 40))
def test_every_lane_has_one_reader_and_readers_have_equally_many(ranks, lanes):
    shares = [list(lanes_of(rank, ranks, lanes)) for rank in range(ranks)]
    assert sorted(lane for share in shares for lane in share) == list(range(lanes))
    sizes = list(map(len, shares))
    assert max(sizes) - min(sizes) <= 1
    if lanes < ranks:  # nodes, which are neighbors, have equally many too
        halves = [sum(sizes[: ranks // 2]), sum(sizes[-(ranks // 2) :])]
        assert abs(halves[0] - halves[1]) <= 1


def test_prefetching_and_caching_change_nothing(mixture):
    data = dataclasses.replace(mixture.data, prefetch=3, cache_bytes=0)
    with load(dataclasses.replace(mixture, data=data)) as ahead:
        assert steps([ahead], 6) == steps([load(mixture)], 6)


@settings(max_examples=12, deadline=None)
@given(
    cut=st.integers(0, 9),
    before=st.sampled_from([1, 2, 3]),
    after=st.sampled_from([1, 2, 5]),
    prefetch=st.integers(0, 2),
)
def test_resuming_anywhere_on_other_ranks_goes_on_with_the_same_rows(mixture, cut, before, after, prefetch):
    config = dataclasses.replace(mixture, data=dataclasses.replace(mixture.data, prefetch=prefetch))
    uninterrupted = steps([load(mixture)], cut + 5)
    first = [load(config, rank, before) for rank in range(before)]
    assert steps(first, cut) == uninterrupted[: 2 * cut]
    states = json.loads(json.dumps([loader.state() for loader in first]))
    union = {lane: state for part in states for lane, state in part.items()}
    second = [load(config, rank, after) for rank in range(after)]
    for loader in second:
        loader.load_state(union)
    assert {lane: state for loader in second for lane, state in loader.state().items()} == union
    assert steps(second, 5) == uninterrupted[2 * cut :]
    for loader in first + second:
        loader.close()


@pytest.mark.parametrize("cut", [2, 6, 9])
def test_a_resumed_run_goes_on_in_its_phase_of_the_curriculum(tmp_path, cut):
    sources = [SourceConfig(shards=texts(tmp_path / f"{name}.tar", 40), task="text", name=name) for name in "ab"]
    phases = (PhaseConfig(1, (1.0, 0.0)), PhaseConfig(6, (0.0, 1.0)))
    config = run_config(sources, curriculum=phases, look_ahead=1)
    whole = load(config)
    rows = [whole.next() for _ in range(12)]
    named = [{key[0] for row in step.values() for key in row.samples} for step in rows]
    assert named[3:5] == [{"a"}] * 2 and named[8:] == [{"b"}] * 4, named  # between, what has waited for its row
    first = load(config)
    steps([first], cut)
    resumed = load(config)
    resumed.load_state(json.loads(json.dumps(first.state())))
    expected = [content(row) for step in rows[cut:] for _, row in sorted(step.items())]
    assert steps([resumed], 12 - cut) == expected


def test_every_epoch_augments_and_empties_prompts_anew(tmp_path):
    """By seed, source, epoch and sample alone: another reader of the same epoch sees the same."""
    shard = write_tar(tmp_path / "x.tar", ((f"s{i}", sample(i)) for i in range(3)))
    operations = ("decode", "crop(smallest=0.3)", "prepare", "format", "tokenize")
    pictures = SourceConfig(shards=shard, task="caption", name="pictures", operations=operations)
    drawings = SourceConfig(shards=shard, task="generate", name="drawings", prompts=("draw {text}",))
    config = run_config([pictures, drawings], caption_dropout=0.5, row_tokens=256)
    (seen, empty), again = load(config).sources, load(config).sources
    for source, twin, content_of in ((seen, again[0], pixels_of), (empty, again[1], tokens_of)):
        found: dict[int, list[str]] = {}
        for position in range(8 * len(source)):
            document = content_of(source.document(position))
            assert document == content_of(twin.document(position))
            found.setdefault(source.order.at(position)[1], []).append(document)
        assert [len(epochs) for epochs in found.values()] == [8, 8, 8]
        assert all(len(set(epochs)) > 1 for epochs in found.values()), source.label


def test_what_chance_does_to_a_prompt_stays_the_same_from_release_to_release(tmp_path):
    """Written down: a run that goes on would see other prompts if the generator had another key."""
    shard = write_tar(tmp_path / "x.tar", ((f"s{i}", sample(i)) for i in range(3)))
    drawings = SourceConfig(shards=shard, task="generate", name="drawings", prompts=("{text}",))
    (source,) = load(run_config([drawings], caption_dropout=0.5, row_tokens=256)).sources
    begins = [LAYOUT.control(name) for name in ("bos", "user", "model")]
    drawn = [source.document(position).token_L.tolist()[:3] == begins for position in range(16)]
    assert "".join("-x"[empty] for empty in drawn) == "xx---x-x---xxxx-"


def pixels_of(document):
    return str([item.values_PC.tolist() for item in document.media])


def tokens_of(document):
    return str(document.token_L.tolist())


@pytest.mark.parametrize(("lanes", "rows", "ranks"), [(4, 2, 1), (4, 6, 2), (2, 8, 2), (3, 5, 1)])
def test_every_sample_comes_exactly_once_an_epoch_over_all_lanes(tmp_path, lanes, rows, ranks):
    # 9 tokens a document and 3 to a row: with rows that divide evenly among the lanes, all lanes are equally far.
    source = SourceConfig(shards=texts(tmp_path / "t.tar", 20, length=7), task="text", name="t")
    config = run_config([source], rows, row_tokens=27, lanes=lanes, look_ahead=1)
    loaders = [load(config, rank, ranks) for rank in range(ranks)]
    seen: Counter[str] = Counter()
    for _ in range(2 * lanes * 5):
        seen.update(key for loader in loaders for batch in loader.next().values() for key in batch.samples)
    states = {lane: state for loader in loaders for lane, state in loader.state().items()}
    drawn = {state["drawn"]["t"] for state in states.values()}
    positions = lanes * drawn.pop()
    assert not drawn
    waiting = sum(len(state["waiting"]) for state in states.values())
    assert sum(seen.values()) + waiting == positions
    for _, state in states.items():
        seen.update(f"t/s{loaders[0].sources[0].order.at(position)[1]:04d}" for _, position in state["waiting"])
    epochs, rest = divmod(positions, 20)
    assert len(seen) == 20
    assert set(seen.values()) <= {epochs, epochs + 1}
    assert sum(count == epochs + 1 for count in seen.values()) == rest


def test_epochs_and_seeds_have_orders_of_their_own(tmp_path):
    config = run_config([SourceConfig(shards=texts(tmp_path / "t.tar", 30), task="text", name="t")])
    source = load(config).sources[0]
    orders = [[source.order.at(30 * epoch + i)[1] for i in range(30)] for epoch in range(3)]
    assert all(sorted(order) == list(range(30)) for order in orders)
    other = load(dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1))).sources[0]
    orders.append([other.order.at(i)[1] for i in range(30)])
    assert len({tuple(order) for order in orders}) == 4


def test_documents_come_in_the_shares_of_their_weights(tmp_path):
    shard = texts(tmp_path / "t.tar", 10)
    sources = [SourceConfig(shards=shard, task="text", name=name, weight=w) for name, w in (("a", 3), ("b", 1))]
    loader = load(run_config(sources, lanes=1, rows_per_step=1))
    for _ in range(50):
        loader.next()
    drawn = loader.state()["0"]["drawn"]
    assert drawn["a"] == pytest.approx(3 * drawn["b"], abs=4)


def test_rows_are_nearly_full(mixture):
    loader = load(dataclasses.replace(mixture, data=dataclasses.replace(mixture.data, look_ahead=16)))
    used = [float((batch.segment_T > 0).float().mean()) for _ in range(30) for batch in loader.next().values()]
    assert sum(used) / len(used) > 0.97


def test_rows_keep_the_budgets_of_the_encoders(mixture):
    data = dataclasses.replace(mixture.data, row_inputs={"vision": 9, "audio": 25})
    loader = load(dataclasses.replace(mixture, data=data))
    rows = [batch for _ in range(20) for batch in loader.next().values()]
    for name, limit in (("vision", 9), ("audio", 25)):
        used = [len(row.media[name].values_PC) for row in rows if name in row.media]
        assert limit - 5 <= max(used) <= limit
    assert not loader.skipped


def test_validation_rows_are_the_same_every_time_and_never_have_an_empty_prompt(mixture):
    data = dataclasses.replace(mixture.data, validation=mixture.data.sources, caption_dropout=1.0)
    train = dataclasses.replace(mixture.train, validation_rows=4)
    config = dataclasses.replace(mixture, data=data, train=train)
    make = lambda rank, size: Loader.validation(config, rank, size, LAYOUT, Characters(), FORM)  # noqa: E731
    one = steps([make(0, 1)], 1)
    assert len(one) == 4
    assert steps([make(0, 2), make(1, 2)], 1) == one
    assert steps([make(rank, 7) for rank in range(7)], 1) == one
    row = make(0, 1).next()[0]
    opening = torch.tensor([LAYOUT.control("user"), LAYOUT.control("model")])
    assert not (row.token_T.unfold(0, 2, 1) == opening).all(dim=1).any()
    with pytest.raises(ValueError, match=r"data\.validation is empty"):
        Loader.validation(mixture, 0, 1, LAYOUT, Characters(), FORM)


def test_there_must_be_a_source(mixture):
    with pytest.raises(ValueError, match=r"data\.sources is empty"):
        load(dataclasses.replace(mixture, data=dataclasses.replace(mixture.data, sources=())))


def test_a_state_of_other_data_or_sizes_is_refused(mixture, tmp_path):
    state = load(mixture).state()
    with pytest.raises(ValueError, match=r"has 3 data lanes, not 4"):
        load(mixture).load_state({lane: state[lane] for lane in "012"})
    with pytest.raises(ValueError, match="the data sources have changed: the checkpoint had caption:all"):
        load(run_config([SourceConfig(shards=texts(tmp_path / "t.tar", 3), task="text")])).load_state(state)
    loader = load(mixture)
    loader.next()
    other = dataclasses.replace(mixture, train=dataclasses.replace(mixture.train, rows_per_step=4))
    with pytest.raises(ValueError, match=r"after 2 rows, which train\.rows_per_step \(4\) does not divide"):
        load(other).load_state(loader.state())


@pytest.mark.parametrize("ending", ["tar", "jsonl"])
def test_as_many_other_samples_in_the_place_of_those_of_a_checkpoint_are_refused(tmp_path, ending):
    path = tmp_path / f"t.{ending}"

    def write(word):
        if ending == "jsonl":
            path.write_text("".join(json.dumps({"text": word}) + "\n" for _ in range(9)))
        else:
            write_tar(path, ((f"k{n}", {"txt": word.encode()}) for n in range(9)))

    write("seven")
    config = run_config([SourceConfig(shards=str(path), task="text", name="words")])
    state = json.loads(json.dumps(load(config).state()))
    load(config).load_state(state)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / path.name).write_bytes(path.read_bytes())
    load(run_config([SourceConfig(shards=str(moved / path.name), task="text", name="words")])).load_state(state)
    write("eight")
    with pytest.raises(ValueError, match=r"the files of words are as many samples, and others by .*--train\.no_resume"):
        load(config).load_state(state)
    load(config, 1, 2).load_state(state)  # one rank looks at the files
    del state["0"]["identity"]
    with pytest.raises(ValueError, match="does not say which files"):
        load(config).load_state(state)


BAD = st.none() | st.booleans() | st.integers(-2, 2) | st.text(max_size=2) | st.lists(st.integers(0, 1), max_size=2)


@given(
    st.sampled_from(["rows", "read", "skipped", "samples", "drawn", "credit", "tokens", "waiting", "quarantined"]), BAD
)
def test_a_crafted_state_of_a_lane_is_refused_in_one_line_or_is_one(mixture, name, value):
    state = load(mixture).state()["0"]
    try:
        checked({**state, name: value})
    except ValueError as error:
        assert str(error).endswith("the checkpoint is damaged")
    else:
        assert value in ([], {}) or (name in ("rows", "read") and type(value) is int and value >= 0)
    with pytest.raises(ValueError, match="is damaged"):
        checked({key: item for key, item in state.items() if key != name})


def test_settings_that_a_source_cannot_use_are_told_at_once(mixture):
    audio = dataclasses.replace(mixture.encoders["audio"], enabled=False)
    off = dataclasses.replace(mixture, encoders={**mixture.encoders, "audio": audio})
    with pytest.raises(ValueError, match=r"'transcribe:all\.tar' \(transcribe\) needs encoders\.audio\.enabled"):
        load(off)
    twice = dataclasses.replace(mixture.data, sources=(mixture.data.sources[0],) * 2)
    with pytest.raises(ValueError, match=r"two data sources are called 'caption:all\.tar'"):
        load(dataclasses.replace(mixture, data=twice))


def bomb():
    """A small PNG of 30,000 x 30,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


class Explodes:
    def __reduce__(self):
        return exec, ("import builtins; builtins.exploded = True",)


def test_bad_samples_are_skipped_and_counted_by_reason(tmp_path):
    good = {"png": png(), "txt": b"good", "wav": wav()}
    shard = write_tar(
        tmp_path / "x.tar",
        [
            *((f"good{i}", good) for i in range(6)),
            ("half", {**good, "png": png()[: len(png()) // 2]}),
            ("bomb", {**good, "png": bomb()}),
            ("pickle", {**good, "png": pickle.dumps(Explodes()), "pyd": pickle.dumps(Explodes())}),
            ("nothing", {"wav": wav()}),
            ("long", {**good, "txt": b"long" * 100}),
            ("../../up", good),
        ],
    )
    loader = load(run_config([SourceConfig(shards=shard, task="caption", name="c")], lanes=1))
    for _ in range(4):
        loader.next()
    (state,), (source,) = loader.state().values(), loader.sources
    drawn = Counter(source.shards.key(source.order.at(position)[1]) for position in range(state["read"]))
    assert state["read"] > 2 * 11
    expected = {
        ("c", "image_corrupt"): drawn["half"],
        ("c", "image_too_large"): drawn["bomb"],
        ("c", "image_unreadable"): drawn["pickle"],
        ("c", "missing_image"): drawn["nothing"],
        ("c", "too_long"): drawn["long"],
        ("c", "tar_unsafe_name"): 3,
    }
    assert loader.skipped == expected
    assert "  c  tar_unsafe_name  3" in skipped_table(loader.skipped)
    assert not hasattr(builtins, "exploded")


def test_corrupt_sound_is_one_reason(tmp_path):
    samples = [("a", {"wav": wav(), "txt": b"a"}), ("b", {"wav": b"RIFF nonsense", "txt": b"b"})]
    shard = write_tar(tmp_path / "x.tar", samples)
    loader = load(run_config([SourceConfig(shards=shard, task="transcribe", name="t")], lanes=1, max_bad_share=1.0))
    loader.next()
    assert set(loader.skipped) == {("t", "audio_unreadable")}


def test_a_shard_in_which_nothing_can_be_used_is_an_error_that_names_it(tmp_path):
    write_tar(tmp_path / "x-0.tar", [("a", {"png": png(), "txt": b"a"})])
    write_tar(tmp_path / "x-1.tar", [("b", {"png": b"no", "txt": b"b"}), ("c", {"png": png()})])
    config = run_config([SourceConfig(shards=f"{tmp_path}/x-*.tar", task="caption")])
    expected = r"no sample of '.*x-1\.tar' can be used for caption \(image_unreadable: 1, missing_text: 1\)"
    with pytest.raises(ValueError, match=expected):
        load(config)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_too_large_a_share_of_bad_samples_stops_with_their_reasons(tmp_path, prefetch):
    samples = [(f"s{i}", {"txt": b"text" if i % 10 else b"long" * 100}) for i in range(400)]
    shard = write_tar(tmp_path / "x.tar", samples)
    config = run_config([SourceConfig(shards=shard, task="text", name="t")], max_bad_share=0.05, prefetch=prefetch)
    with (
        load(config) as loader,
        pytest.raises(ValueError, match=r"more than data\.max_bad_share \(0\.05\):\n  t  too_long"),
    ):
        for _ in range(200):
            loader.next()
    with load(run_config(config.data.sources, max_bad_share=0.2)) as loader:
        for _ in range(200):
            loader.next()


def test_documents_that_never_fit_stop_even_where_all_may_be_bad(tmp_path):
    shard = texts(tmp_path / "t.tar", 5, length=100)
    with pytest.raises(ValueError, match="201 of 201 samples are bad"):
        load(run_config([SourceConfig(shards=shard, task="text")], max_bad_share=1.0)).next()


def test_a_closed_prefetch_leaves_no_thread_and_an_error_comes_in_its_turn():
    things = iter([1, 2])
    ahead = Prefetch(lambda: next(things), depth=2)
    assert [ahead.next(), ahead.next()] == [1, 2]
    for _ in range(2):
        with pytest.raises(StopIteration):
            ahead.next()
    endless = Prefetch(lambda: 0, depth=1)
    endless.next()
    endless.close()
    endless.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "data-prefetch" and thread.is_alive()]
