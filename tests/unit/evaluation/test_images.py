"""Judging images: the classifier on real digits, distances and noise ratios with known answers."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from megatron_gemini.evaluation.images import Classifier, diversity, psnr, resized, share


def digits() -> tuple[list[np.ndarray], list[str]]:
    """Real digits as 16 x 16 RGB images."""
    data = load_digits()
    grey = np.round(data.images * 255 / 16).astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2)
    return [np.repeat(image[..., None], 3, axis=2) for image in grey], [str(label) for label in data.target]


def test_the_classifier_knows_validation_digits() -> None:
    images, labels = digits()
    classifier = Classifier(images[::2], labels[::2])
    assert classifier.accuracy(images[1::2], labels[1::2]) >= 0.98
    assert classifier.classes == [str(i) for i in range(10)]


def test_the_classifier_does_not_recognise_noise() -> None:
    images, labels = digits()
    classifier = Classifier(images[:600], labels[:600])
    noise = np.random.default_rng(0).integers(0, 255, (200, 16, 16, 3), dtype=np.uint8)
    assert classifier.accuracy(list(noise), labels[:200]) < 0.4


def test_one_class_is_no_classification() -> None:
    with pytest.raises(ValueError, match="2 classes or more"):
        Classifier([np.zeros((8, 8, 3), np.uint8)] * 3, ["a"] * 3)


def test_diversity_is_the_mean_distance_within_classes() -> None:
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    assert diversity([black, white], ["a", "a"]) == pytest.approx(12**0.5)
    assert diversity([black, black, white, white], ["a", "a", "b", "b"]) == 0
    assert diversity([black, white, white], ["a", "a", "a"]) == pytest.approx(2 / 3 * 12**0.5)
    assert np.isnan(diversity([black, white], ["a", "b"]))


def test_psnr_has_its_textbook_value() -> None:
    image = np.full((4, 4, 3), 100, np.uint8)
    assert psnr([image], [image + 10]) == pytest.approx(20 * np.log10(255 / 10))
    assert psnr([image], [image]) == 99.0


def test_share_of_nothing_is_no_number() -> None:
    assert share([True, False, True, True]) == 0.75
    assert np.isnan(share([]))


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    image = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    assert resized(image, 16) is image
    assert resized(image, 8).shape == (8, 8, 3)
