"""Validation data that is not held out is found."""

import json

from megatron_gemini.evaluation.separation import Fingerprint, compare


def side(*samples: tuple[str, bytes, dict]) -> Fingerprint:
    fingerprint = Fingerprint()
    for key, image, metadata in samples:
        members = {"png": image, "txt": b"seven", "json": json.dumps(metadata).encode()}
        fingerprint.add(key, members, ["voice", "index"])
    return fingerprint


TRAIN = side(("a", b"1", {"voice": "anna", "index": [1, 2]}), ("b", b"2", {"voice": "bert", "index": 3}))


def test_disjoint_sides_are_separate_although_their_texts_are_the_same() -> None:
    report = compare(TRAIN, side(("c", b"3", {"voice": "carl", "index": 4})), ["voice", "index"])
    assert report["separate"]
    assert report["shared_media"] == 0
    assert report["fields"]["voice"] == {"training": 2, "validation": 1, "shared": 0}
    assert report["fields"]["index"]["training"] == 3


def test_the_same_image_under_another_key_is_found() -> None:
    report = compare(TRAIN, side(("c", b"2", {})), [])
    assert not report["separate"]
    assert report["shared_media"] == 1
    assert report["example"] == {"training": "b", "validation": "c"}


def test_a_shared_voice_or_one_frame_of_a_clip_is_found() -> None:
    for metadata, name in (({"voice": "anna"}, "voice"), ({"index": [7, 2]}, "index")):
        report = compare(TRAIN, side(("c", b"3", metadata)), ["voice", "index"])
        assert not report["separate"]
        assert report["fields"][name]["shared"] == 1


def test_members_of_interleaved_documents_are_hashed() -> None:
    train, validation = Fingerprint(), Fingerprint()
    train.add("a", {"png": b"1"}, [])
    validation.add("b", {"json": b'{"items": []}', "0.png": b"9", "1.png": b"1"}, [])
    assert compare(train, validation, [])["shared_media"] == 1


def test_a_field_that_one_side_lacks_is_not_called_separate_by_it() -> None:
    report = compare(TRAIN, side(("c", b"3", {})), ["voice"])
    assert report["fields"]["voice"]["shared"] == "not comparable"


def test_nothing_to_compare_is_not_separate() -> None:
    assert not compare(TRAIN, Fingerprint(), [])["separate"]


def test_broken_metadata_is_no_metadata() -> None:
    fingerprint = Fingerprint()
    fingerprint.add("a", {"json": b"{broken"}, ["voice"])
    fingerprint.add("b", {"json": b"[1]"}, ["voice"])
    assert fingerprint.samples == 2 and not fingerprint.fields
