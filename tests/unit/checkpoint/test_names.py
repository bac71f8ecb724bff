"""Which parameter of a checkpoint becomes which of the model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gemini.checkpoint.names import map_names
from megatron_gemini.config.init_from import InitFromConfig

VISION = ["encoders.vision.blocks.0.norm", "encoders.vision.blocks.1.norm", "encoders.vision.norm"]
MODEL = [*VISION, "encoders.vision2.norm", "decoder.norm"]
NAMES = st.lists(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=4).map(".".join), min_size=1, max_size=12, unique=True
)


def section(**settings) -> InitFromConfig:
    return InitFromConfig(checkpoint="run", **settings)


def test_a_module_takes_its_own_names_and_no_others() -> None:
    found = map_names(section(module="encoders.vision"), MODEL, MODEL)
    assert found.sources == {name: name for name in VISION}
    assert not found.missing and not found.unexpected


def test_the_whole_model_takes_everything() -> None:
    found = map_names(section(), MODEL, MODEL)
    assert found.sources == {name: name for name in MODEL}


def test_a_source_has_another_place_in_the_checkpoint() -> None:
    there = [name.replace("encoders.vision.", "eye.") for name in VISION]
    found = map_names(section(module="encoders.vision", source="eye"), MODEL, [*there, "ear.norm"])
    assert found.sources == dict(zip(VISION, there, strict=True))


def test_a_source_may_be_all_of_a_checkpoint() -> None:
    found = map_names(section(module="encoders.vision2", source="."), MODEL, ["norm"])
    assert found.sources == {"encoders.vision2.norm": "norm"}


def test_renames_follow_each_other_and_stop_at_dots() -> None:
    there = ["eye.layers.0.ln", "eye.layers.1.ln", "eye.lnorm.x"]
    wanted = ["eye.blocks.0.norm", "eye.blocks.1.norm", "eye.lnorm.x"]
    rules = ("layers=blocks", "ln=wrong", "blocks.*.ln=blocks.*.norm")
    assert map_names(section(module="eye", rename=rules), wanted, there).sources == dict(
        zip(wanted, there, strict=True)
    )


def test_stars_keep_their_order() -> None:
    found = map_names(section(rename=("a.*.b.*=c.*.*.d",)), ["c.1.2.d.e"], ["a.1.b.2.e"])
    assert found.sources == {"c.1.2.d.e": "a.1.b.2.e"}


def test_what_only_one_side_has_is_told_apart() -> None:
    found = map_names(section(module="encoders.vision"), MODEL, [*VISION[1:], "encoders.vision.head"])
    assert found.missing == VISION[:1] and found.unexpected == ["encoders.vision.head"]


def test_what_may_differ_is_named() -> None:
    there = [*VISION[1:], "encoders.vision.head"]
    allowed = section(module="encoders.vision", allow_missing=("blocks.*.norm",), ignore=("head",))
    found = map_names(allowed, MODEL, there)
    assert not found.missing and not found.unexpected and set(found.sources) == set(VISION[1:])


def test_two_names_that_become_one_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"makes decoder\.norm of both decoder\.norm and decoder\.old"):
        map_names(section(module="decoder", rename=("old=norm",)), MODEL, ["decoder.norm", "decoder.old"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"module": "encoders.visoin"}, r"module is encoders\.visoin, and the model has no .* encoders\.vision"),
        ({"source": "eye"}, r"source is eye, and run has no parameter below it; there are decoder, encoders"),
    ],
)
def test_a_prefix_of_nothing_is_answered_with_those_that_are_there(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        map_names(section(**settings), MODEL, MODEL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"module": ""}, r"module is empty; write \."),
        ({"module": "a..b"}, r"module has 'a\.\.b'"),
        ({"source": "a.*"}, r"source has 'a\.\*'"),
        ({"rename": ("a",)}, r"rename has 'a'; write OLD=NEW"),
        ({"rename": ("a=",)}, r"rename has ''"),
        ({"rename": ("a.*=b",)}, r"as many \* in NEW as in OLD"),
        ({"ignore": ("a*",)}, r"ignore has 'a\*'"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_named(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        section(**settings)


def test_a_section_without_a_checkpoint_is_an_error() -> None:
    with pytest.raises(ValueError, match="checkpoint is empty"):
        InitFromConfig()


@given(NAMES, NAMES)
def test_every_name_is_taken_or_told(wanted: list[str], there: list[str]) -> None:
    """Nothing is lost: each name of the model is filled or missing, each of the checkpoint taken or unexpected."""
    found = map_names(section(), wanted, there)
    assert sorted([*found.sources, *found.missing]) == sorted(wanted)
    assert sorted([*found.sources.values(), *found.unexpected]) == sorted(there)


@given(NAMES)
def test_a_rename_and_its_inverse_give_the_names_back(names: list[str]) -> None:
    """Of parts that no name has, so that nothing meets."""
    moved = [name.replace("a", "z") for name in names]
    forth = tuple(f"{'*.' * depth}a={'*.' * depth}z" for depth in range(4))
    found = map_names(section(rename=forth), moved, names)
    assert found.sources == dict(zip(moved, names, strict=True))
    back = tuple(f"{'*.' * depth}z={'*.' * depth}a" for depth in range(4))
    assert map_names(section(rename=(*forth, *back)), names, names).sources == {name: name for name in names}
