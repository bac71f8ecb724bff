"""Case 2: records as LLaVA writes them, a picture beside the conversation and <image> in its text."""

import re

import torch

from tests.cases.tiny_run import configure, learn, texts_of, write_pictures, write_records


def test_every_document_has_its_picture_and_no_mark_is_learned(tmp_path):
    write_pictures(tmp_path)
    said = [{"from": "human", "value": "<image>\nWhat color?"}]
    records = [
        {"image": f"{i % 8}.jpg", "conversations": [*said, {"from": "gpt", "value": f"shade {i % 8}"}]}
        for i in range(24)
    ]
    config = configure(tmp_path, write_records(tmp_path / "llava.jsonl", records))
    rows, losses, skipped = learn(config)
    assert not skipped
    assert losses[-1] < losses[0]
    for row in rows:
        assert len(row.media["vision"].grid_I3) == len(row.samples)
        assert all(re.fullmatch(r"What color\? ?shade \d", text) for text in texts_of(row, config))
        # Each document has the pixels that its answer names: red is 30 times its number.
        red = row.media["vision"].values_PC.view(len(row.samples), -1, 3)[:, :, 0].mean(1)
        numbers = torch.tensor([int(key.rpartition("/")[2]) % 8 for key in row.samples])
        assert (((red + 1) * 127.5 - 30 * numbers).abs() < 3).all()
