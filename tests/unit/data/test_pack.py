"""A packed row says what its documents say, token for token, whatever they are."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.contracts import TEXT, RowFormat
from megatron_gemini.data.packing.pack import check_fits, choose, fullest, pack
from megatron_gemini.data.samples.document import Size, build_document
from megatron_gemini.data.samples.items import Codes, Text
from megatron_gemini.modalities.audio.item import Audio
from megatron_gemini.modalities.bad_sample import BadSample
from megatron_gemini.modalities.image.item import Image
from megatron_gemini.modalities.video.item import Video
from tests.tiny_shards import AUDIO, LAYOUT, VISION, Characters

PLACEHOLDERS = {LAYOUT.control(name) for name in ("image", "video", "audio")}
IMAGE, TEXT_WEIGHT, IMAGE_WEIGHT = "image", 1.0, 0.25
FORM = RowFormat(target_weights={TEXT: TEXT_WEIGHT, IMAGE: IMAGE_WEIGHT})


def build(prompt, answer, key="k", loss_on_prompt=False):
    return build_document(
        prompt,
        answer,
        layout=LAYOUT,
        text_tokenizer=Characters(),
        encoders={"vision": VISION, "audio": AUDIO},
        key=key,
        loss_on_prompt=loss_on_prompt,
    )


def pixels(*shape):
    return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), np.uint8)


texts = st.text("abc ", max_size=6).map(Text)
images = st.sampled_from([(8, 8), (4, 8), (20, 8), (3, 3)]).map(lambda size: Image(pixels(*size)))
clips = st.integers(1, 3).map(lambda frames: Video(pixels(frames, 8, 4), 0.5))
sounds = st.integers(1, 4000).map(lambda n: Audio(np.sin(np.arange(n) / 5).astype(np.float32)))
drawings = st.lists(st.integers(0, len(LAYOUT.code_range("image")) - 1), min_size=1, max_size=5).map(
    lambda codes: Codes(IMAGE, tuple(codes))
)
items = st.lists(st.one_of(texts, images, clips, sounds, drawings), max_size=4)
documents = st.one_of(
    st.tuples(items, st.lists(st.one_of(texts, drawings), max_size=2), st.just(False)),
    st.tuples(items, st.none(), st.just(True)),
)


def control(*names):
    return [LAYOUT.control(name) for name in names]


@settings(max_examples=60, deadline=None)
@given(st.lists(documents, min_size=1, max_size=4), st.integers(0, 9))
def test_a_packed_row_obeys_the_contract(parts, padding):
    built = [build(prompt, answer, f"k{i}", loss) for i, (prompt, answer, loss) in enumerate(parts)]
    total = sum(map(len, built))
    row = pack(built, total + padding, FORM)
    length = total + padding
    for name in ("token", "target", "weight", "position", "segment", "span", "modality"):
        assert getattr(row, f"{name}_T").shape == (length,)
    dtypes = (row.token_T, row.target_T, row.position_T, row.segment_T, row.span_T, row.weight_T, row.modality_T)
    assert [tensor.dtype for tensor in dtypes] == [torch.int64] * 3 + [torch.int32] * 2 + [torch.float32, torch.int8]
    assert row.samples == [document.key for document in built]

    segment = row.segment_T.tolist()
    assert segment == [i for i, document in enumerate(built, 1) for _ in range(len(document))] + [0] * padding
    assert row.token_T[total:].tolist() == control("pad") * padding
    assert row.weight_T[total:].sum() == 0
    position = 0
    for t in range(total):
        first = t == 0 or segment[t] != segment[t - 1]
        position = 0 if first else position + 1
        assert row.position_T[t] == position
        assert not first or row.token_T[t] == LAYOUT.control("bos")
        last = t + 1 == length or segment[t + 1] != segment[t]
        if last:
            assert row.weight_T[t] == 0
            continue
        target = int(row.token_T[t + 1])
        assert row.target_T[t] == target
        assert LAYOUT.targets[row.modality_T[t]] == (IMAGE if target in LAYOUT.code_range("image") else TEXT)
        assert row.weight_T[t] in (0, IMAGE_WEIGHT if target in LAYOUT.code_range("image") else TEXT_WEIGHT)
        assert target not in PLACEHOLDERS or row.weight_T[t] == 0

    # Spans: exactly the placeholders, each span one run of one kind within one document.
    is_placeholder = [int(token) in PLACEHOLDERS for token in row.token_T]
    assert [span != 0 for span in row.span_T.tolist()] == is_placeholder
    for span in set(row.span_T.tolist()) - {0}:
        places = (row.span_T == span).nonzero().flatten().tolist()
        assert places == list(range(places[0], places[-1] + 1))
        assert len(set(row.token_T[places].tolist())) == len({segment[place] for place in places}) == 1

    # Media: one output for each placeholder, in order, and inputs that produce that many.
    for encoder, names in (("vision", ("image", "video")), ("audio", ("audio",))):
        places = [t for t in range(total) if int(row.token_T[t]) in control(*names)]
        if not places:
            assert encoder not in row.media
            continue
        media = row.media[encoder]
        assert media.token_O.tolist() == places
        assert media.values_PC.dtype == torch.float32
        rows = media.grid_I3.prod(dim=1)
        assert len(media.values_PC) == rows.sum()
        outputs = rows if encoder == "vision" else (rows + 3) // 4
        assert outputs.sum() == len(places)


def test_loss_is_on_the_answer_and_its_end_only():
    row = pack([build([Text("ab")], [Text("c")])], 8, FORM)
    assert row.token_T.tolist() == [*control("bos", "user"), 97, 98, *control("model"), 99, *control("eos", "pad")]
    assert row.weight_T.tolist() == [0, 0, 0, 0, 1, 1, 0, 0]


def test_loss_weights_go_by_the_modality_of_the_target():
    row = pack([build([Text("a")], [Codes(IMAGE, (3, 5))])], 12, FORM)
    first = LAYOUT.code_range("image").start
    answer = [*control("image_begin"), first + 3, first + 5, *control("image_end", "eos")]
    assert row.token_T[3:9].tolist() == [*control("model"), *answer]
    assert row.target_T[3:8].tolist() == answer
    assert row.weight_T[3:8].tolist() == [1, 0.25, 0.25, 1, 1]
    assert row.modality_T.tolist() == [0, 0, 0, 0, 1, 1, *[0] * 6]
    assert row.weight_T.sum() == 3.5


def test_an_interleaved_document_learns_its_text_and_codes_but_no_placeholder():
    row = pack([build([Image(pixels(8, 8)), Text("a"), Codes(IMAGE, (2,))], None, loss_on_prompt=True)], 10, FORM)
    assert row.target_T[:9].tolist() == [
        *control("image") * 4,
        97,
        *control("image_begin"),
        LAYOUT.code_range("image").start + 2,
        *control("image_end", "eos"),
    ]
    assert row.weight_T.tolist() == [0, 0, 0, 0, 1, 1, 0.25, 1, 1, 0]


def test_an_empty_answer_leaves_the_document_open():
    assert build([Text("a")], []).token_L.tolist() == [*control("bos", "user"), 97, *control("model")]


def test_every_frame_of_a_clip_is_a_span_of_its_own():
    row = pack([build([Image(pixels(4, 8)), Video(pixels(3, 4, 8), 0.5)], [])], 11, FORM)
    assert row.span_T.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0]
    assert row.media["vision"].grid_I3.tolist() == [[1, 1, 2], [3, 1, 2]]
    assert row.media["vision"].time_I.tolist() == [0.0, 0.5]


def test_media_of_all_documents_are_in_the_order_of_their_placeholders():
    black, white = Image(np.zeros((4, 4, 3), np.uint8)), Image(np.full((4, 4, 3), 255, np.uint8))
    row = pack([build([black], []), build([Text("x"), white, black], [])], 12, FORM)
    assert row.media["vision"].values_PC[:, 0].tolist() == [-1, 1, -1]
    assert row.media["vision"].token_O.tolist() == [2, 7, 8]


def test_a_row_of_text_has_no_media():
    assert pack([build([Text("a")], [Text("b")])], 8, FORM).media == {}


def test_a_document_longer_than_a_row_is_a_bad_sample():
    with pytest.raises(BadSample, match="k: 6 tokens do not fit into a row of 5") as error:
        pack([build([Text("a")], [Text("b")])], 5, FORM)
    assert error.value.reason == "too_long"


@pytest.mark.parametrize("codes", [(16,), (-1,), ()])
def test_codes_outside_the_codebook_are_a_bad_sample(codes):
    with pytest.raises(BadSample) as error:
        build([], [Codes(IMAGE, codes)])
    assert error.value.reason == "bad_codes"


@given(st.lists(st.integers(1, 20), max_size=9), st.integers(0, 60))
def test_a_row_is_filled_as_full_as_any_choice_could(lengths, room):
    chosen = fullest(lengths, room)
    every = [c for n in range(len(lengths) + 1) for c in itertools.combinations(range(len(lengths)), n)]
    sums = {c: sum(lengths[i] for i in c) for c in every}
    best = max(s for s in sums.values() if s <= room)
    assert chosen == sorted(chosen)
    assert sums[tuple(chosen)] == best
    older = [c for c, s in sums.items() if s == best]
    assert [i in chosen for i in range(len(lengths))] == max([i in c for i in range(len(lengths))] for c in older)


def size(tokens, patches, frames):
    return Size(tokens, {"vision": patches, "audio": frames})


def taken(size):
    return [size.tokens, *(size.inputs.get(name, 0) for name in ("vision", "audio"))]


sizes = st.builds(size, st.integers(1, 20), st.integers(0, 8), st.integers(0, 30))


@given(st.lists(sizes, max_size=9), st.builds(size, st.integers(0, 60), st.integers(0, 20), st.integers(0, 60)))
def test_no_choice_exceeds_what_is_left_of_a_row(waiting, room):
    chosen = [waiting[place] for place in choose(waiting, room)]
    for axis in range(3):
        assert sum(taken(size)[axis] for size in chosen) <= taken(room)[axis]
    if waiting and all(part <= left for part, left in zip(taken(waiting[0]), taken(room), strict=True)):
        assert chosen  # the oldest alone would have fitted


def test_a_document_without_inputs_of_an_encoder_leaves_its_room_to_others():
    assert choose([Size(1), size(1, 1, 0)], size(2, 1, 0)) == [0, 1]


def test_a_document_beyond_the_encoders_budget_is_a_bad_sample():
    document = build([Image(pixels(8, 8)), Audio(np.ones(1600, np.float32))], [Text("a")])
    assert taken(document.size) == [12, 4, 10]
    check_fits(document, size(12, 4, 10))
    for limits, reason in (
        (size(11, 4, 10), "too_long"),
        (size(12, 3, 10), "too_many_vision_inputs"),
        (size(12, 4, 9), "too_many_audio_inputs"),
    ):
        with pytest.raises(BadSample) as error:
            check_fits(document, limits)
        assert error.value.reason == reason
