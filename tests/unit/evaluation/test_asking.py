"""What is asked of a model and what becomes of its answers; the model here answers from a list."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from megatron_gemini.contracts import TokenLayout
from megatron_gemini.data.samples.document import Document
from megatron_gemini.data.samples.items import Codes, Item, Text
from megatron_gemini.evaluation.asking import (
    Continued,
    Drawn,
    Said,
    ask_drawings,
    ask_last_items,
    ask_texts,
    balanced,
)
from megatron_gemini.evaluation.report import Results, judged_inputs
from megatron_gemini.evaluation.validation import RealImages, ValidationExample, resized, spaced
from megatron_gemini.generation.api import Answer, Drawing, Generator
from megatron_gemini.generation.settings import SampleSettings

SETTINGS = SampleSettings()


class Tokens(Generator):
    """An image is its grey value; its code is that value. Answers come from a list."""

    def __init__(self, answers: Sequence[Answer] = (), draws: bool = True) -> None:
        self.layout = TokenLayout(5, (("image", 256),))
        self.answers = list(answers)
        self.codebook = 256 * draws
        self.asked: list[Sequence[Item]] = []

    def codes(self, images, batch_size=1):
        return [(int(image[0, 0, 0]),) for image in images]

    def pixels(self, codes, batch_size=1):
        return [grey(code) for (code,) in codes]

    def respond_all(self, prompts, settings, batch_size=1):
        self.asked += prompts
        return self.answers

    def open_document(self, items, key, roles=True):
        assert not roles
        self.asked.append(items)
        empty = np.zeros(0, np.int64)
        return Document(key, self.layout, empty, empty, empty, empty)

    def continue_all(self, documents, settings, batch_size=1):
        return self.answers


def grey(value: int) -> np.ndarray:
    return np.full((8, 8, 3), value, np.uint8)


def drawing(value: int) -> Drawing:
    return Drawing((value,), grey(value))


def example(label: str, prompt: list[Item] | None = None, answer: list[Item] | None = None) -> ValidationExample:
    return ValidationExample(label, prompt or [Text(label)], answer, label, label)


REAL = RealImages([grey(v) for v in (0, 10, 20, 200, 210, 220)], ["dark"] * 3 + ["light"] * 3, [False] * 6)
VALIDATION = RealImages([grey(v) for v in (5, 10, 205, 215)], ["dark", "dark", "light", "light"], [False] * 4)


def test_what_is_said_stands_beside_what_is_right() -> None:
    asked = [example("a", answer=[Text("one "), Text("two")]), example("b", answer=[Text("six")])]
    said = ask_texts(Tokens([["one ", drawing(3), "three"], []]), asked, SETTINGS)
    assert said == [Said(asked[0], "one three", "one two"), Said(asked[1], "", "six")]


def test_the_first_image_of_an_answer_is_taken_and_a_missing_one_remembered() -> None:
    asked = [example("a"), example("b")]
    drawn = ask_drawings(Tokens([["see", drawing(3), drawing(4)], ["no"]]), asked, SETTINGS)
    assert [d.codes for _, d in drawn.existing()] == [(3,)]
    assert drawn.drawings[1] is None and drawn.examples == asked


def test_documents_are_asked_without_their_last_item() -> None:
    words = example("words", [Text("one"), Text("two")])
    image = example("image", [Text("two"), Codes("image", (7,))])
    single = example("single", [Text("alone")])
    generator = Tokens([["two"], [drawing(9), "more"]])
    continued = ask_last_items(generator, [words, single, image], SETTINGS)
    assert generator.asked == [[Text("one")], [Text("two")]]
    assert continued[0] == Continued(words, "two", "two")
    added, right = continued[1].added, continued[1].right
    assert isinstance(added, Drawing) and isinstance(right, Drawing)
    assert (added.codes, right.codes) == ((9,), (7,)) and np.array_equal(right.pixels_HW3, grey(7))


def test_a_model_that_cannot_draw_is_not_asked_for_documents_that_end_in_an_image() -> None:
    image = example("image", [Text("two"), Codes("image", (7,))])
    assert ask_last_items(Tokens([], draws=False), [image], SETTINGS) == []


def test_every_class_is_asked_equally_often() -> None:
    examples = [example(label) for label in ("a", "b", "a", "c")]
    assert Counter(e.label for e in balanced(examples, 10)) == {"a": 3, "b": 3, "c": 3}


def test_more_classes_than_images_are_asked_once_each() -> None:
    asked = balanced([example(f"{i:03}") for i in range(100)], 4)
    assert [e.label for e in asked] == ["000", "033", "066", "099"]


def test_what_isjudged_inputs_has_its_name_and_the_images_that_it_needs() -> None:
    words = example("words", [Text("one"), Text("two")])
    results = Results(
        said={"caption": [Said(words, "six", "two")]},
        drawn={"generate": Drawn([example("dark")] * 3, [drawing(3), None, drawing(10)])},
        continued={"interleave": [Continued(words, drawing(4), "two"), Continued(words, drawing(4), drawing(5))]},
        train=REAL,
        validation=VALIDATION,
    )
    judged = judged_inputs(Tokens(), results)
    shown = {(name, type(inputs).__name__): dataclasses.asdict(inputs) for name, inputs in judged}
    assert shown["caption", "Texts"] == {"said": ["six"], "right": ["two"]}
    assert shown["interleave", "Texts"] == {"said": [""], "right": ["two"]}
    assert shown["generate", "CodeSets"] == {
        "images": [(3,), (10,)],
        "known": [(v,) for v in (0, 10, 20, 200, 210, 220)],
    }
    assert shown["generate", "ImageSets"]["labels"] == ["dark", "dark"]
    assert shown["validation", "CodeSets"]["images"] == [(5,), (10,), (205,), (215,)]
    assert shown["training", "CodedImages"]["codebook"] == 256
    assert all(map(np.array_equal, shown["reconstruction", "ImagePairs"]["made"], VALIDATION.images))
    assert all(map(np.array_equal, results.rebuilt, VALIDATION.images))


def test_samples_are_spread_over_all() -> None:
    assert list(spaced(10, 4)) == [0, 3, 6, 9]
    assert list(spaced(3, 10)) == [0, 1, 2]
    assert list(spaced(0, 10)) == []


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    image = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    assert resized(image, 16) is image
    assert resized(image, 8).shape == (8, 8, 3)


@pytest.mark.parametrize("altered", [True, False])
def test_originals_are_the_images_that_are_no_altered_copies(altered: bool) -> None:
    real = RealImages([grey(1), grey(2)], ["a", "b"], [altered, False])
    assert real.originals().labels == (["b"] if altered else ["a", "b"])
