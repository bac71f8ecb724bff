import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gemini.building.duplicates import BITS, Duplicates, Near, difference_hash
from megatron_gemini.modalities.image.preprocess import decode_image
from tests.unit.building.pictures import encoded, smooth


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 15),
    st.lists(st.integers(0, 2**BITS - 1), min_size=1, max_size=20),
    st.integers(0, 19),
    st.sets(st.integers(0, BITS - 1), max_size=20),
    st.integers(0, 2**BITS - 1),
)
def test_the_bands_find_what_comparing_with_everything_finds(distance, seen, chosen, flips, other):
    near = Near(distance)
    for value in seen:
        near.add(value)
    close = seen[chosen % len(seen)] ^ sum(1 << bit for bit in flips)
    for value in (close, other):
        assert (value in near) == any((value ^ known).bit_count() <= distance for known in seen)


def test_the_hash_is_what_its_definition_says_on_a_picture_of_nine_by_nine():
    grey = np.random.default_rng(0).integers(0, 256, (9, 9), np.uint8)
    bits = [grey[y, x] > grey[y, x + 1] for y in range(8) for x in range(8)]
    bits += [grey[y, x] > grey[y + 1, x] for y in range(8) for x in range(8)]
    expected = sum(int(bit) << (BITS - 1 - place) for place, bit in enumerate(bits))
    assert difference_hash(np.repeat(grey[..., None], 3, axis=2)) == expected


def test_sizes_and_qualities_of_one_picture_are_near_and_other_pictures_are_far():
    hashes = [difference_hash(np.asarray(smooth(seed, 128))) for seed in range(20)]
    for seed, original in enumerate(hashes):
        copy = decode_image(encoded(smooth(seed, 128).resize((90, 90)), "JPEG", quality=70))
        assert (difference_hash(copy) ^ original).bit_count() <= 5
    far = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(far) > 20


def test_kinds_of_duplicates():
    one, other, far = "00" * 32, "11" * 32, (1 << 64) - 1
    for kind, expected in (
        ("none", ["", "", ""]),
        ("exact", ["duplicate_file", "", ""]),
        ("perceptual", ["duplicate_file", "duplicate_picture", ""]),
    ):
        seen = Duplicates(kind, 1)
        seen.keep(one, 0)
        assert [seen.reason(one, 0), seen.reason(other, 1), seen.reason(other, far)] == expected
