"""What the sheet shows is what the model got."""

import numpy as np

from megatron_gemini.config.encoders import AudioConfig, VisionConfig
from megatron_gemini.data.samples.document import prepare
from megatron_gemini.data.samples.items import Text
from megatron_gemini.evaluation.asking import Drawn, Said
from megatron_gemini.evaluation.report import Results
from megatron_gemini.evaluation.sections import Captions, Clips, DrawnFromSpeech, DrawnFromText, Rebuilt, Transcripts
from megatron_gemini.evaluation.sheet import make_sheet, pictures, subtitle
from megatron_gemini.evaluation.validation import ValidationExample, some
from megatron_gemini.generation.api import Drawing
from megatron_gemini.modalities.audio.item import Audio
from megatron_gemini.modalities.image.item import Image
from megatron_gemini.modalities.video.item import Video

NOISE = np.random.default_rng(0).integers(0, 255, (3, 8, 12, 3), dtype=np.uint8)
ENCODERS = {"vision": VisionConfig(patch=4, max_side=16), "audio": AudioConfig()}


def test_images_and_clips_are_shown_pixel_by_pixel() -> None:
    prompt = [prepare(Image(NOISE[0]), ENCODERS), Text("what?"), prepare(Video(NOISE, 0.5), ENCODERS)]
    image, clip = pictures(prompt, ENCODERS)
    assert np.array_equal(image.frames_FHW3, NOISE[:1])
    assert np.array_equal(clip.frames_FHW3, NOISE)


def test_answers_stand_where_their_inputs_look_like_whatever_the_task_is_called() -> None:
    """A sound, an image and a clip of one task, and drawings from words and from sound of another."""
    inputs = [Audio(np.sin(np.arange(4000.0, dtype=np.float32))), Image(NOISE[0]), Video(NOISE, 0.5)]
    sound, image, clip = (prepare(item, ENCODERS) for item in inputs)
    asked = [ValidationExample(f"{i}", [item], None, "six", "six") for i, item in enumerate((sound, image, clip))]
    spoken, written = (ValidationExample("x", prompt, None, "six", "six") for prompt in ([sound], [Text("draw six")]))
    drawing = Drawing((1,), NOISE[0, :, :8])
    results = Results(said={"any": [Said(e, "six", "six") for e in asked]})
    results.drawn["other"] = Drawn([spoken, written, written], [drawing, drawing, None])
    found = {type(section): len(section.items) for row in make_sheet(results, "", "", ENCODERS).rows for section in row}
    expected = {DrawnFromText: 1, Captions: 1, Transcripts: 1, Clips: 1, DrawnFromSpeech: 1, Rebuilt: 0}
    assert found == expected


def test_the_subtitle_names_only_what_was_measured() -> None:
    report = {"caption_exact_match": 0.976, "transcribe_exact_match": None, "caption_cer": 0.1, "train_seconds": 372.4}
    assert subtitle(report) == "caption exact match 98%  ·  trained in 6 min 12 s  ·  all on validation data"
    assert subtitle(report, {"caption_cer": "wrong letters"}).startswith("wrong letters 10%  ·  trained in")
    assert subtitle({}) == ""


def test_some_are_spread_over_all() -> None:
    assert some(list("abcdefg"), 3) == ["a", "d", "g"]
