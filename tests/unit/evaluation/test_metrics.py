"""Metrics against textbook loops and values computed by hand; the registry's names and its independence of torch."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.evaluation.metrics.code_usage import code_usage
from megatron_gemini.evaluation.metrics.copies import copies
from megatron_gemini.evaluation.metrics.diversity import diversity, spread
from megatron_gemini.evaluation.metrics.error_rates import character_error_rate, levenshtein, word_error_rate
from megatron_gemini.evaluation.metrics.exact_match import exact_match
from megatron_gemini.evaluation.metrics.inputs import CodedImages, CodeSets, ImagePairs, ImageSets, Texts, mean
from megatron_gemini.evaluation.metrics.judge import judge
from megatron_gemini.evaluation.metrics.psnr import psnr
from megatron_gemini.evaluation.metrics.spec import MetricSpec
from megatron_gemini.evaluation.metrics.ssim import similarity, ssim
from megatron_gemini.registry import METRICS


def flat(value: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def noise(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_exact_match_ignores_case_spaces_and_a_closing_mark() -> None:
    assert exact_match(Texts(["One  two.", "one", "", "one two"], ["one two", "two", "one", "one two"])) == 0.5
    assert math.isnan(exact_match(Texts([], [])))


def textbook_distance(first: str, second: str) -> int:
    """The whole table, cell by cell."""
    d = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i in range(len(first) + 1):
        for j in range(len(second) + 1):
            if min(i, j) == 0:
                d[i][j] = max(i, j)
            else:
                other = first[i - 1] != second[j - 1]
                d[i][j] = min(d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + other)
    return d[-1][-1]


# Few letters, so that equal ones are common and the best path is not always the diagonal.
@settings(max_examples=500, deadline=None)
@given(first=st.text("abc", max_size=12), second=st.text("abc", max_size=12))
def test_the_edit_distance_is_the_textbooks(first: str, second: str) -> None:
    assert levenshtein(first, second) == textbook_distance(first, second)


@pytest.mark.parametrize(
    ("first", "second", "edits"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("", "", 0), ("flaw", "lawn", 2), ("héé", "hé", 1)],
)
def test_the_edit_distance_of_known_words(first: str, second: str, edits: int) -> None:
    assert levenshtein(first, second) == edits
    assert levenshtein(first.encode(), first.encode()) == 0


def test_error_rates_are_of_all_texts_together() -> None:
    texts = Texts(["the cat sat", "a"], ["the cat sat down", "one two"])
    # words: 1 left out of 4, and "a" for "one" with "two" left out: 2 of 2
    assert word_error_rate(texts) == pytest.approx((1 + 2) / (4 + 2))
    # characters: " down" left out, 5 of 16; "a" and "one two" have none in common: 7 of 7
    assert character_error_rate(texts) == pytest.approx((5 + 7) / (16 + 7))


def test_error_rates_ignore_what_an_exact_match_ignores_and_may_exceed_one() -> None:
    assert character_error_rate(Texts(["One  two."], ["one two"])) == 0
    assert word_error_rate(Texts(["one two three"], ["four"])) == 3.0
    assert math.isnan(character_error_rate(Texts([], []))) and math.isnan(word_error_rate(Texts(["a"], [""])))


def test_psnr_has_its_textbook_value() -> None:
    image = flat(100, 4, 4)
    assert psnr(ImagePairs([image + 10], [image])) == pytest.approx(20 * np.log10(255 / 10))
    assert psnr(ImagePairs([image], [image])) == 99.0
    assert math.isnan(psnr(ImagePairs([], [])))


def textbook_ssim(a: np.ndarray, b: np.ndarray, side: int = 11) -> float:
    """Every place of the window and every pixel in it, one after the other (Wang et al. 2004, eq. 13, sigma 1.5)."""
    x, y = ([[0.299 * p[0] + 0.587 * p[1] + 0.114 * p[2] for p in row] for row in image.tolist()] for image in (a, b))
    middle = side // 2
    weight = {
        (i, j): math.exp(-((i - middle) ** 2 + (j - middle) ** 2) / (2 * 1.5**2))
        for i in range(side)
        for j in range(side)
    }
    total = sum(weight.values())
    values = []
    for top in range(len(x) - side + 1):
        for left in range(len(x[0]) - side + 1):
            window = [(w / total, x[top + i][left + j], y[top + i][left + j]) for (i, j), w in weight.items()]
            mx, my = sum(w * p for w, p, _ in window), sum(w * q for w, _, q in window)
            sxx = sum(w * (p - mx) ** 2 for w, p, _ in window)
            syy = sum(w * (q - my) ** 2 for w, _, q in window)
            sxy = sum(w * (p - mx) * (q - my) for w, p, q in window)
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            values.append((2 * mx * my + c1) * (2 * sxy + c2) / ((mx**2 + my**2 + c1) * (sxx + syy + c2)))
    return sum(values) / len(values)


@pytest.mark.parametrize(("height", "width", "side"), [(13, 16, 11), (11, 11, 11), (8, 20, 7), (1, 3, 1), (2, 2, 1)])
def test_ssim_is_the_papers_double_sum(height: int, width: int, side: int) -> None:
    original = noise(0, height, width)
    for made in (noise(1, height, width), np.clip(original.astype(int) + 40, 0, 255).astype(np.uint8)):
        assert similarity(made, original) == pytest.approx(textbook_ssim(made, original, side), abs=1e-9)


def test_ssim_of_equal_and_of_flat_images() -> None:
    assert ssim(ImagePairs([noise(0, 16, 16)], [noise(0, 16, 16)])) == pytest.approx(1)
    c1 = (0.01 * 255) ** 2
    flat_pair = (2 * 50 * 200 + c1) / (50**2 + 200**2 + c1)  # only the luminance differs
    assert ssim(ImagePairs([flat(50), flat(7)], [flat(200), flat(7)])) == pytest.approx((flat_pair + 1) / 2)


def test_spread_is_the_mean_distance_within_classes() -> None:
    black, white = flat(0, 2, 2), flat(255, 2, 2)
    assert spread([black, white], ["a", "a"]) == pytest.approx(12**0.5)
    assert spread([black, black, white, white], ["a", "a", "b", "b"]) == 0
    assert spread([black, white, white], ["a", "a", "a"]) == pytest.approx(2 / 3 * 12**0.5)
    assert math.isnan(spread([black, white], ["a", "b"]))


def test_diversity_compares_like_with_like() -> None:
    """As many real images of each class as were drawn, and no class that was not."""
    real = [flat(v, 8, 8) for v in (5, 10, 205, 215, 90)]
    classes = ["dark", "dark", "light", "light", "dark"]
    drawn = ImageSets([flat(3, 8, 8), flat(10, 8, 8)], ["dark", "dark"], real, classes)
    assert diversity(drawn) == pytest.approx(7 / 5)
    assert math.isnan(diversity(ImageSets([], [], real, classes)))
    assert math.isnan(diversity(ImageSets([flat(0), flat(9)], ["a", "a"], [flat(1), flat(1)], ["a", "a"])))


def test_code_usage_is_the_share_of_the_codebook() -> None:
    assert code_usage(CodedImages([(0, 1), (1, 3)], 12)) == 0.25


def test_copies_share_all_codes_with_a_training_image() -> None:
    assert copies(CodeSets([(1, 2), (2, 1), (1, 2), (3, 3)], [(1, 2), (4, 4)])) == 0.5
    assert math.isnan(copies(CodeSets([(1, 2)], [])))


def test_a_mean_of_nothing_is_no_number() -> None:
    assert mean([True, False, True, True]) == 0.75
    assert math.isnan(mean([]))


def test_every_metric_says_its_name_and_how_it_is_shown() -> None:
    assert list(METRICS) == [metric.name for metric in METRICS.entries()]
    assert {"exact_match", "cer", "wer", "psnr", "ssim", "code_usage", "diversity", "copies"} <= set(METRICS)
    for metric in METRICS.entries():
        assert metric.what and metric.shown.format(0.5)


def test_judging_takes_the_metrics_of_the_inputs_and_names_the_figures() -> None:
    scores = judge("caption", Texts(["one", "six"], ["one", "two"]))
    assert set(scores) == {"caption_exact_match", "caption_cer", "caption_wer"}
    assert str(scores["caption_exact_match"]) == "50.0%" and scores["caption_cer"].better == "lower"
    assert set(judge("caption", Texts(["one"], ["one"]), ["wer", "psnr"])) == {"caption_wer"}
    assert str(judge("caption", Texts([], []))["caption_cer"]) == "nothing to judge"


@pytest.mark.parametrize(
    ("name", "said"), [("exact_mach", "did you mean exact_match?"), ("zzz", "there are exact_match, cer")]
)
def test_an_unknown_metric_is_answered_with_the_nearest(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is no metric; ") as error:
        METRICS.get(name)
    assert said in str(error.value)


def test_a_metric_from_outside_is_part_of_the_evaluation() -> None:
    said = MetricSpec(
        "words", Texts, lambda texts: mean(len(x.split()) for x in texts.said), "neither", "{:g}", "words"
    )
    METRICS.register("words", said)
    try:
        assert judge("caption", Texts(["one two"], ["one"]))["caption_words"].value == 2
        with pytest.raises(ValueError, match="'words' already"):
            METRICS.register("words", said)
    finally:
        METRICS.unregister("words")


def test_metrics_need_neither_torch_nor_a_media_library() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'av', 'soundfile', 'soxr', 'PIL', 'sklearn'):\n    sys.modules[name] = None\n"
        "from megatron_gemini.evaluation.metrics.inputs import Texts\n"
        "from megatron_gemini.evaluation.metrics.judge import judge\n"
        "print(judge('a', Texts(['b'], ['b']))['a_exact_match'])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "100.0%\n"
