"""Operations change what they say and nothing else, and every random choice is the generator's alone."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_gemini.config.data import SourceConfig
from megatron_gemini.config.encoders import AudioConfig, VisionConfig
from megatron_gemini.config.run import RunConfig
from megatron_gemini.data.operations.make import make_operation
from megatron_gemini.data.operations.pipeline import USUAL_OPERATIONS, OperationPipeline
from megatron_gemini.data.operations.spec import Sample, Setting
from megatron_gemini.data.random_stream import random_stream
from megatron_gemini.data.samples.decode import SampleDecoder
from megatron_gemini.data.samples.items import EncoderInput, Text, Turn
from megatron_gemini.data.samples.spec import Fields
from megatron_gemini.data.sources.schema import Schema
from megatron_gemini.modalities.audio.item import Audio
from megatron_gemini.modalities.image.item import Image
from megatron_gemini.modalities.image.operations import size_within
from megatron_gemini.modalities.video.item import Video
from tests.tiny_shards import AUDIO, IMAGE_TOKENIZER, LAYOUT, VISION, Characters, chat, png, sample


def setting(task="caption", vision=VISION, audio=AUDIO, **source):
    schema = Schema.of(SourceConfig(shards="x", task=task, **source))
    config = RunConfig(encoders={"vision": vision, "audio": audio}, image_tokenizer=IMAGE_TOKENIZER)
    return Setting(SampleDecoder(config), schema, LAYOUT, Characters(), caption_dropout=0.5)


def apply(text, given, seed=0, **settings):
    operation, _ = make_operation(text, setting(**settings))
    return operation(Sample("k", fields=Fields(given)), random_stream(seed)).fields


def pixels(*shape):
    return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), np.uint8)


sides = st.integers(1, 90)
WIDE = VisionConfig(patch=4, max_side=64, max_frames=8)


@settings(max_examples=80, deadline=None)
@given(height=sides, width=sides, tokens=st.integers(0, 60))
@example(height=54, width=9, tokens=28)  # more pixels than the budget's patches, but as many patches
def test_resize_keeps_the_budget_the_patches_and_nearly_the_aspect(height, width, tokens):
    image = Image(pixels(height, width))
    resized = apply(f"resize(tokens={tokens})", {"image": image}, vision=WIDE)["image"].pixels_HW3
    new_height, new_width = resized.shape[:2]
    assert new_height % 4 == new_width % 4 == 0
    assert max(new_height, new_width) <= 64
    assert not tokens or new_height * new_width // 16 <= tokens
    scale = min(1.0, 64 / max(height, width))
    if tokens and round(height * scale / 4) * round(width * scale / 4) > tokens:
        scale = min(scale, (tokens * 16 / (height * width)) ** 0.5)
    if min(height, width) * scale >= 8:  # no side is one patch, which the aspect cannot help
        assert abs(new_height - height * scale) <= 4
        assert abs(new_width - width * scale) <= 4
    assert (image.pixels_HW3 == pixels(height, width)).all()


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 4000))
def test_any_size_has_some_whole_patches_within_the_budget(height, width, tokens):
    rows, columns = (side // 14 for side in size_within(height, width, 14, 896, tokens))
    assert 1 <= rows * columns <= tokens
    assert max(rows, columns) <= 64


@settings(max_examples=40, deadline=None)
@given(frames=st.integers(1, 12), count=st.integers(1, 12), tokens=st.integers(0, 40))
def test_frames_are_evenly_spaced_and_share_a_budget(frames, count, tokens):
    clip = Video(np.arange(frames, dtype=np.uint8)[:, None, None, None] * np.ones((1, 12, 16, 3), np.uint8), 0.5)
    kept = apply(f"frames(count={count})", {"video": clip})["video"]
    numbers = kept.frames_FHW3[:, 0, 0, 0].tolist()
    assert len(numbers) == min(frames, count)
    assert numbers == sorted(set(numbers))
    if len(numbers) > 1:
        assert (numbers[0], numbers[-1]) == (0, frames - 1)
        assert kept.seconds_between_frames * (len(numbers) - 1) == pytest.approx(0.5 * (frames - 1))
    resized = apply(f"resize(tokens={tokens})", {"video": kept}, vision=WIDE)["video"].frames_FHW3
    patches = resized.shape[0] * resized.shape[1] * resized.shape[2] // 16
    assert not tokens or patches <= max(tokens, len(numbers))
    assert len(np.unique(resized[0])) == 1


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 30), width=st.integers(1, 30), smallest=st.floats(0.1, 1), seed=st.integers(0, 99))
def test_a_crop_is_a_part_of_the_image_and_large_enough(height, width, smallest, seed):
    numbers = np.arange(height * width, dtype=np.int64).reshape(height, width)
    image = np.stack([numbers // 256, numbers % 256, numbers * 0], axis=-1).astype(np.uint8)
    part = apply(f"crop(smallest={smallest})", {"image": Image(image)}, seed)["image"].pixels_HW3.astype(np.int64)
    found = part[..., 0] * 256 + part[..., 1]
    top, left = divmod(int(found[0, 0]), width)
    assert (found == numbers[top : top + len(found), left : left + found.shape[1]]).all()
    assert len(found) >= max(1, round(height * smallest))
    assert found.shape[1] >= max(1, round(width * smallest))


@settings(max_examples=20, deadline=None)
@given(seconds=st.floats(0.2, 2.0), seed=st.integers(0, 99))
def test_speed_changes_length_and_pitch_together_and_keeps_the_limit(seconds, seed):
    wave = np.sin(2 * np.pi * 400 * np.arange(int(16_000 * seconds)) / 16_000).astype(np.float32)
    faster = apply("speed(slowest=0.8, fastest=1.25)", {"audio": Audio(wave)}, seed)["audio"].wave
    ratio = len(wave) / len(faster)
    assert 0.79 < ratio < 1.26
    assert len(faster) <= 16_000 * AUDIO.max_seconds + 1
    pitch = np.abs(np.fft.rfft(faster, 1 << 17)).argmax() * 16_000 / (1 << 17)
    assert pitch == pytest.approx(400 * ratio, rel=0.02)


def test_media_are_changed_wherever_they_stand_and_once():
    image = Image(pixels(20, 20))
    given = {"image": image, "items": [Text("a"), image], "messages": [Turn(True, [image, Text("b")])]}
    changed = apply("prepare", given)
    assert isinstance(changed["image"], EncoderInput)
    assert changed["items"][1] is changed["image"] is changed["messages"][0].items[0]
    assert changed["items"][0] is given["items"][0]
    assert given["image"] is image


def test_a_caption_is_chosen_from_all_there_are():
    given = {"text": "a", "captions": ["a", "b", "c"]}
    chosen = [apply("choose_caption(first=0.5)", given, seed)["text"] for seed in range(400)]
    assert {text: round(chosen.count(text) / 400, 1) for text in "abc"} == pytest.approx(
        {"a": 0.5, "b": 0.25, "c": 0.25}, abs=0.1
    )
    assert apply("choose_caption(first=0)", {"text": "a", "captions": ["a"]})["text"] == "a"


def document(task, members, operations=(), seed=0, **source):
    pipeline = OperationPipeline(operations, setting(task, **source))
    fixed = pipeline.fixed(Sample("k", members))
    return pipeline.document(fixed, random_stream(seed))


def test_a_list_of_the_users_own_replaces_the_usual_one():
    members = {**sample(3), "png": png(0, 40, 20)}
    usual = document("caption", members)
    assert len(usual.media[0].values_PC) == 2  # 8 x 4 pixels
    wide = document("caption", members, USUAL_OPERATIONS)
    assert (usual.token_L == wide.token_L).all()
    one = document("caption", members, ("decode", "resize(tokens=1)", "prepare", "format", "tokenize"))
    assert len(one.media[0].values_PC) == 1
    empty = document("generate", sample(3), ("decode", "format(caption_dropout=1)", "tokenize"))
    assert empty.token_L.tolist()[:3] == [LAYOUT.control(name) for name in ("bos", "user", "model")]


def test_a_source_may_keep_its_prompts_where_the_run_drops_half_of_them():
    begins = [LAYOUT.control(name) for name in ("bos", "user", "model")]

    def emptied(form):
        made = (document("generate", sample(3), ("decode", form, "tokenize"), seed) for seed in range(20))
        return sum(each.token_L.tolist()[:3] == begins for each in made)

    assert 0 < emptied("format") < 20
    assert emptied("format(caption_dropout=0)") == 0


def test_a_setting_that_says_nothing_of_prompts_empties_none():
    given = setting(task="generate")
    silent = Setting(given.decoder, given.schema, LAYOUT, given.text_tokenizer)
    pipeline = OperationPipeline(("decode", "format", "tokenize"), silent)
    made = pipeline.document(pipeline.fixed(Sample("k", sample(3))), random_stream(0))
    assert made.token_L.tolist()[2] != LAYOUT.control("model")


def test_a_document_without_an_answer_is_learned_whole():
    assert document("text", sample(3)).loss_L.tolist() == [0, *[1] * (len("number 3") + 1)]


def test_only_what_stands_before_the_first_random_operation_is_fixed():
    operations = ("decode", "crop(smallest=0.2)", "prepare", "format", "tokenize")
    pipeline = OperationPipeline(operations, setting())
    fixed = pipeline.fixed(Sample("k", {**sample(3), "png": png(0, 30, 30)}))
    assert isinstance(fixed.fields["image"], Image)
    first, again, other = (pipeline.document(fixed, random_stream(seed)) for seed in (0, 0, 1))
    assert (first.media[0].values_PC == again.media[0].values_PC).all()
    assert (
        first.media[0].values_PC.shape != other.media[0].values_PC.shape
        or not (first.media[0].values_PC == other.media[0].values_PC).all()
    )


def test_a_conversation_is_learned_on_the_assistants_turns():
    made = document("chat", chat(7))
    tokens = "".join(chr(t) if LAYOUT.is_text(t) else "#" for t in made.token_L.tolist())
    learned = "".join(c for c, loss in zip(tokens, made.loss_L.tolist(), strict=True) if loss)
    assert learned == "one 7#two#"
    control = [LAYOUT.control(name) for name in ("user", "model", "eos")]
    assert [control.index(t) for t in made.token_L.tolist() if t in control] == [0, 1, 2, 0, 1, 2]
    assert [item.encoder for item in made.media] == ["vision", "audio"]


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        (("decode", "resizze", "format", "tokenize"), "'resizze' is no operation; did you mean resize?"),
        (("decodde", "format", "tokenize"), "'decodde' is no operation; did you mean decode?"),
        (("decode", "resize(token=3)", "format", "tokenize"), "'token' is no argument .* did you mean tokens?"),
        (("decode", "resize(tokens=many)", "format", "tokenize"), "tokens is 'many'; it must be a number"),
        (("decode", "crop(smallest=2)", "format", "tokenize"), "smallest is 2; it must be above 0"),
        (("decode", "format(caption_dropout=2)", "tokenize"), "caption_dropout is 2; it is a share, at most 1"),
        (("resize", "decode", "format", "tokenize"), "must begin with decode"),
        (("decode", "tokenize", "format"), "must begin with decode"),
        (("decode", "os.system(x=1)", "format", "tokenize"), "is written like resize"),
    ],
)
def test_what_a_list_cannot_be_is_told(operations, message):
    with pytest.raises(ValueError, match=message):
        OperationPipeline(operations, setting())


def test_audio_of_any_rate_becomes_log_mel_frames():
    made = document("transcribe", sample(1))
    assert made.media[0].values_PC.shape == (10, AudioConfig(mels=8).mels)
