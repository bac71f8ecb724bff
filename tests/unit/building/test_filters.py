import pytest

from megatron_gemini.building.filters import Filters, in_scripts, script


@pytest.mark.parametrize(
    ("letter", "name"),
    [("a", "LATIN"), ("ß", "LATIN"), ("ж", "CYRILLIC"), ("中", "HAN"), ("ひ", "HIRAGANA"), ("한", "HANGUL")],
)
def test_scripts_have_their_unicode_names(letter, name):
    assert script(letter) == name


def test_nine_in_ten_letters_decide_and_other_characters_do_not():
    assert in_scripts("123 !?", ("LATIN",))
    assert in_scripts("a" * 9 + "ж", ("LATIN",))
    assert not in_scripts("a" * 8 + "ж", ("LATIN",))
    assert in_scripts("Tokyo 東京", ("LATIN", "HAN"))


def test_columns_are_held_to_limits_and_a_missing_value_is_a_reason_of_its_own():
    filters = Filters(minimum=(("similarity", 0.3),), maximum=(("punsafe", 0.1),), only=(("NSFW", ("UNLIKELY", "0")),))
    good = {"similarity": 0.3, "punsafe": "0.1", "NSFW": "UNLIKELY"}
    assert filters.check_columns(good) == ""
    for changed, reason in (
        ({"similarity": 0.29}, "low_similarity"),
        ({"similarity": None}, "no_similarity"),
        ({"similarity": "nan"}, "no_similarity"),
        ({"punsafe": 0.2}, "high_punsafe"),
        ({"punsafe": "very"}, "no_punsafe"),
        ({"NSFW": "NSFW"}, "other_NSFW"),
        ({"NSFW": None}, "other_NSFW"),
    ):
        assert filters.check_columns({**good, **changed}) == reason


def test_captions_and_sizes():
    filters = Filters(min_side=10, max_aspect=2, min_caption=2, max_caption=4, scripts=("LATIN",))
    assert [filters.check_caption(c) for c in ("a", "ab", "abcd", "abcde", "жж")] == [
        "caption_short",
        "",
        "",
        "caption_long",
        "caption_script",
    ]
    assert [filters.check_size(*s) for s in ((10, 20), (21, 10), (9, 9))] == ["", "image_aspect", "image_small"]


def test_limits_that_let_nothing_through_are_refused():
    with pytest.raises(ValueError, match="--min-side is 0"):
        Filters(min_side=0)
    with pytest.raises(ValueError, match=r"--max-aspect is 0\.5"):
        Filters(max_aspect=0.5)
    with pytest.raises(ValueError, match="captions of 5 to 4 characters"):
        Filters(min_caption=5, max_caption=4)
